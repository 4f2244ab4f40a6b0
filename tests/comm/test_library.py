"""A launcher that doesn't belong to the loaded MPI library starts lone ranks: they are refused."""

import sys
from pathlib import Path

import pytest

from dpnn.comm.library import Promise, promise, version

pytestmark = [pytest.mark.mpi, pytest.mark.smoke]

LONE = Path(__file__).parent / "programs" / "lone.py"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environ", "promised"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, Promise("Open MPI's mpirun", 4, 3)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, Promise("MPICH's mpirun (or srun --mpi=pmi2)", 2, 0)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, Promise("srun", 8, 5)),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "PMI_SIZE": "8", "PMI_RANK": "7"}, 8),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
    ],
)
def test_the_innermost_launcher_says_what_it_started(environ, promised):
    found = promise(environ)
    assert (found.size if found and isinstance(promised, int) else found) == promised


def test_lone_ranks_of_a_foreign_launcher_are_refused_by_one_voice(start_python):
    ranks = [start_python(LONE, env={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank)}) for rank in range(2)]
    first, second = (rank.finish() for rank in ranks)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.startswith("dpnn: srun started 2 ranks, but the MPI library loaded here (")
    assert "dpnn launch -n 2" in first.stderr
    assert second.stderr == ""
    assert first.stdout == second.stdout == ""


def test_the_right_launcher_is_not(mpirun):
    ended = mpirun(2, script=LONE)
    assert ended.returncode == 0
    assert ended.stdout.count("size 2") == 2


def test_without_a_launcher_a_rank_is_alone(python):
    ended = python(LONE)
    assert (ended.returncode, ended.stdout) == (0, "size 1\n")


def test_the_mpirun_of_another_mpi_is_refused(start_line):
    """For real, where `make test` has made an environment for the other MPI beside this one."""
    foreign = ROOT / (".venv-mpich" if "Open MPI" in version() else ".venv") / "bin" / "mpirun"
    if not foreign.exists():
        pytest.skip("only one MPI is installed here; `make setup MPI=mpich` installs a second beside it")
    env = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ended = start_line([str(foreign), "-n", "2", sys.executable, str(LONE)], env=env).finish()
    assert ended.returncode == 2
    assert len([line for line in ended.stderr.splitlines() if line.startswith("dpnn: ")]) == 1
    assert "size" not in ended.stdout
