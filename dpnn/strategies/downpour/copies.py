"""A server's parameters, in copies: an update never changes numbers that are being sent, so everyone gets one version.

One copy is the newest; where it is being sent, the next version is written into another.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np

from dpnn.comm.reduce import blocks
from dpnn.memory import zeros_like
from dpnn.optim import Optimizer
from dpnn.strategies.downpour.protocol import Array, pieces

_MOST = 3
_TRIED, _KEPT = 64, 4096
"""Pieces that are updated to try one way to store, and then by the one that was found faster."""


class Stores:
    """How parameters are stored that the workers of the node read: into the caches, or past them.

    What others have read has to be got back from their caches before it is stored to. Between cores that share a cache
    that takes no time, else longer than all the rest of an update; and the host of a virtual machine moves its cores.
    Past the caches nothing is got back, but the next reading is from memory. So both are tried, again and again. What
    is stored doesn't depend on it.
    """

    def __init__(self) -> None:
        self.streams = False
        """Whether the next piece is stored past the caches."""
        self._left, self._taken = _TRIED, list[float]()
        self._into_caches: float | None = None
        """What a number took that was stored into them, as was last found; None: that is being tried."""

    def took(self, seconds: float) -> None:
        """So long, for each of its numbers, took a piece."""
        self._taken.append(seconds)
        if len(self._taken) < self._left:
            return
        found, trying = median(self._taken), self._left == _TRIED
        self._taken.clear()
        if not trying:  # once more
            self._left, self.streams, self._into_caches = _TRIED, False, None
        elif self._into_caches is None:
            self.streams, self._into_caches = True, found
        else:
            self._left, self.streams = _KEPT, found < self._into_caches


class Copy:
    """One of them."""

    def __init__(self, params: Array) -> None:
        self.params = params
        self.pieces = [(lo, hi, params[lo:hi]) for lo, hi in pieces(params.size)]
        """What it is sent in."""
        self.readers = 0
        """How often it is being sent."""
        self._optimizers: dict[int, tuple[Array, Optimizer]] = {}
        """By the buffer whose gradients they apply to it."""

    def optimizer(
        self, gradients: Array, make: Callable[[Array, Array, dict[str, Array]], Optimizer], state: dict[str, Array]
    ) -> Optimizer:
        """That which applies the gradients in a buffer; it is made once."""
        buffer, optimizer = self._optimizers.get(id(gradients), (None, None))
        if buffer is not gradients or optimizer is None:
            optimizer = make(self.params, gradients, state)
            self._optimizers[id(gradients)] = gradients, optimizer
        return optimizer

    def update(
        self, lo: int, hi: int, old: "Copy", optimizer: Optimizer, rate: float, scale: float, stores: Stores
    ) -> None:
        """Make of numbers of `old`, which may be this copy, those of the next version."""
        begin, streams = perf_counter(), stores.streams
        if old is self:
            optimizer.apply(lo, hi, rate, scale, streams)
        else:
            for start, end in blocks(lo, hi):
                np.copyto(self.params[start:end], old.params[start:end])
                optimizer.apply(start, end, rate, scale, streams)
        stores.took((perf_counter() - begin) / max(hi - lo, 1))


class Copies:
    """All of them, of which `newest` is one."""

    def __init__(self, params: Array) -> None:
        self.newest, self.stores = Copy(params), Stores()
        self._all = [self.newest]

    def to_write(self) -> Copy | None:
        """The copy for the next version: the newest where nobody reads it. None: all are being sent."""
        if not self.newest.readers:
            return self.newest
        for copy in self._all:
            if not copy.readers:
                return copy
        if len(self._all) == _MOST:
            return None
        self._all.append(Copy(zeros_like(self.newest.params)))
        return self._all[-1]
