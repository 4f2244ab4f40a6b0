"""Whatever goes wrong on one rank while it trains, the job ends on all within ten seconds, and one message says why.

Each fault really happens, in the middle of a run that would go on for minutes.
"""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from dpnn.observe import metrics

LIMIT_S = 10
LONG = ("--set", "train.epochs=1000", "--set", "train.eval_every=0")
DOWNPOUR = (
    f"model.name={Path(__file__).parent}/networks.py:plain", "train.global_batch=0", "train.replica_batch=16",
    "parallel.strategy=downpour", "parallel.servers=1", "output.checkpoint_every=1000",
    "optimizer.name=sgd", "optimizer.lr=0.01",
)  # fmt: skip


@pytest.fixture
def fails(start_mpirun, job, watched, messages):
    """fails(ranks, fault, *settings) -> (exit code, the one message, the run folder, stderr)."""

    def run(ranks, fault, *settings, limit_s=LIMIT_S):
        made = job()
        words = [word for setting in settings for word in ("--set", setting)]
        program = start_mpirun(ranks, "train", made.path, *LONG, *words, script=watched, env={"FAULT": fault})
        program.wait_for("fault: ")
        begin = time.monotonic()
        ended = program.finish(limit_s)
        program.until_gone(LIMIT_S)
        print(f"{fault}: ended on {ranks} ranks after {time.monotonic() - begin:.1f} s (limit {limit_s} s)")
        found = messages(ended.stderr)
        return ended.returncode, found, made.out, ended.stderr

    return run


def check_record(folder, message: str, code: int) -> None:
    """What is left of the run says why it ended; nothing was saved after it."""
    assert (folder / "failure.txt").read_text().startswith(message)
    (end,) = [line for line in metrics.read(folder / "metrics.jsonl") if line["kind"] == "end"]
    assert end["exit"] == code
    assert end["error"].startswith(message)


def test_an_exception_in_a_step(fails):
    code, (message,), folder, stderr = fails(3, "1 4 raise")
    assert code == 1
    assert message == "dpnn: rank 1: ValueError: bad value"
    assert stderr.count("in watched_next") == 1
    check_record(folder, message, code)


def test_a_shard_that_is_cut_while_it_is_read(fails, job, images, tmp_path):
    """The thread that reads finds it, on a rank; the others wait for that rank's gradients."""
    data = copied(images, tmp_path)
    cut = sorted((data / "train").glob("*.h5"))[1]
    code, (message,), folder, _ = fails(2, f"1 2 truncate {cut}", f"data.train={data}/train")
    assert code == 3
    assert message.startswith(("dpnn: rank 0: ", "dpnn: rank 1: "))
    assert str(cut) in message
    assert "copy the shard again, or pack the data again" in message
    check_record(folder, message, code)


def test_a_flipped_byte_in_a_block(mpirun, job, images, tmp_path, messages):
    """Only one rank reads the block, in its thread; it couldn't be known before training but by reading all data."""
    data = copied(images, tmp_path)
    shard = sorted((data / "train").glob("*.h5"))[0]
    flip(shard, where=5000)
    made = job(data=data)
    ended = mpirun(3, "train", made.path, *LONG, timeout=LIMIT_S + 20)
    assert ended.returncode == 3
    (message,) = messages(ended.stderr)
    assert "dpnn: rank" in message
    assert f"{shard}, x: the block of the samples" in message
    assert "is damaged (CRC32" in message
    assert "Traceback" not in ended.stderr
    check_record(made.out, message, 3)


def test_a_rank_that_is_killed(fails):
    code, _, folder, _ = fails(3, "1 4 SIGKILL")
    assert code not in (0, 75)
    assert list((folder / "checkpoints").iterdir()) == []


def test_a_loss_that_is_not_finite(mpirun, job, messages):
    """All ranks know it in the same step, and one says in which layer it began. No checkpoint is written after it."""
    made = job()
    ended = mpirun(2, "train", made.path, *LONG, "--set", "optimizer.lr=1e30", "--set", "output.checkpoint_every=10")
    assert ended.returncode == 5
    (message,) = ended.stderr.splitlines()[:1]
    assert messages(ended.stderr) == [message]
    assert "RuntimeWarning" not in ended.stderr
    assert message.startswith("dpnn: rank 0: ")
    assert "its output is not finite (epoch 1, step 2: the loss is " in message
    assert "lower optimizer.lr" in message
    assert list((made.out / "checkpoints").iterdir()) == []
    check_record(made.out, message, 5)


