"""A server's parameters, in copies: an update never changes numbers that are being sent, so everyone gets one version.

One copy is the newest; where it is being sent, the next version is written into another.
"""

from collections.abc import Callable

import numpy as np

from dpnn.comm.reduce import blocks
from dpnn.optim import Optimizer
from dpnn.strategies.downpour.protocol import Array, pieces

_MOST = 3


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

    def update(self, lo: int, hi: int, old: "Copy", optimizer: Optimizer, rate: float, scale: float) -> None:
        """Make of numbers of `old`, which may be this copy, those of the next version."""
        if old is self:
            optimizer.apply(lo, hi, rate, scale)
            return
        for start, end in blocks(lo, hi):
            np.copyto(self.params[start:end], old.params[start:end])
            optimizer.apply(start, end, rate, scale)


class Copies:
    """All of them, of which `newest` is one."""

    def __init__(self, params: Array) -> None:
        self.newest = Copy(params)
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
        self._all.append(Copy(np.empty_like(self.newest.params)))
        return self._all[-1]
