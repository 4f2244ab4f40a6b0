"""Ranks that agree on something while a run is set up."""

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpnn.comm.faults import wait
from dpnn.errors import DpnnError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

_PIECE = 1 << 30
"""Bytes of a message at most: MPI 3 counts to 2**31 - 1."""


class Ranks:
    """The ranks of a communicator: `comm`, and this one's `rank` among `size`.

    `timeout_s` is how long a rank waits for another, and may be changed. An error that all of them raise is marked as
    agreed, so that one of them tells it for all.
    """

    def __init__(self, comm: "MPI.Comm", timeout_s: float) -> None:
        self.comm, self.rank, self.size, self.timeout_s = comm, comm.rank, comm.size, timeout_s

    def first(self, make: Callable[[], T], first: int = 0) -> T:
        """What `make` returns on rank `first`, on every rank (pickled: for set-up only). Collective.

        Where `make` raises a DpnnError, every rank raises it.
        """
        value: T | None = None
        refused: DpnnError | None = None
        if self.rank == first:
            try:
                value = make()
            except DpnnError as error:
                refused = error
        value, refused = self._broadcast((value, refused), first)
        if refused is not None:
            raise _agreed(refused)
        return value

    def agree(self, error: DpnnError | None) -> None:
        """Raise the error of the lowest rank that brings one, on every rank. Collective."""
        from mpi4py import MPI

        lowest = np.array([self.size if error is None else self.rank])
        self._wait(self.comm.Iallreduce(MPI.IN_PLACE, lowest, MPI.MIN))
        if lowest[0] < self.size:
            told: DpnnError = self._broadcast(error, int(lowest[0]))
            raise _agreed(told if self.size == 1 else type(told)(f"rank {lowest[0]}: {told}"))

    def check(self, what: Callable[[], object]) -> None:
        """Do `what`, and raise its DpnnError on all ranks where it raises one on any. Collective."""
        failure: DpnnError | None = None
        try:
            what()
        except DpnnError as error:
            failure = error
        self.agree(failure)

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank. Collective."""
        from mpi4py import MPI

        found = np.array([mine])
        self._wait(self.comm.Iallreduce(MPI.IN_PLACE, found, MPI.LOR))
        return bool(found[0])

    def least(self, mine: float) -> float:
        """The smallest of all ranks' numbers. Collective."""
        from mpi4py import MPI

        found = np.array([mine])
        self._wait(self.comm.Iallreduce(MPI.IN_PLACE, found, MPI.MIN))
        return float(found[0])

    def lowest(self, text: str) -> str:
        """The text of the lowest rank that has one, on all; empty where none has. Collective."""
        rank = int(self.least(self.rank if text else self.size))
        return self.first(lambda: text, rank) if rank < self.size else ""

    def xor(self, numbers: NDArray[np.uint32]) -> None:
        """Replace each number by the exclusive or of those of all ranks. Collective."""
        from mpi4py import MPI

        self._wait(self.comm.Iallreduce(MPI.IN_PLACE, numbers, MPI.BXOR))

    def meet(self) -> None:
        """Return when all have come here. Collective."""
        self._wait(self.comm.Ibarrier())

    def _broadcast(self, value: Any, root: int) -> Any:
        """`value` of rank `root`, on every rank: the length of its pickle, then the pickle, none blocking."""
        pickled = bytearray(pickle.dumps(value) if self.rank == root else b"")
        length = np.array([len(pickled)])
        self._wait(self.comm.Ibcast(length, root))
        pickled = pickled or bytearray(int(length[0]))
        for lo in range(0, len(pickled), _PIECE):
            self._wait(self.comm.Ibcast(memoryview(pickled)[lo : lo + _PIECE], root))
        return value if self.rank == root else pickle.loads(pickled)

    def _wait(self, request: "MPI.Request") -> None:
        wait(request.Test, f"the other {self.size - 1} ranks", self.timeout_s)


def _agreed(error: DpnnError) -> DpnnError:
    error.agreed = True
    return error