def test_what_is_not_finite_on_one_rank_is_blamed_on_that_rank(fails):
    """It reaches the other ranks with the sums of a synchronous BatchNorm, and they are not to blame."""
    code, (message,), folder, _ = fails(3, "1 4 infinite")
    assert code == 5
    assert message.startswith("dpnn: rank 1: conv1: its output is not finite (epoch 1, step 5: the loss is nan)")
    check_record(folder, message, code)


@pytest.fixture
def signalled(start_python, job, until_trained, messages):
    """signalled(rank, name, *settings) -> as `fails`, of three workers and a server: one of the ranks gets a signal.

    Started with `dpnn launch`.
    """

    def run(rank, name, *settings, limit_s=LIMIT_S):
        made = job()
        words = [word for setting in (*DOWNPOUR, *settings) for word in ("--set", setting)]
        program = start_python("-m", "dpnn", "launch", "-n", 4, "train", made.path, *LONG, *words)
        until_trained(program, made.out)
        os.kill(program.pids()[rank], signal.Signals[name])
        begin = time.monotonic()
        ended = program.finish(limit_s)
        print(f"{name} of rank {rank}: ended after {time.monotonic() - begin:.1f} s (limit {limit_s} s)")
        assert program.pids() == {}
        return ended.returncode, messages(ended.stderr), made.out, ended.stderr

    return run


@pytest.mark.mpi
def test_downpour_ends_when_its_only_server_is_killed(signalled):
    """What becomes of a job whose other ranks are killed: test_fault_table.py."""
    code, (message,), folder, _ = signalled(3, "SIGKILL")
    assert code not in (0, 75)
    assert f"go on with: dpnn train --resume {folder}" in message or (folder / "failure.txt").exists()
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.mark.mpi
def test_downpour_ends_when_a_server_is_silent(signalled):
    code, (message,), folder, _ = signalled(3, "SIGSTOP", "parallel.stall_abort_s=5", limit_s=5 + LIMIT_S)
    assert code == 4
    assert message.startswith(("dpnn: rank 0: waited 5 s for", "dpnn: rank 1: waited 5 s", "dpnn: rank 2: waited 5 s"))
    assert "raise parallel.stall_abort_s" in message
    check_record(folder, message, code)


def test_downpour_ends_when_nobody_is_left_but_a_silent_worker(fails):
    """It holds up nobody, but at the end its part of the data is missing."""
    settings = (*DOWNPOUR, "parallel.stall_abort_s=5", "train.epochs=100")  # so many that each worker gets some
    code, (message,), folder, _ = fails(4, "1 2 SIGSTOP", *settings, limit_s=30)
    assert code == 4
    assert "no replica has pushed anything for 5 s" in message
    assert "raise parallel.stall_abort_s" in message
    check_record(folder, message, code)


def test_downpour_ends_on_an_exception_in_a_worker(fails):
    code, (message,), folder, stderr = fails(4, "1 4 raise", *DOWNPOUR)
    assert code == 1
    assert message == "dpnn: rank 1: ValueError: bad value"
    assert stderr.count("in watched_next") == 1
    check_record(folder, message, code)


def test_downpour_ends_when_a_loss_is_not_finite(fails):
    """On one worker: that one says in which layer it began, and none of its numbers reaches a server."""
    code, (message,), folder, stderr = fails(4, "1 4 infinite", *DOWNPOUR)
    assert code == 5
    assert message.startswith("dpnn: rank 1: conv1: its output is not finite (step ")
    assert "lower optimizer.lr" in message
    assert "RuntimeWarning" not in stderr
    assert list((folder / "checkpoints").iterdir()) == []
    check_record(folder, message, code)


def copied(images, folder):
    """The data, so that they may be damaged."""
    return shutil.copytree(images, folder / "data")


def flip(path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
