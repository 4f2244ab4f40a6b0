"""Whatever goes wrong on one part of a replica, the job ends on all, soon, and one message says why."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from dpnn.observe import metrics

LIMIT_S = 10
SOAK = pytest.mark.soak
HERE = Path(__file__).parent
LONG = ("train.epochs=1000", "train.eval_every=0", "output.checkpoint_every=1000", "parallel.parts=2")
SPLIT = 'parallel.placement={"dense*" = 1, "*" = 0}'
"""By hand: nothing need be measured first."""


@pytest.fixture
def start(start_mpirun, job):
    """start(ranks, *settings, script=None, env={}) -> (the program, its run folder)."""

    def make(ranks, *settings, **how):
        made = job()
        words = [word for setting in (*LONG, *settings) for word in ("--set", setting)]
        return start_mpirun(ranks, "train", made.path, *words, **how), made.out

    return make


@pytest.fixture
def signalled(start, until_trained, messages):
    """signalled(ranks, rank, name, *settings, limit_s=...) -> as `ended`: one rank gets a signal while all train."""

    def run(ranks, rank, name, *settings, limit_s=LIMIT_S):
        program, folder = start(ranks, *settings)
        until_trained(program, folder)
        pids = program.pids()
        held = {path for pid in pids.values() for path in shared_memory(pid)}
        os.kill(pids[rank], signal.Signals[name])
        begin = time.monotonic()
        ended = program.finish(limit_s)
        program.until_gone(LIMIT_S)
        print(f"{name} of rank {rank}: ended after {time.monotonic() - begin:.1f} s (limit {limit_s} s)")
        assert [path for path in held if path.exists()] == []
        return ended.returncode, messages(ended.stderr), folder, ended.stderr

    return run


def shared_memory(pid: int) -> set[Path]:
    """What a process has mapped of dpnn's shared memory."""
    return set(map(Path, re.findall(r"/dev/shm/dpnn-\S+", Path(f"/proc/{pid}/maps").read_text())))


def check_record(folder: Path, message: str, code: int) -> None:
    """What is left of the run says why it ended; nothing was saved after it."""
    assert (folder / "failure.txt").read_text().startswith(message)
    (end,) = [line for line in metrics.read(folder / "metrics.jsonl") if line["kind"] == "end"]
    assert end["exit"] == code
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("layer", "rank", "settings"),
    [
        pytest.param("conv1", 0, ("parallel.microbatches=3",), marks=SOAK),
        ("dense2", 1, ("parallel.microbatches=3",)),
        pytest.param("dense2", 1, ("parallel.pipeline=gpipe",), marks=SOAK),
        ("dense1", 1, ("parallel.strategy=average", f"model.name={HERE}/networks.py:plain")),
    ],
    ids=["first", "last", "one-micro-batch", "average"],
)
def test_a_loss_that_is_not_finite_is_blamed_on_a_layer(start, messages, layer, rank, settings):
    """A layer of the first part, or of the last one, has infinite parameters from the start."""
    network = f"model.name={HERE}/networks.py:mixed"
    program, folder = start(
        4, network, SPLIT, *settings, script=HERE / "programs" / "spoiled.py", env={"BAD": f"{layer}.weight"}
    )
    ended = program.finish()
    assert ended.returncode == 5, ended.stderr
    (message,) = messages(ended.stderr)
    assert message.startswith(f"dpnn: rank {rank}: {layer}: its output is not finite (epoch ")
    assert "RuntimeWarning" not in ended.stderr
    check_record(folder, message, 5)


def test_what_comes_to_a_part_not_finite_is_blamed_on_where_it_began(start, messages, watched):
    """In the middle of the run, in the images of the second replica."""
    program, folder = start(4, SPLIT, "parallel.microbatches=2", script=watched, env={"FAULT": "2 4 infinite"})
    ended = program.finish()
    assert ended.returncode == 5, ended.stderr
    (message,) = messages(ended.stderr)
    assert message.startswith("dpnn: rank 2: conv1: its output is not finite (epoch 1, step 5: the loss is nan)")
    check_record(folder, message, 5)


def test_an_exception_in_a_step_of_one_part(start, messages, watched):
    program, folder = start(2, SPLIT, script=watched, env={"FAULT": "0 4 raise"})
    ended = program.finish()
    assert ended.returncode == 1
    (message,) = messages(ended.stderr)
    assert message == "dpnn: rank 0: ValueError: bad value"
    check_record(folder, message, 1)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SOAK), 3])
def test_a_part_that_is_killed(signalled, rank):
    code, _, folder, _ = signalled(4, rank, "SIGKILL", SPLIT)
    assert code not in (0, 75)
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SOAK), 1])
def test_a_part_that_is_silent_is_named(signalled, rank):
    """Stopped by SIGSTOP: nothing tells the other part but the time that it waits."""
    code, (message,), folder, _ = signalled(
        2, rank, "SIGSTOP", SPLIT, "parallel.stall_abort_s=5", "parallel.microbatches=2", limit_s=5 + LIMIT_S
    )
    assert code == 4
    assert message.startswith(f"dpnn: rank {1 - rank}: waited 5 s for ")
    assert f"part {rank}" in message or "losses" in message
    assert "raise parallel.stall_abort_s" in message
    check_record(folder, message, code)


def test_ctrl_c_stops_at_a_checkpoint(signalled):
    code, (message,), folder, _ = signalled(4, 1, "SIGINT", SPLIT)
    assert code == 75
    assert f"go on with: dpnn train --resume {folder}" in message
    assert len(list((folder / "checkpoints").iterdir())) == 1
