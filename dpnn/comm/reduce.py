"""The sum of gradients over replicas, bucket by bucket, while backward goes on.

`allreduce` is the definition of correct. `BucketReducer` sums any array on all ranks by MPI. `GradientReducer` sums the
gradients of a node's replicas where they lie, each replica its share of every bucket, and only shares cross to other
nodes.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dpnn.comm.exchange import Exchange, Lines, Swap, plain, rounded
from dpnn.comm.faults import duplicate, tested, wait
from dpnn.comm.node import Node
from dpnn.native import Call

if TYPE_CHECKING:
    from mpi4py import MPI

BLOCK = 1 << 17
"""Numbers that are summed, and then used, at a time: they stay in a core's own cache meanwhile."""
_WRITTEN, _SETTLED = 0, 1
"""A node's counters: buckets that a replica has written, steps that it has done with."""
_LEAST_PIECE = 1 << 13
"""Numbers that are worth a message to each node; smaller shares are summed by MPI, in float32."""
_AT_ONCE, _UNDER_WAY = 1 << 18, 64
"""A share crosses to other nodes in runs of so many numbers (more where that is too little for each node), so many of
them under way at a time. A long message would keep the small ones by which MPI begins others waiting behind it: over
TCP one direction stood still while the other one was busy."""
_LATENCY_SHARE = 0.05
_BUCKET_NBYTES = (1 << 18, 1 << 25)
"""The smallest and the largest bucket that measurements may ask for."""


def allreduce(comm: "MPI.Comm", flat: "np.ndarray[Any, np.dtype[Any]]") -> None:
    """Sum a flat array over all ranks, in place, at once and blocking: what all below must agree with."""
    from mpi4py import MPI

    comm.Allreduce(MPI.IN_PLACE, flat, MPI.SUM)


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
        self._comm = duplicate(comm, f"{comm.size} replicas to prepare their sums", limit_s)

    def start(self, lo: int, hi: int) -> None:
        """Begin to sum flat[lo:hi], which nobody touches until `finish`."""
        self._pending.append(self._comm.Iallreduce(self._in_place, self._flat[lo:hi], self._sum))
        self.poke()

    def poke(self) -> bool:
        """Let MPI work for a moment; whether all sums are there.

        One request is tested for all: MPI's progress serves every pending one.
        """
        if self._pending and tested(self._pending[0].Test, self._whom):
            self._pending.popleft()
        return not self._pending

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


@dataclass(eq=False)
class Crossing:
    """A run [lo, hi) of a share whose sum over the nodes is under way."""

    lo: int
    hi: int
    test: Callable[[], bool]
    """Whether the sum is there."""
    sent: Callable[[], bool]
    """Whether its last messages are on their way, so that the next run can send its own."""


@dataclass(frozen=True)
class _Share:
    """What this rank does with its share of a bucket."""

    blocks: list[tuple[list[Call], int, int]]
    """The calls that sum it over the node, a block [lo, hi) at a time."""
    runs: list[tuple[int, int]]
    """In which it crosses to other nodes."""


