"""`dpnn doctor --ranks` on GPUs: what MPI says of their memory is tried, where a crash does no harm."""

import sys
from pathlib import Path

import pytest

from dpnn.backends import cuda
from dpnn.cluster import devices
from dpnn.comm import library
from dpnn.native import Unavailable

from ..backends.cuda.shim import Shim

PROGRAM = Path(__file__).parent / "programs" / "given_device_memory.py"


class Wrong(Shim):
    """What is read from it isn't what was written."""

    def read(self, array):
        return super().read(array) + 1


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(how, kind=Shim, takes=True): each rank has such a device, and MPI says that it takes its memory.

    `how` it goes in a process of its own.
    """

    def make(how: str, kind: type[Shim] = Shim, takes: bool = True) -> None:
        monkeypatch.setenv("HOW", how)
        monkeypatch.setattr(devices, "_ALONE", (sys.executable, str(PROGRAM)))
        monkeypatch.setattr(cuda, "device_of_rank", lambda local_rank: kind())
        monkeypatch.setattr(library, "takes_device_memory", lambda: takes)

    return make


def found(world) -> dict[str, tuple[str, str]]:
    return {finding.what: (finding.state, finding.text) for finding in devices.compare(world)}


@pytest.mark.parallel(2)
def test_memory_of_devices_that_arrives_is_well(world, stand_in):
    stand_in("well")
    assert found(world)["GPU memory"] == ("ok", "MPI says that it takes it, and what was sent has arrived")


@pytest.mark.parallel(2)
@pytest.mark.parametrize(("how", "told"), [("elsewhere", "crashed (SIGSEGV)"), ("other", "failed (exit code 1)")])
def test_a_library_that_does_not_do_what_it_says_is_wrong(world, stand_in, how, told):
    """One that reads a GPU's memory as the host's is ended by the system; the doctor isn't."""
    stand_in(how)
    state, text = found(world)["GPU memory"]
    assert state == "wrong"
    assert text == f"rank 0's library says that it takes a GPU's memory, and {told} when it was given some"


@pytest.mark.parallel(2)
def test_other_numbers_than_were_sent_between_ranks_are_wrong(world, stand_in):
    stand_in("well", Wrong)
    state, text = found(world)["GPU memory"]
    assert (state, "rank 0 got other numbers than rank 1 sent" in text) == ("wrong", True)


@pytest.mark.parallel(2)
def test_a_library_that_says_no_is_given_none(world, stand_in):
    stand_in("elsewhere", takes=False)
    state, text = found(world)["GPU memory"]
    assert (state, "doesn't say that it takes a GPU's memory" in text) == ("ok", True)


@pytest.mark.parallel(2)
def test_gpus_that_are_shared_or_missing_are_to_be_looked_at(world, stand_in, monkeypatch):
    stand_in("well", takes=False)
    assert found(world)["GPUs"][0] == "attention"
    assert "2 ranks share a stand-in on the CPU" in found(world)["GPUs"][1]

    def only_first(local_rank):
        if world.rank:
            raise Unavailable("none")
        return Shim()

    monkeypatch.setattr(cuda, "device_of_rank", only_first)
    assert found(world) == {"GPUs": ("attention", "rank 1 has none, and others have: a stand-in on the CPU")}


@pytest.mark.parallel(2)
def test_without_gpus_nothing_is_told(world, monkeypatch):
    def none(local_rank):
        raise Unavailable("none")

    monkeypatch.setattr(cuda, "device_of_rank", none)
    assert found(world) == {}
