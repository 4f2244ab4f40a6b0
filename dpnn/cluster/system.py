"""What the machine allows: memory, cores, room for files, locks, and the limits that a shell or a site has set."""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dpnn import caches
from dpnn.cluster.findings import Finding, State, judged
from dpnn.comm.node import SHARED_MEMORY
from dpnn.machine import core_limits, memory_limits, share

LEAST_FILES = 256
"""Files that a rank keeps open: 2 x 64 shards (data/reader.py), logs, libraries, and some for MPI."""
LEAST_SHARED = 1 << 30
"""Bytes in the shared-memory file system below which a network of a few 10 M parameters has no room there."""
LEAST_MEMORY = 1 << 29
"""Bytes of a node below which not even a small network and its data have room."""
LEAST_TEMPORARY = 64 << 20
"""Bytes that MPI wants for its own files, and often for what ranks of a node share."""
LEAST_WRITTEN = 1 << 16
LEAST_STACK = 1 << 20
"""Bytes of a thread's stack below which libraries written in C crash."""
LEAST_THREADS = 256
INFINIBAND = Path("/sys/class/infiniband")


def findings(data: Path) -> Iterator[Finding]:
    """All of them. `data`: a folder on the file system where the data lie."""
    yield from _memory()
    yield from _cores()
    yield from _shared_memory(SHARED_MEMORY)
    yield from _temporary(os.environ.get("TMPDIR") or "/tmp")
    yield from _file_system(data)
    yield from _cache(caches.folder())
    yield from _limits()
    yield from _infiniband()


def _memory() -> Iterator[Finding]:
    found = share([memory_limits()], 0)
    text = f"{found.amount / 2**30:.1f} GiB for all ranks here, by {found.group}"
    remedy = "ask the batch system for more (--mem), or give the container more (--memory)"
    yield judged("memory", "ok" if found.amount >= LEAST_MEMORY else "wrong", text, remedy)


def _cores() -> Iterator[Finding]:
    cores, limit = len(os.sched_getaffinity(0)), share([core_limits()], 0)
    text = f"{cores} of {os.cpu_count()}"
    if limit.amount >= cores:
        yield Finding("cores", "ok", text)
        return
    text = f"{text}, of which {limit.group} keeps {limit.amount:g} busy at a time; ranks take their share of these"
    remedy = "ask for a whole core a rank at least (a container's --cpus)"
    yield judged("cores", "ok" if limit.amount >= 1 else "attention", text, remedy)


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
    remedy = (
        f"a container's --shm-size, or mount -o remount,size=... {folder}; ranks of a node sum by MPI where it is full"
    )
    text = f"{room / 2**30:.1f} GiB free in {folder}"
    yield judged(what, "ok" if room >= LEAST_SHARED else "attention", text, remedy)


def _temporary(folder: str) -> Iterator[Finding]:
    """Where MPI has its own files."""
    what, remedy = "temporary files", "make room there, or name another folder of the node's own in TMPDIR"
    try:
        with tempfile.TemporaryFile(prefix="dpnn-", dir=folder) as file:
            file.write(b"\0" * LEAST_WRITTEN)
        room = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(what, "wrong", f"{folder} can't be written ({error.strerror}): MPI can't start", remedy)
        return
    text = f"{room / 2**20:,.0f} MiB free in {folder}"
    yield judged(what, "ok" if room >= LEAST_TEMPORARY else "attention", text, remedy)


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


def _cache(folder: Path) -> Iterator[Finding]:
    unkept = caches.trouble(folder)
    remedy = "name a folder that you may write in XDG_CACHE_HOME: convolutions are timed anew whenever a run starts"
    yield judged("cache", "attention" if unkept else "ok", unkept or f"choices are kept in {folder}", remedy)


def _limits() -> Iterator[Finding]:
    """What `ulimit` says of a process; a batch system may set others inside a job."""
    files, threads, stack, memory = (
        _soft(kind)
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_STACK, resource.RLIMIT_AS)
    )
    state: State = "ok" if files >= LEAST_FILES else "wrong"
    text = f"a process may open {files:g}" + ("" if state == "ok" else f", and a rank opens up to {LEAST_FILES}")
    yield judged("open files", state, text, f"ulimit -n {LEAST_FILES} or more, in the batch script too")
    state = "ok" if threads >= LEAST_THREADS or os.geteuid() == 0 else "attention"
    yield judged(
        "threads", state, f"a user may have {threads:g}", "ulimit -u: a rank has two for each of its cores, and more"
    )
    state = "ok" if stack >= LEAST_STACK else "attention"
    text = f"of {stack / 1024:,.0f} KiB" if stack < float("inf") else "has no limit"
    yield judged("stack", state, text, "ulimit -s 8192: libraries crash where theirs is too small")
    if memory < float("inf"):
        text = f"a process may have {memory / 2**30:.1f} GiB of them, and libraries reserve many more than they use"
        yield Finding("addresses", "attention", text, "ulimit -v unlimited; limit memory by --mem or a control group")


def _infiniband() -> Iterator[Finding]:
    if not has_infiniband():
        return
    locked = _soft(resource.RLIMIT_MEMLOCK)
    fine = locked == float("inf")
    text = f"locked memory {'has no limit' if fine else f'is limited to {locked / 1024:,.0f} KiB'}"
    remedy = "ulimit -l unlimited, by the administrator: MPI falls back to TCP otherwise"
    yield judged("InfiniBand", "ok" if fine else "attention", text, remedy)


def _soft(kind: int) -> float:
    """A limit of this process; infinity where there is none."""
    limit, _ = resource.getrlimit(kind)
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def has_infiniband() -> bool:
    """Whether this machine has such a device."""
    return INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
