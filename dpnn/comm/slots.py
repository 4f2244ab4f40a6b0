"""Where each rank of a node stands, in a file that they share: what is left of a rank that can't speak any more."""

import fcntl
import mmap
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mpi4py import MPI

_TEXT = 160
"""Bytes of a text in a slot; what is longer is cut."""
_SLOT = Struct(f"<5q2d{_TEXT}s{_TEXT}s")
_DUE = Struct("<d")
_HEAD = 64
"""Bytes before the first slot: when what is one rank's business is due again."""


class Place(NamedTuple):
    """Where a rank stood when its watchdog last looked. Times are the node's clock's, in seconds (time.time)."""

    rank: int
    pid: int
    space: int
    """Of process numbers: that of a container isn't that of another."""
    epoch: int
    step: int
    seen: float
    """When that was."""
    since: float
    """When it began to wait, or has last moved."""
    whom: str
    """It waits for; empty where it doesn't."""
    doing: str

    def pack(self) -> bytes:
        """In a fixed number of bytes."""
        *numbers, whom, doing = self
        return _SLOT.pack(*numbers, whom.encode()[:_TEXT], doing.encode()[:_TEXT])

    @classmethod
    def unpack(cls, packed: bytes) -> "Place":
        """What `pack` has made."""
        *numbers, whom, doing = _SLOT.unpack(packed)
        return cls(*numbers, *(text.rstrip(b"\0").decode(errors="ignore") for text in (whom, doing)))


def shared_file(node: "MPI.Comm", flags: int) -> int:
    """A descriptor of a file that the ranks of a node share, already without a name, so that none has to remove it.

    -1 where the folder for temporary files can't be written. Collective over `node`, and blocking.
    """
    name, descriptor = "", -1
    if node.rank == 0:
        with suppress(OSError):
            made, name = tempfile.mkstemp(prefix="dpnn-")
            os.close(made)
    name = node.bcast(name)
    with suppress(OSError):
        descriptor = os.open(name, flags)
    node.barrier()
    if node.rank == 0:
        with suppress(OSError):
            os.unlink(name)
    return descriptor


class Slots:
    """A slot for each rank of a node. Where there can be no such file, each rank has a file of its own."""

    def __init__(self, node: "MPI.Comm") -> None:
        """Collective over `node`, and blocking."""
        nbytes = _HEAD + node.size * _SLOT.size
        self._file = shared_file(node, os.O_RDWR)
        try:
            os.posix_fallocate(self._file, 0, nbytes)  # no write can fail later, for want of room
        except OSError:
            self._file = os.memfd_create("dpnn-slots")
            os.truncate(self._file, nbytes)
        self._memory = mmap.mmap(self._file, nbytes)
        self._starts = range(_HEAD, nbytes, _SLOT.size)
        self._mine = self._starts[node.rank]

    def close(self) -> None:
        """No more is written, or read."""
        self._memory.close()
        os.close(self._file)

    def write(self, place: Place) -> None:
        """This rank's place."""
        self._memory[self._mine : self._mine + _SLOT.size] = place.pack()

    def read(self) -> list[Place]:
        """The places of all ranks of the node that have written theirs."""
        places = [Place.unpack(self._memory[at : at + _SLOT.size]) for at in self._starts]
        return [place for place in places if place.pid]

    def due(self, business: int, period_s: float) -> bool:
        """Whether this rank is to do now what one rank of the node does; then none will for so many seconds."""
        with suppress(OSError):  # where another is just asking, that one may do it
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, _HEAD)
            try:
                now, at = time.monotonic(), business * _DUE.size
                if now < _DUE.unpack_from(self._memory, at)[0]:
                    return False
                _DUE.pack_into(self._memory, at, now + period_s)
                return True
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN, _HEAD)
        return False


def here() -> int:
    """The number of the space that this process's number belongs to."""
    return os.stat("/proc/self/ns/pid").st_ino


def state_of(pid: int, proc: Path = Path("/proc")) -> str:
    """What keeps a process of this node from getting on, as far as the system knows; empty where nothing does."""
    try:
        main = _state(proc / str(pid))
        if main in "ZX":
            return "dead"
        if main in "Tt":
            return "stopped (SIGSTOP)" if main == "T" else "stopped by a debugger"
        if "D" in map(_state, (proc / str(pid) / "task").iterdir()):
            return "blocked in the file system"
    except OSError:
        return "" if (proc / str(pid)).exists() else "dead"
    return ""


def _state(process: Path) -> str:
    """One letter (man 5 proc). A thread that ended meanwhile counts as running."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        if process.parent.name == "task":
            return "R"
        raise