class GradientReducer:
    """Sums buckets of a node's flat gradients over all replicas, without blocking.

    Every replica starts the same buckets in the same order. Once all replicas of the node have written one, each owner
    sums its share of it; where there are more nodes, the owners of that share sum it further. `arrived(lo, hi)` is told
    of every piece of my shares whose sum stands in `node.sums`. Nobody may write gradients again, or read what others
    do with theirs, before `settle`.
    """

    def __init__(self, node: Node, arrived: Callable[[int, int], object], limit_s: float, rounds: bool = False) -> None:
        """Collective over the replicas. `limit_s` bounds each wait.

        `rounds`: bfloat16 crosses between nodes, where the kernels for it are there.
        """
        from mpi4py import MPI

        self._node, self._arrived, self._limit_s = node, arrived, limit_s
        self._sum, self._in_place = MPI.SUM, MPI.IN_PLACE
        self._local: deque[tuple[int, int, int]] = deque()
        """Buckets that some replica of the node has still to write: number, lo, hi."""
        self._waiting: deque[tuple[int, int]] = deque()
        """Runs of shares that are to be summed over the nodes, lo, hi."""
        self._crossing: deque[Crossing] = deque()
        """Those under way."""
        self._shares: dict[tuple[int, int], _Share] = {}
        """My share of each bucket, made when it first comes."""
        self._whom = f"the sum of the gradients over {node.replicas} ranks"
        self._lines = Lines(node.across, limit_s) if node.across is not None else None
        self._rounds = rounds
        self._exchanges: dict[tuple[int, int], Exchange | Swap] = {}

    def start(self, lo: int, hi: int) -> None:
        """My grads[lo:hi] are complete."""
        self._local.append((self._node.advance(_WRITTEN), lo, hi))
        self.poke()

    def poke(self) -> bool:
        """Do what can be done now; whether all that was started has arrived."""
        while self._local and self._node.least(_WRITTEN) >= self._local[0][0]:
            self._add(*self._local.popleft()[1:])
        if self._lines is not None:
            self._cross_on()
        return not (self._local or self._waiting or self._crossing)

    def _cross_on(self) -> None:
        """Let what crosses between nodes go on, in its order: all nodes start their messages in the same one."""
        for crossing in list(self._crossing):
            if tested(crossing.test, self._whom):
                self._crossing.remove(crossing)
                self._arrived(crossing.lo, crossing.hi)
            elif not crossing.sent():
                break
        while self._waiting and len(self._crossing) < _UNDER_WAY:
            lo, hi = self._waiting.popleft()
            self._crossing.append(Crossing(lo, hi, *self._cross(lo, hi)))

    def finish(self) -> None:
        """Return once all my shares have arrived; RankError where that takes longer than the limit."""
        if not self.poke():
            wait(self.poke, self._whom, self._limit_s)

    def settle(self) -> None:
        """Return once all replicas of the node have come here: they have used what arrived."""
        steps = self._node.advance(_SETTLED)
        wait(lambda: self._node.least(_SETTLED) >= steps, self._whom, self._limit_s)

    def close(self) -> None:
        """Give the communicator back. Collective; twice is harmless."""
        if self._lines is not None:
            self._lines.close()

    def _add(self, lo: int, hi: int) -> None:
        if (lo, hi) not in self._shares:
            self._shares[lo, hi] = self._share(*self._node.mine(lo, hi))
        share = self._shares[lo, hi]
        for adds, start, end in share.blocks:
            for add in adds:
                add()
            if self._lines is None:
                self._arrived(start, end)
        self._waiting += share.runs

    def _share(self, lo: int, hi: int) -> _Share:
        lines = self._lines
        runs = [] if lines is None else blocks(lo, hi, max(_AT_ONCE, _LEAST_PIECE * lines.size))
        return _Share(self._bind(lo, hi) if lo < hi else [], runs)

    def _bind(self, lo: int, hi: int) -> list[tuple[list[Call], int, int]]:
        """The calls that sum my share over the node, block by block."""
        node = self._node
        if node.comm.size == 1:
            return [([], lo, hi)]
        return [([node.adds([grads[a:b] for grads in node.all_grads])], a, b) for a, b in blocks(lo, hi)]

    def _cross(self, lo: int, hi: int) -> tuple[Callable[[], bool], Callable[[], bool]]:
        """Begin to sum a run of my share over the nodes: `test` and `sent` of a Crossing."""
        lines, share, kernels = cast(Lines, self._lines), self._node.sums[lo:hi], self._node.kernels
        if hi - lo < _LEAST_PIECE * lines.size:
            return lines.small.Iallreduce(self._in_place, share, self._sum).Test, lambda: True
        if (lo, hi) not in self._exchanges:
            rounder = kernels if self._rounds else None
            self._exchanges[lo, hi] = rounded(lines, rounder, share) if rounder else plain(lines, self._node, share)
        return self._exchanges[lo, hi].start()


def blocks(lo: int, hi: int, length: int = BLOCK) -> list[tuple[int, int]]:
    """[lo, hi) in pieces of `length`."""
    return [(start, min(start + length, hi)) for start in range(lo, hi, length)]


def most_updates(n: int, pieces: int) -> int:
    """The runs, at most, that a rank updates of `n` numbers in a step: in blocks, cut at buckets and at pieces.

    Buckets are cut at pieces, too.
    """
    return len(blocks(0, n)) + 3 * (pieces + 1)


def measured_bucket(node: Node, limit_s: float) -> int:
    """Bytes of a bucket such that latency is a twentieth of what its sum takes, on these ranks. Collective.

    From the time t(n) = a + n / b of a small and a large sum. Ranks may find different numbers: the first one's counts.
    """
    reducer = GradientReducer(node, lambda lo, hi: None, limit_s)
    n = node.grads.size

    def seconds(numbers: int) -> float:
        times = []
        for _ in range(5):
            begin = perf_counter()
            reducer.start(0, numbers)
            reducer.finish()
            reducer.settle()
            times.append(perf_counter() - begin)
        return median(times[1:])

    small, large = min(n, 1 << 10), min(n, 1 << 22)
    latency, whole = seconds(small), seconds(large)
    reducer.close()
    rate = node.grads.itemsize * (large - small) / max(whole - latency, 1e-9)
    lowest, highest = _BUCKET_NBYTES
    return round(min(max(latency * rate / _LATENCY_SHARE, lowest), highest))
