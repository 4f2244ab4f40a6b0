"""What is kept on disk for other runs: where, whether it can be, and that the processes of a node make it one by one.

A cache costs time where it is missing, and nothing else: who can't read it, write it or wait for it goes on without.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LONGEST_S = 120.0
"""How long a process waits for others of its node: for more files of kernels than there are."""
_PAUSE_S = 0.02


def folder() -> Path:
    """Where choices by timing are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dpnn")


def kernels_folder() -> Path:
    """Where CuPy keeps compiled kernels."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache"))


def trouble(path: Path) -> str:
    """Why nothing can be kept in a folder; empty where something can."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        return f"{path} can't be written ({error.strerror})"
    return ""


@contextmanager
def one_by_one(name: str, limit_s: float = _LONGEST_S) -> Iterator[bool]:
    """A block that one process of this user and node is in at a time; whether that is so.

    It isn't where the others took longer than `limit_s`, or no lock can be had. A process that dies lets go.
    """
    lock = os.path.join(tempfile.gettempdir(), f"dpnn-{os.getuid()}-{name}.lock")
    alone, descriptor, end = False, -1, time.monotonic() + limit_s
    with suppress(OSError):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    while descriptor >= 0 and not alone:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError:
            if time.monotonic() >= end:
                break
            time.sleep(_PAUSE_S)
    try:
        yield alone
    finally:
        if descriptor >= 0:
            os.close(descriptor)
