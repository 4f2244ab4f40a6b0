"""Who packs together. `data` knows no MPI: the ranks are handed in."""

import os
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Ranks(Protocol):
    """This one is `rank` among `size`."""

    rank: int
    size: int

    def first(self, make: Callable[[], T], first: int = 0) -> T:
        """What `make` returns on rank `first`, or the error of dpnn's that it raises, on every rank. Collective."""
        ...

    def threads(self) -> int:
        """How many threads this rank may use."""
        ...


class Alone:
    """One process, by itself."""

    rank, size = 0, 1

    def first(self, make: Callable[[], T], first: int = 0) -> T:
        """What `make` returns."""
        return make()

    def threads(self) -> int:
        """One for each core."""
        return len(os.sched_getaffinity(0))
