"""What docs/faults.md says becomes of a job whose rank is killed, by how it was started: each cell, tried.

Those of whole machines, and of `srun`, are in tests/cluster.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

from dpnn.comm.launch import command
from tests.train.runs import told, words

pytestmark = [pytest.mark.mpi, pytest.mark.smoke]

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
NETWORKS = Path(__file__).parent / "networks.py"
LIMIT_S = 90
PLAIN = (f"model.name={NETWORKS}:plain", "optimizer.name=sgd", "train.eval_every=0")
DOWNPOUR = (
    *PLAIN, "train.global_batch=0", "train.replica_batch=16", "parallel.strategy=downpour", "parallel.servers=2",
)  # fmt: skip
VICTIMS = {
    "a worker of `downpour`": (4, 1, DOWNPOUR),
    "a server of `downpour`": (4, 3, DOWNPOUR),
    "a rank of `allreduce`, `average`": (3, 1, PLAIN),
}
"""By column: the number of ranks, the one that is killed, settings."""
AVERAGE = ("parallel.strategy=average", "parallel.every=4")


def library() -> str:
    """The MPI that this environment loads, as the table names it."""
    version = MPI.Get_library_version()
    return "MPICH" if "MPICH" in version else f"Open MPI {version.partition('Open MPI v')[2][0]}"


def cell(started: str, mpi: str, column: str) -> str:
    """What the table says."""
    text = PAGE.read_text().partition("## A process is killed\n")[2].partition("\n## ")[0]
    rows = [[field.strip() for field in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head = rows[0]
    found = [row for row in rows if f"`{started}`" in row[0].split(", ") and row[1] == mpi]
    assert len(found) == 1, (started, mpi, found)
    return found[0][head.index(column)]


@pytest.fixture
def killed(start_line, job, until_trained):
    """killed(started, column, ...): the job whose rank is killed after its first steps does what the table says."""

    def run(started: str, column: str, epochs: int, *more: str) -> str:
        ranks, victim, settings = VICTIMS[column]
        made, more = job(), (f"train.epochs={epochs}", *more)
        args = ["train", str(made.path), *words(*settings, *more)]
        by_launch = [sys.executable, "-m", *started.split(), "-n", str(ranks), *args]
        program = start_line(command(ranks, args) if started == "mpirun" else by_launch)
        until_trained(program, made.out)
        os.kill(program.pids()[victim], signal.SIGKILL)
        ended = program.finish(LIMIT_S)
        program.until_gone(LIMIT_S)
        ends = told(made.out, "end")
        if ends and ends[-1]["exit"] == 0:
            assert {event["event"] for event in told(made.out, "event")} & {"worker_lost", "server_lost"}
            assert ends[-1]["steps"] == told(made.out, "start")[0]["total_steps"]
            assert ended.returncode == 0, ended.stderr
            return "goes on"
        return f"ends, {ended.returncode}"

    def check(started: str, column: str, *more: str) -> None:
        """That it is what the table says."""
        said = cell(started, library(), column)
        assert run(started, column, 100 if said == "goes on" else 10_000, *more) == said

    return check


WAYS = ["dpnn launch", "mpirun", *(["dpnn launch --with-faults"] if library() == "Open MPI 5" else [])]


@pytest.mark.parametrize(("started", "column"), [
    pytest.param(way, column, marks=pytest.mark.soak if "faults" in way and "downpour" in column else ())
    for way in WAYS for column in VICTIMS
])  # fmt: skip
def test_a_job_whose_rank_is_killed_does_what_the_table_says(killed, started, column):
    killed(started, column)


@pytest.mark.soak
@pytest.mark.parametrize("started", WAYS)
def test_so_does_one_that_averages(killed, started):
    killed(started, "a rank of `allreduce`, `average`", *AVERAGE)
