"""The sum of gradients over replicas, bucket by bucket, while backward goes on."""

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from dpnn.comm.faults import tested, wait

if TYPE_CHECKING:
    from mpi4py import MPI


class BucketReducer:
    """Sums slices of one flat array over all ranks of a communicator, in place and without blocking.

    Every rank starts the same slices in the same order; slices don't overlap until `finish`. The sums travel on a
    duplicate of `comm`, so that they can't be mixed up with other messages. MPI makes no progress by itself: `poke`
    between pieces of work is what hides the communication behind them.
    """

    def __init__(
        self, comm: "MPI.Comm", flat: "np.ndarray[Any, np.dtype[Any]]", limit_s: float, what: str = "gradients"
    ) -> None:
        """Collective over `comm`. `flat`: 1-D, contiguous, float32 or float64, kept; `limit_s` bounds each wait.

        TypeError or ValueError where `flat` is something else, RankError where a rank doesn't come.
        """
        from mpi4py import MPI

        if flat.dtype not in (np.float32, np.float64):
            raise TypeError(f"sums are of float32 or float64, not {flat.dtype}")
        if flat.ndim != 1 or not flat.flags.c_contiguous:
            raise ValueError(f"sums are of a flat contiguous array, not of shape {flat.shape}, strides {flat.strides}")
        self._flat = flat
        self._limit_s = limit_s
        self._pending: deque[MPI.Request] = deque()
        self._sum, self._in_place = MPI.SUM, MPI.IN_PLACE
        self._whom = f"the sum of the {what} over {comm.size} ranks"
        self._comm, duplicated = comm.Idup()
        wait(duplicated.Test, f"{comm.size} replicas to prepare their sums", limit_s)

    def start(self, lo: int, hi: int) -> None:
        """Begin to sum flat[lo:hi], which nobody touches until `finish`."""
        self._pending.append(self._comm.Iallreduce(self._in_place, self._flat[lo:hi], self._sum))
        self.poke()

    def poke(self) -> None:
        """Let MPI work for a moment. One request is tested for all: MPI's progress serves every pending one."""
        if self._pending and tested(self._pending[0].Test, self._whom):
            self._pending.popleft()

    def finish(self) -> None:
        """Return once every slice that was started holds its sum; RankError where that takes longer than the limit."""
        while self._pending:
            wait(self._pending[0].Test, self._whom, self._limit_s)
            self._pending.popleft()

    def close(self) -> None:
        """Finish, and give the communicator back. Collective; twice is harmless."""
        self.finish()
        if self._comm:
            self._comm.Free()
