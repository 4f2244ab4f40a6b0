"""What a loader is to read: runs of steps, known beforehand (`epochs`) or leased while it reads (`Leases`)."""

from collections.abc import Iterator
from queue import SimpleQueue
from typing import NamedTuple


class Run(NamedTuple):
    """Steps `first` to `last` (inclusive) of an epoch, of a run of lanes."""

    epoch: int
    lanes: range
    first: int
    last: int


def epochs(lanes: range, steps: int, start: tuple[int, int], last: tuple[float, int]) -> Iterator[Run]:
    """Some lanes' runs from `start` to `last` (epoch, step; inclusive), one for each epoch of `steps` steps."""
    epoch, first = start
    while (epoch, first) <= last:
        yield Run(epoch, lanes, first, steps - 1 if epoch < last[0] else min(steps - 1, last[1]))
        epoch, first = epoch + 1, 0


class Leases:
    """Runs that one thread adds while another goes through them; it waits for the next until `close`."""

    def __init__(self) -> None:
        self._runs: SimpleQueue[Run | None] = SimpleQueue()

    def add(self, run: Run) -> None:
        """One more, at the end."""
        self._runs.put(run)

    def close(self) -> None:
        """There won't be more: who goes through them ends after those that were added."""
        self._runs.put(None)

    def __iter__(self) -> Iterator[Run]:
        while (run := self._runs.get()) is not None:
            yield run
        self._runs.put(None)  # whoever else goes through them ends too
