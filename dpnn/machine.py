"""What this machine lets its processes have: memory and cores, and a GPU's driver.

Limits are set on groups of processes, one inside another: control groups (of version 1 or 2), the job of a batch
system, the machine itself. A process names the groups that it is in, the same as every other process of such a group;
so ranks that compare their names see who shares what.
"""

import ctypes
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

Limits = Mapping[str, float]
"""Of the groups that a process is in, by their names."""

_PROCESS = Path("/proc/self")
_MIB = 1 << 20


@dataclass(frozen=True)
class Share:
    """What a process has of the limit that leaves it least; `group`: whose limit; `among`: how many share it."""

    amount: float
    group: str
    among: int = 1


UNLIMITED = Share(math.inf, "")


def share(limits: Sequence[Limits], rank: int) -> Share:
    """The share of `rank`, where limits[r] are those of rank r: all ranks in a group have equal shares of its limit."""
    shares = []
    for group, limit in limits[rank].items():
        among = sum(group in others for others in limits)
        shares.append(Share(limit / among, group, among))
    return min(shares, key=lambda one: one.amount, default=UNLIMITED)


def memory_limits(environ: Mapping[str, str] = os.environ) -> Limits:
    """Bytes that each of this process's groups may have; the machine's own are always among them."""
    limits = {"the machine": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))}
    limits |= _of_groups("memory", _memory_of)
    limits |= _of_slurm(environ)
    return limits


def core_limits() -> Limits:
    """Cores that each of this process's groups may keep busy at a time, as far as they are limited.

    On which cores a process may run (its affinity) is another limit.
    """
    return _of_groups("cpu", _cores_of)


def processor() -> str:
    """The kind of processor, as a part of a file's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "CPU part"):
                return re.sub(r"[^A-Za-z0-9.]+", "-", value.strip())
    return platform.machine()


def has_gpu_driver() -> bool:
    """Whether NVIDIA's driver is here: without it no GPU can be used, and nothing needs to look for one."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _of_slurm(environ: Mapping[str, str]) -> Limits:
    """Of the job on this node, which Slurm may enforce without control groups. MiB; 0 stands for all of the node."""
    with suppress(KeyError, ValueError):
        job = f"job {environ['SLURM_JOB_ID']} of Slurm"
        if "SLURM_MEM_PER_NODE" in environ:
            mib = int(environ["SLURM_MEM_PER_NODE"])
        else:
            mib = int(environ["SLURM_MEM_PER_CPU"]) * int(environ["SLURM_CPUS_ON_NODE"])
        return {job: mib * float(_MIB)} if mib > 0 else {}
    return {}


def _of_groups(kind: str, limit_of: Callable[[Path], float]) -> Limits:
    """Of control groups, by their folders and these folders' numbers, which containers don't share."""
    limits = {}
    for folder in _folders(kind):
        with suppress(OSError, ValueError):
            limits[f"control group {folder} ({folder.stat().st_ino})"] = limit_of(folder)
    return limits


def _memory_of(folder: Path) -> float:
    """ValueError where there is no limit ("max"), OSError where this is no group of memory."""
    with suppress(FileNotFoundError):
        return float(int((folder / "memory.max").read_text()))
    return float(int((folder / "memory.limit_in_bytes").read_text()))


def _cores_of(folder: Path) -> float:
    """Likewise: "max", and -1 in version 1, stand for no limit."""
    with suppress(FileNotFoundError):
        quota, period = map(int, (folder / "cpu.max").read_text().split())
        return quota / period
    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    if quota < 0:
        raise ValueError("no limit")
    return quota / period


def _folders(kind: str) -> Iterator[Path]:
    """The folders of this process's control groups that may limit `kind`, each with all those around it."""
    try:
        lines = [line.split(":", 2) for line in (_PROCESS / "cgroup").read_text().splitlines()]
        mounts = (_PROCESS / "mountinfo").read_text().splitlines()
    except OSError:
        return
    groups = {name: path for _, names, path in lines for name in names.split(",")}  # version 2 has no names
    for mount in mounts:
        where, _, what = mount.partition(" - ")
        *_, root, point = where.split()[:5]
        system, _, options = what.split()[:3]
        if system == "cgroup2":
            group = groups.get("")
        else:
            group = groups.get(kind) if system == "cgroup" and kind in options.split(",") else None
        if group is None:
            continue
        # A container may see only its own part of the tree; where even that isn't known, its top is taken.
        inside = PurePosixPath(group)
        inner = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
        folder = Path(point, inner)
        yield from (level for level in (folder, *folder.parents) if level.is_relative_to(point))
