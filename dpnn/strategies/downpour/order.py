"""The order in which a server served its workers: all that an asynchronous run depends on beside its job.

A server's file is a row of uint32: the replica times 8 plus what was served. With it `dpnn train --replay` does the run
again, bit for bit: the servers serve in that order, whatever arrives first.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dpnn.errors import DataError, RankError

STOP = 7
"""In place of a kind: from here on the run stops."""
_KEPT = 1 << 12
"""Entries that are written together."""


class Order:
    """First come, first served; written down where `path` is given."""

    replays = False

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._served = path, 0
        self._kept: list[int] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")

    def pick(self, ready: deque[int], kind: Callable[[int], int]) -> int | None:
        """Which of the replicas that are ready is served next, taken out; None: nobody yet. `kind`: what it wants."""
        return ready.popleft() if ready else None

    def follows(self, replica: int, kind: int) -> bool:
        """Whether this may be served right after what was picked last, which is being served."""
        return True

    def stops(self, asked: bool) -> bool:
        """Whether the run stops now."""
        if asked:
            self.served(0, STOP)
        return asked

    def served(self, replica: int, kind: int) -> None:
        """This was done."""
        if self._path is not None:
            self._kept.append(replica * 8 + kind)
            if len(self._kept) >= _KEPT:
                self.flush()

    def flush(self) -> None:
        """Write what is kept back. DataError where the disk doesn't take it."""
        if self._path is None or not self._kept:
            return
        try:
            with self._path.open("ab") as file:
                file.write(np.array(self._kept, np.uint32).tobytes())
        except OSError as error:
            raise DataError(
                f"{self._path} can't be written ({error.strerror}); make room there, or leave parallel.record out"
            ) from error
        self._kept.clear()


class Replay(Order):
    """The order of an earlier run. DataError where its file can't be read."""

    replays = True

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._from = path
        try:
            self._wanted = deque(np.fromfile(path, np.uint32).tolist())
        except OSError as error:
            raise DataError(
                f"{path} can't be read ({error.strerror}): the run was not recorded, or on another number of servers; "
                "record one with parallel.record = true"
            ) from error

    def pick(self, ready: deque[int], kind: Callable[[int], int]) -> int | None:
        """Who comes next in the file, once it is ready. RankError where the run goes on behind the file's end."""
        for replica in ready:
            if not self._wanted:
                raise RankError(f"the run goes on after all that {self._from} holds: it was cut short; nothing is lost")
            if self._wanted[0] == replica * 8 + kind(replica):
                ready.remove(replica)
                return replica
        return None

    def follows(self, replica: int, kind: int) -> bool:
        """Whether it was."""
        return len(self._wanted) > 1 and self._wanted[1] == replica * 8 + kind

    def stops(self, asked: bool) -> bool:
        """Where the earlier run stopped, and nowhere else."""
        stops = bool(self._wanted) and self._wanted[0] % 8 == STOP
        if stops:
            self._wanted.popleft()
        return stops

    def served(self, replica: int, kind: int) -> None:
        """On to the next."""
        self._wanted.popleft()
