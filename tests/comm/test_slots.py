"""What the ranks of a node know of one another without a message: slots in a file, and what the system says."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dpnn.comm.slots import Place, Slots, state_of

PLACE = Place(3, 1234, 99, 2, 57, 1.5, 0.25, "part 1 to take the output of fc6", "Sent the output of fc6 to part 1")


def test_a_place_is_the_same_when_it_is_read():
    assert Place.unpack(PLACE.pack()) == PLACE


def test_what_is_too_long_for_a_slot_is_cut_between_letters():
    packed = PLACE._replace(whom="é" * 200, doing="x" + "é" * 200).pack()
    assert len(packed) == len(PLACE.pack())
    found = Place.unpack(packed)
    assert found.whom == "é" * 80
    assert found.doing == "x" + "é" * 79


@pytest.mark.parallel([1, 3])
def test_every_rank_of_a_node_reads_all_slots(world):
    slots = Slots(world.node)
    world.meet()
    slots.write(PLACE._replace(rank=world.rank, step=10 + world.rank))
    world.meet()
    assert [(place.rank, place.step) for place in slots.read()] == [(rank, 10 + rank) for rank in range(world.size)]
    world.meet()
    slots.close()


@pytest.mark.parallel([3])
def test_a_rank_that_has_not_written_yet_is_left_out(world):
    slots = Slots(world.node)
    if world.rank == 2:
        slots.write(PLACE._replace(rank=2))
    world.meet()
    assert [place.rank for place in slots.read()] == [2]
    world.meet()
    slots.close()


@pytest.mark.parallel([3])
def test_one_rank_of_a_node_does_what_is_due(world):
    """However many ask, and again only when the time is over; one business doesn't hold up another."""
    slots = Slots(world.node)
    world.meet()
    asked = [slots.due(0, 60.0) for _ in range(200)]
    done = world.comm.allreduce(sum(asked))
    assert done == 1
    world.meet()
    assert world.comm.allreduce(any(slots.due(1, 0.0) for _ in range(200))) >= 1
    slots.close()


def test_without_a_folder_for_temporary_files_a_rank_has_its_own_slot(monkeypatch):
    from mpi4py import MPI

    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    slots = Slots(MPI.COMM_SELF)
    slots.write(PLACE)
    assert slots.read() == [PLACE]
    assert slots.due(0, 60.0)
    assert not slots.due(0, 60.0)
    slots.close()


@pytest.fixture
def sleeper():
    """sleeper(code) -> a process group of Python's that runs some code and sleeps."""
    made = []

    def start(code: str = "pass"):
        line = [sys.executable, "-c", f"import ctypes, time\n{code}\nprint(flush=True)\ntime.sleep(60)"]
        made.append(subprocess.Popen(line, stdout=subprocess.PIPE, start_new_session=True))
        return made[-1]

    yield start
    for process in made:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def until_state(pid: int, wanted: str) -> str:
    end = time.monotonic() + 20
    while state_of(pid) != wanted and time.monotonic() < end:
        time.sleep(0.01)
    return state_of(pid)


def test_a_process_that_is_well_has_no_trouble(sleeper):
    process = sleeper()
    process.stdout.readline()
    assert until_state(process.pid, "") == ""
    assert state_of(os.getpid()) == ""


def test_a_stopped_process_is_known(sleeper):
    process = sleeper()
    process.send_signal(signal.SIGSTOP)
    assert until_state(process.pid, "stopped (SIGSTOP)") == "stopped (SIGSTOP)"


def test_a_dead_process_is_known_whether_its_parent_has_seen_it_or_not():
    process = subprocess.Popen([sys.executable, "-c", ""])
    assert until_state(process.pid, "dead") == "dead"
    process.wait()
    assert state_of(process.pid) == "dead"


def test_a_thread_that_the_kernel_holds_is_known(sleeper):
    """A parent of vfork is held as by a disk: until its child has gone."""
    code = "import threading\nthreading.Thread(target=lambda: ctypes.CDLL(None).vfork() or time.sleep(60)).start()"
    process = sleeper(code)
    assert until_state(process.pid, "blocked in the file system") == "blocked in the file system"
