"""Sums that have the same bits on any number of ranks: over the grains of a step, in one fixed binary tree.

A grain is a fixed piece of the global batch. The tree over n grains cuts a run of them at the largest power of two
below its length. A replica adds its own grains as far as the tree goes within its run, each as it comes. The few
partial sums that are left are added over the replicas of a node where they lie, then over nodes: those exchange pieces,
each node adds one, and all get the result.

It costs a pass over the gradients for each grain, and nodes exchange more: a replica whose run isn't a node of the tree
has up to 2 log2(n) partial sums.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dpnn.comm.exchange import Exchange, Lines
from dpnn.comm.node import Node
from dpnn.comm.reduce import GradientReducer, blocks
from dpnn.native import Call

Array = NDArray[Any]
Sum = tuple[int, int]
"""The grains [lo, hi) that a partial sum is over."""


def middle(lo: int, hi: int) -> int:
    """Where the tree cuts a run of two grains or more."""
    return lo + (1 << (hi - lo - 1).bit_length() - 1)


def siblings(left: Sum, right: Sum, n: int) -> bool:
    """Whether two runs are the halves of a node of the tree over n grains."""
    lo, hi = 0, n
    while hi - lo > 1:
        cut = middle(lo, hi)
        if (left, right) == ((lo, cut), (cut, hi)):
            return True
        lo, hi = (lo, cut) if right[1] <= cut else (cut, hi)
    return False


def merges(sums: Sequence[Sum], n: int) -> tuple[list[tuple[int, int]], list[tuple[int, Sum]]]:
    """How partial sums, in the order of their grains, are added as far as the tree goes.

    Pairs (i, j): number j is added onto number i. Then what is left: number, and what it has become.
    """
    pairs: list[tuple[int, int]] = []
    left: list[tuple[int, Sum]] = []
    for number, this in enumerate(sums):
        here = number, this
        while left and siblings(left[-1][1], here[1], n):
            i, before = left.pop()
            pairs.append((i, here[0]))
            here = i, (before[0], here[1][1])
        left.append(here)
    return pairs, left


def stacked(run: range, n: int) -> tuple[list[list[tuple[int, int]]], list[Sum], int]:
    """How a replica adds the grains of its run, one after the other, on a stack of arrays.

    For each grain the additions (place, from), -1 being the grain itself; none: the grain is put on the stack. Then the
    partial sums that are left, by place, and the most places that are taken.
    """
    steps: list[list[tuple[int, int]]] = []
    left: list[Sum] = []
    most = 0
    for grain in run:
        this, source = (grain, grain + 1), -1
        adds: list[tuple[int, int]] = []
        while left and siblings(left[-1], this, n):
            this = left.pop()[0], this[1]
            adds.append((len(left), source))
            source = len(left)
        left.append(this)
        steps.append(adds)
        most = max(most, len(left))
    return steps, left, most


def stack_places(n_grains: int, replicas: int) -> int:
    """The arrays for partial sums that every replica needs; 0 without grains."""
    return max(stacked(run, n_grains)[2] for run in runs(n_grains, replicas))


def runs(n_grains: int, replicas: int) -> list[range]:
    """The grains of each replica."""
    each = n_grains // replicas
    return [range(replica * each, (replica + 1) * each) for replica in range(replicas)]


class GrainReducer(GradientReducer):
    """Sums buckets as GradientReducer does, of which every replica starts each once a grain; in the tree's order."""

    def __init__(self, node: Node, n_grains: int, arrived: Callable[[int, int], object], limit_s: float) -> None:
        """Collective. The replicas hold the grains in their order, each as many; `node.partials` has their places."""
        super().__init__(node, arrived, limit_s)
        self._n = n_grains
        stacks = [stacked(run, n_grains) for run in runs(n_grains, node.replicas)]
        self._steps = stacks[node.replica][0]
        self._started: dict[tuple[int, int], int] = {}
        self._stack_calls: dict[tuple[int, int], list[list[Call]]] = {}
        # What is left on each replica's stack, and after the additions over its node on each node.
        left = [sums for _, sums, _ in stacks]
        self._left_of_nodes: list[list[Sum]] = []
        for members in node.groups:
            found = sorted((this, rank, place) for rank, r in enumerate(members) for place, this in enumerate(left[r]))
            pairs, kept = merges([this for this, _, _ in found], n_grains)
            self._left_of_nodes.append([this for _, this in kept])
            if node.replica in members:
                self._pairs, self._kept = pairs, [number for number, _ in kept]
                self._arrays = [node.partials[rank][place] for _, rank, place in found]

    def start(self, lo: int, hi: int) -> None:
        """My grads[lo:hi] of one more grain are complete."""
        grain = self._started.get((lo, hi), 0)
        for add in self._stack(lo, hi)[grain]:
            add()
        self._started[lo, hi] = (grain + 1) % len(self._steps)
        if self._started[lo, hi] == 0:
            super().start(lo, hi)

    def _stack(self, lo: int, hi: int) -> list[list[Call]]:
        """For each grain the calls that bring a bucket onto my stack."""
        if (lo, hi) not in self._stack_calls:
            node = self._node
            grads, places = node.grads[lo:hi], [place[lo:hi] for place in node.partials[node.comm.rank]]
            depth, calls = 0, []
            for adds in self._steps:
                depth += 1 - len(adds)
                pairs = [(places[to], grads if source < 0 else places[source]) for to, source in adds]
                calls.append(
                    [node.adds([to, source]) for to, source in pairs] or [partial(np.copyto, places[depth - 1], grads)]
                )
            self._stack_calls[lo, hi] = calls
        return self._stack_calls[lo, hi]

    def _bind(self, lo: int, hi: int) -> list[tuple[list[Call], int, int]]:
        """The additions over the node, block by block."""
        return [
            ([self._node.adds([self._arrays[i][a:b], self._arrays[j][a:b]]) for i, j in self._pairs], a, b)
            for a, b in blocks(lo, hi)
        ]

    def _cross(self, lo: int, hi: int) -> tuple[Callable[[], bool], Callable[[], bool]]:
        if (lo, hi) not in self._exchanges:
            self._exchanges[lo, hi] = self._exchange(lo, hi)
        return self._exchanges[lo, hi].start()

    def _exchange(self, lo: int, hi: int) -> Exchange:
        """My node's partial sums of a share, piece by piece, to the pieces' owners; the sums back."""
        node, lines, left = self._node, cast(Lines, self._lines), self._left_of_nodes
        lengths, n_partials = lines.lengths(hi - lo), sum(map(len, left))
        length, mine = int(lengths[lines.rank]), [self._arrays[i] for i in self._kept]
        sent = np.empty(len(mine) * (hi - lo), node.grads.dtype)
        received = np.empty((n_partials, length), node.grads.dtype)
        pack: list[Call] = []
        at = 0
        for a, b in pairwise([lo, *(lo + np.cumsum(lengths)).tolist()]):
            for array in mine:
                pack.append(partial(np.copyto, sent[at : at + b - a], array[a:b]))
                at += b - a
        order = sorted((this, number) for number, this in enumerate(this for sums in left for this in sums))
        pairs, ((root, _),) = merges([this for this, _ in order], self._n)
        return Exchange(
            lines,
            pack,
            sent=(sent, len(mine) * lengths),
            received=(received, np.array([len(sums) * length for sums in left])),
            add=[node.adds([received[order[i][1]], received[order[j][1]]]) for i, j in pairs],
            piece=received[order[root][1]],
            result=(node.sums[lo:hi], lengths),
        )
