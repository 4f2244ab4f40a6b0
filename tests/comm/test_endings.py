"""Whatever happens on one rank, the job ends on all, with the right code and one message. Each really happens."""

import os
import signal
from pathlib import Path

import pytest
from mpi4py import MPI

from dpnn.comm.launch import command

pytestmark = pytest.mark.mpi

ENDING = Path(__file__).parent / "programs" / "ending.py"
PATIENT, IMPATIENT = 1000, 2
"""Seconds that a rank waits for another: far beyond the test's limit, or the very thing that is tested."""


def messages(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("dpnn: ")]


@pytest.mark.parametrize(
    ("way", "code", "message"),
    [
        ("exception", 1, "dpnn: rank 2: ValueError: bad value"),
        ("data_error", 3, "dpnn: rank 2: shard 3 is truncated"),
        pytest.param("thread", 3, "dpnn: rank 2: shard 4 is truncated", marks=pytest.mark.smoke),
        ("thread_exception", 1, "dpnn: rank 2: KeyError: 'absent'"),
        ("sys_exit", 3, "dpnn: rank 2: ended by sys.exit(3) while the job was running"),
        ("interrupt", 130, "dpnn: rank 2: interrupted (SIGINT)"),
        ("agree", 3, "dpnn: rank 1: shard 1 is damaged"),
        ("first", 3, "dpnn: no such folder"),
    ],
)
def test_a_failure_on_one_rank_ends_all_with_one_message(mpirun, way, code, message):
    ended = mpirun(3, way, PATIENT, script=ENDING)
    assert ended.returncode == code
    assert messages(ended.stderr) == [message]


def test_the_traceback_of_the_unforeseen_is_shown_once(mpirun):
    ended = mpirun(3, "exception", PATIENT, script=ENDING)
    assert ended.stderr.count('raise ValueError("bad value")') == 1


def test_ranks_that_fail_at_once_speak_with_one_voice(mpirun):
    ended = mpirun(4, "everyone", PATIENT, script=ENDING)
    assert ended.returncode == 3
    (message,) = messages(ended.stderr)
    assert message in [f"dpnn: rank {rank}: shard {rank} is damaged" for rank in range(4)]


@pytest.mark.parametrize("way", ["silent", "stop"])
def test_a_rank_that_never_sends_is_found_by_the_limit(mpirun, way):
    """It sleeps, or is stopped by SIGSTOP. The two that wait reach the limit together; one of them speaks."""
    ended = mpirun(3, way, IMPATIENT, script=ENDING)
    assert ended.returncode == 4
    (message,) = messages(ended.stderr)
    assert "waited 2 s for a message of rank 2" in message


def test_a_rank_that_leaves_while_others_work_is_found_by_the_limit(mpirun):
    """It waits for them at the door, and they for its message."""
    ended = mpirun(3, "leave", IMPATIENT, script=ENDING)
    assert ended.returncode == 4
    (message,) = messages(ended.stderr)
    assert "waited 2 s for" in message


def test_a_killed_rank_takes_the_job_along(mpirun):
    ended = mpirun(3, "kill", PATIENT, script=ENDING)
    assert ended.returncode != 0


def test_a_rank_killed_from_outside_takes_the_job_along(start_mpirun):
    job = start_mpirun(3, "silent", PATIENT, script=ENDING)
    job.wait_for("working", times=3)
    pids = job.pids()
    assert sorted(pids) == [0, 1, 2]
    os.kill(pids[1], signal.SIGKILL)
    assert job.finish().returncode != 0
    assert job.pids() == {}


@pytest.mark.parametrize(("way", "code"), [("well", 0), ("code", 75)])
def test_a_job_that_ends_well_says_nothing(mpirun, way, code):
    ended = mpirun(3, way, PATIENT, script=ENDING)
    assert ended.returncode == code
    assert messages(ended.stderr) == []


def test_alone_an_error_reaches_the_command(python):
    ended = python(ENDING, "data_error", PATIENT)
    assert ended.returncode == 3
    assert messages(ended.stderr) == ["dpnn: shard 3 is truncated"]


def test_alone_a_thread_that_dies_ends_the_process(python):
    ended = python(ENDING, "thread", PATIENT)
    assert ended.returncode == 3
    assert messages(ended.stderr) == ["dpnn: shard 4 is truncated"]


@pytest.mark.skipif("Open MPI v5" not in MPI.Get_library_version(), reason="only Open MPI 5 survives deaths")
def test_where_deaths_are_survived_nobody_waits_for_who_dies_when_all_have_met(start_line):
    """Three of five do, one after the other: Open MPI's MPI_Finalize mostly waits for one of them for ever."""
    line = command(5, ["killed at last", str(PATIENT)], (str(ENDING),), survives=True)
    assert start_line(line).finish(20).returncode == 0
