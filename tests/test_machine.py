"""Limits on memory and cores are found where the system sets them, and shared among the ranks they hold for."""

import os
import sys
from pathlib import Path

import pytest

from dpnn import machine
from dpnn.machine import UNLIMITED, Share, core_limits, memory_limits, share

GIB = 1 << 30
LOOK = "from dpnn import machine as m; found = m.share([m.{}()], 0); print(found.amount, found.group)"
"""What a process in a group says of itself."""


@pytest.fixture
def process(tmp_path, monkeypatch):
    """process(cgroup, mounts): what /proc/self says of this process's groups."""

    def say(cgroup: str, *mounts: str) -> None:
        lines = [f"30 20 0:{number} {mount}" for number, mount in enumerate(mounts)]
        (tmp_path / "cgroup").write_text(cgroup)
        (tmp_path / "mountinfo").write_text("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(machine, "_PROCESS", tmp_path)

    return say


@pytest.fixture
def group(tmp_path):
    """group(path, **files) -> a folder of a control group."""

    def make(path: str, **files: str) -> Path:
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text + "\n")
        return folder

    return make


def limit_of(limits, folder):
    (found,) = [limit for name, limit in limits.items() if f" {folder} " in name]
    return found


def test_groups_of_version_2_limit_memory_and_cores_at_every_level(process, group):
    top = group("sys")
    outer = group("sys/job", memory__max="max", cpu__max="400000 100000")
    inner = group("sys/job/step", memory__max=str(3 * GIB), cpu__max="max 100000")
    process("0::/job/step\n", f"/ {top} rw - cgroup2 cgroup2 rw")
    assert limit_of(memory_limits({}), inner) == 3 * GIB
    assert limit_of(core_limits(), outer) == 4
    assert len(core_limits()) == 1
    assert share([memory_limits({})], 0).amount == 3 * GIB


def test_groups_of_version_1_are_found_by_what_they_limit(process, group):
    memory, cores = group("memory"), group("cpu")
    inner = group("memory/a/b", memory__limit_in_bytes=str(2 * GIB))
    group("memory/a", memory__limit_in_bytes=str(GIB))
    group("cpu/c", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    group("cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    process(
        "5:memory:/a/b\n4:cpuacct,cpu:/c\n0::/\n",
        f"/ {memory} rw - cgroup cgroup rw,memory",
        f"/ {cores} rw - cgroup cgroup rw,cpuacct,cpu",
    )
    assert limit_of(memory_limits({}), inner) == 2 * GIB
    assert share([memory_limits({})], 0) == Share(GIB, next(name for name in memory_limits({}) if "memory/a (" in name))
    assert share([core_limits()], 0).amount == 1.5


@pytest.mark.parametrize("root", ["/docker/1", "/elsewhere"])
def test_a_container_that_sees_only_its_own_groups_finds_them(process, group, root):
    top = group("sys", memory__max=str(GIB))
    process("0::/docker/1\n", f"{root} {top} rw - cgroup2 cgroup2 rw")
    assert limit_of(memory_limits({}), top) == GIB


def test_without_groups_the_machine_is_the_limit(process, tmp_path):
    process("")
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_limits({}) == {"the machine": whole}
    assert core_limits() == {}
    assert share([core_limits()], 0) == UNLIMITED
    (tmp_path / "cgroup").unlink()
    assert memory_limits({}) == {"the machine": whole}


@pytest.mark.parametrize(
    ("environ", "mib"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 4096),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "8"}, 4000),
        ({"SLURM_MEM_PER_CPU": "500"}, None),
        ({"SLURM_MEM_PER_NODE": "all"}, None),
        ({}, None),
    ],
)
def test_slurm_says_what_a_job_may_have_on_a_node(environ, mib):
    found = memory_limits({"SLURM_JOB_ID": "7", **environ})
    assert found.get("job 7 of Slurm") == (None if mib is None else mib * 2**20)


def test_ranks_share_the_limits_that_hold_for_several_of_them():
    """Two containers on one machine, the second of two ranks; the first may have little."""
    one, other = {"machine": 90.0, "a": 20.0}, {"machine": 90.0, "b": 80.0}
    assert [share([one, other, other], rank) for rank in range(3)] == [
        Share(20.0, "a"),
        Share(30.0, "machine", 3),
        Share(30.0, "machine", 3),
    ]


@pytest.mark.parametrize(
    ("kind", "limits", "ask", "amount"),
    [
        ("memory", {"limit_in_bytes": GIB}, "memory_limits", GIB),
        ("cpu", {"cfs_quota_us": 130000, "cfs_period_us": 100000}, "core_limits", 1.3),
    ],
)
def test_a_limit_that_the_system_keeps_is_found(start_in_group, kind, limits, ask, amount):
    ended = start_in_group(kind, limits, sys.executable, "-c", LOOK.format(ask)).finish()
    assert ended.stdout.startswith(f"{float(amount)} control group /sys/fs/cgroup/{kind}"), ended
