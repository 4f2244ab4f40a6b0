"""Synchronous training goes on where a rank dies: real processes, killed at random moments."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from mpi4py import MPI

from dpnn.observe import metrics

NETWORKS = Path(__file__).parent / "networks.py"
TOLERANT = pytest.mark.skipif(
    "Open MPI v5" not in MPI.Get_library_version(), reason="only Open MPI 5 tells of processes that have died"
)
LIMIT_S = 60
SETTINGS = (
    f"model.name={NETWORKS}:plain", "train.global_batch=24", "train.eval_every=0", "parallel.stall_abort_s=20",
    "optimizer.name=momentum", "output.checkpoint_every=2", "backend.threads=1",
)  # fmt: skip

pytestmark = [pytest.mark.mpi, TOLERANT]


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def read(folder: Path, kind: str) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [line for line in metrics.read(path) if line["kind"] == kind] if path.exists() else []


def events(folder: Path, name: str) -> list[dict]:
    return [event for event in read(folder, "event") if event["event"] == name]


@pytest.fixture
def going(start_python, job):
    """going(ranks, *settings) -> a run under `dpnn launch --with-faults` that has taken its first steps; its folder."""

    def start(ranks: int, *settings: str, name: str = "job"):
        made = job(name, out=name)
        line = ("-m", "dpnn", "launch", "--with-faults", "-n", str(ranks), "train", made.path)
        program = start_python(*line, *words(*SETTINGS, *settings))
        end = time.monotonic() + 60
        while not read(made.out, "step"):
            assert time.monotonic() < end, program.stderr
            assert program.process.poll() is None, program.stderr
            time.sleep(0.02)
        return program, made.out

    return start


def ended_well(program, folder: Path) -> None:
    """The run has ended by itself, with all its steps."""
    ended = program.finish(LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode == 0, ended.stderr
    (start,), (end,) = read(folder, "start"), read(folder, "end")
    assert (end["exit"], end["steps"]) == (0, start["total_steps"])
    assert {line["step"] for line in read(folder, "step")} == set(range(1, end["steps"] + 1))


@pytest.mark.parametrize("seed", range(3))
def test_who_is_left_takes_every_step(going, seed):
    draw = random.Random(seed)
    program, folder = going(4, "train.epochs=60")
    pids = program.pids()
    time.sleep(draw.uniform(0.0, 1.0))
    victim = draw.randrange(4)
    os.kill(pids[victim], signal.SIGKILL)
    ended_well(program, folder)
    (event,) = events(folder, "worker_lost")
    assert (event["ranks"], event["left"]) == ([victim], 3)
