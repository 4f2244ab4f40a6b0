"""Downpour SGD goes on where a worker dies: real processes, killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from dpnn.comm.launch import command
from dpnn.comm.losses import survives
from tests.train.runs import TOLERANT, told, words

NETWORKS = Path(__file__).parent / "networks.py"
PROGRAMS = Path(__file__).parent / "programs"
DOWNPOUR = (
    f"model.name={NETWORKS}:plain", "optimizer.name=sgd", "train.global_batch=0", "train.replica_batch=7",
    "parallel.strategy=downpour", "parallel.stall_abort_s=20", "train.eval_every=0", "output.checkpoint_every=2",
)  # fmt: skip
LIMIT_S = 40

pytestmark = [pytest.mark.mpi, TOLERANT]


@pytest.fixture
def going(start_python, job, until_trained):
    """going(ranks, *settings) -> a run under `dpnn launch` that has taken its first steps, and its folder.

    Its batches are paced: 60 epochs take some seconds on any machine, longer than it takes until a death is known.
    """

    def start(ranks: int, *settings: str):
        made = job()
        line = ("launch", "-n", str(ranks), "train", made.path, *words(*DOWNPOUR, *settings))
        program = start_python(PROGRAMS / "launched.py", PROGRAMS / "watched.py", *line, env={"PACE": "0.005"})
        until_trained(program, made.out)
        return program, made.out

    return start


@pytest.mark.parametrize(
    ("ranks", "settings", "victims", "lost"),
    [
        (4, ("parallel.servers=1",), (1,), {1}),
        (4, ("parallel.servers=2", "parallel.n_push=3"), (0,), {0}),
        (4, ("parallel.servers=1", "parallel.fetch_ahead=0"), (2, 0), {0, 2}),
        (6, ("parallel.servers=2", "parallel.parts=2"), (3,), {1}),
    ],
    ids=["a worker", "the one that speaks for the run", "all but one", "a part of a replica"],
)
def test_the_others_take_every_step_that_is_left(going, python, ranks, settings, victims, lost):
    program, folder = going(ranks, "train.epochs=60", *settings)
    draw = random.Random(ranks * 10 + len(settings))
    for victim in victims:
        os.kill(program.pids()[victim], signal.SIGKILL)
        time.sleep(draw.uniform(0.0, 0.5))
    ended = program.finish(LIMIT_S)
    assert ended.returncode == 0, ended.stderr
    program.until_gone(LIMIT_S)
    events = told(folder, "event")
    assert {event["replica"] for event in events if event["event"] == "worker_lost"} == lost
    (start,), (end,) = told(folder, "start"), told(folder, "end")
    assert (end["exit"], end["steps"]) == (0, start["total_steps"])
    assert (folder / "checkpoints" / f"step-{end['steps']:09d}" / "info.h5").exists()
    assert python("-m", "dpnn", "eval", folder).returncode == 0


def test_a_spare_takes_no_part_until_a_worker_dies(going):
    program, folder = going(4, "train.epochs=60", "parallel.servers=1", "parallel.spares=1")
    time.sleep(0.5)
    assert not [event for event in told(folder, "event") if event["event"] == "spare_joined"]
    os.kill(program.pids()[0], signal.SIGKILL)
    ended = program.finish(LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode == 0, ended.stderr
    events = {event["event"]: event for event in told(folder, "event")}
    assert events["spare_joined"]["replica"] == 2
    (start,), (end,) = told(folder, "start"), told(folder, "end")
    assert (end["exit"], end["steps"]) == (0, start["total_steps"])


def test_a_spare_that_nobody_needs_ends_with_the_others(going):
    program, folder = going(3, "train.epochs=3", "parallel.servers=1", "parallel.spares=1")
    assert program.finish(LIMIT_S).returncode == 0
    assert not [event for event in told(folder, "event") if event["event"] == "spare_joined"]


def test_a_worker_that_is_stopped_for_ever_counts_as_dead(going):
    """And doesn't keep the job from ending."""
    program, folder = going(4, "train.epochs=60", "parallel.servers=1", "parallel.silence_s=4")
    os.kill(program.pids()[1], signal.SIGSTOP)
    ended = program.finish(2 * LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode == 0, ended.stderr
    (event,) = [event for event in told(folder, "event") if event["event"] == "worker_lost"]
    assert (event["rank"], event["reason"]) == (1, "it said nothing for 4 s")
    (start,), (end,) = told(folder, "start"), told(folder, "end")
    assert (end["exit"], end["steps"]) == (0, start["total_steps"])


def test_where_all_workers_die_the_job_ends_and_goes_on_from_a_checkpoint(going, python):
    program, folder = going(3, "train.epochs=400", "parallel.servers=1")
    while not list((folder / "checkpoints").glob("step-*")):
        time.sleep(0.02)
    for victim in (0, 1):
        os.kill(program.pids()[victim], signal.SIGKILL)
    ended = program.finish(LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode == 4, ended.stderr
    assert "all workers have died" in ended.stderr
    resumed = python("-m", "dpnn", "launch", "-n", "2", "train", "--resume", folder, *words("train.epochs=3"))
    assert resumed.returncode == 0, resumed.stderr


def test_where_a_server_dies_that_has_no_mirror_the_job_ends(going):
    program, _ = going(4, "train.epochs=4000", "parallel.servers=2", "parallel.mirror=false")
    os.kill(program.pids()[3], signal.SIGKILL)
    ended = program.finish(LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode == 4, ended.stderr


def test_an_error_on_one_worker_ends_that_one_alone(start_line, job, tmp_path):
    """At its 4th batch, of a kind that has nothing to do with the data."""
    made = job()
    line = command(4, ["train", str(made.path), *words(*DOWNPOUR, "train.epochs=20", "parallel.servers=1")],
                   (str(PROGRAMS / "watched.py"),), survives=True)  # fmt: skip
    ended = start_line(line, env={"FAULT": "1 3 raise"}).finish(LIMIT_S)
    assert "dpnn: rank 1: ValueError: bad value" in ended.stderr
    assert "dpnn: rank 1 ends, the others go on" in ended.stderr
    events = {event["event"]: event for event in told(made.out, "event")}
    assert events["worker_failed"]["rank"] == events["worker_lost"]["rank"] == 1
    (start,), (end,) = told(made.out, "start"), told(made.out, "end")
    assert (end["exit"], end["steps"]) == (0, start["total_steps"])


def test_who_may_not_die_says_so(monkeypatch):
    monkeypatch.delenv("OMPI_MCA_mpi_ft_enable", raising=False)
    assert not survives()
