"""The rank's threads: a piece of NumPy work is cut and each thread takes its share.

NumPy lets other threads run while it works on an array, so a few Python threads keep as many cores busy. The calling
thread is one of the team.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread

import numpy as np

Call = Callable[[], object]


class Team:
    """`size` threads, which start when they are first needed and end with the team."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._work: list[SimpleQueue[Sequence[Call] | None]] = []
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()

    def run(self, shares: Sequence[Sequence[Call]]) -> None:
        """Make the calls of every share, a thread each, in order; return when all are made.

        What one of them raises is raised here. At most `size` shares.
        """
        while len(self._work) < len(shares) - 1:
            self._work.append(SimpleQueue())
            Thread(target=_serve, args=(self._work[-1], self._done), name="dpnn-team", daemon=True).start()
        for queue, calls in zip(self._work, shares[1:], strict=False):
            queue.put(calls)
        try:
            for call in shares[0]:
                call()
        finally:
            errors = [self._done.get() for _ in shares[1:]]
        for error in errors:
            if error is not None:
                raise error

    def cut(self, n: int, least: int = 1) -> list[range]:
        """[0, n) as at most `size` runs of like length, each of at least `least`; at least one run."""
        count = max(1, min(self.size, n // least))
        bounds = [n * i // count for i in range(count + 1)]
        return [range(lo, hi) for lo, hi in pairwise(bounds)]

    def __del__(self) -> None:
        for queue in self._work:
            queue.put(None)


def _serve(queue: "SimpleQueue[Sequence[Call] | None]", done: "SimpleQueue[BaseException | None]") -> None:
    """Make the calls of each share that comes, until None comes; tell what they raised."""
    with np.errstate(all="ignore"):
        while (calls := queue.get()) is not None:
            error: BaseException | None = None
            try:
                for call in calls:
                    call()
            except BaseException as caught:
                error = caught
            calls = ()
            done.put(error)
