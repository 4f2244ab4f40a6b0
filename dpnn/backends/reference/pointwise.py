"""Layers that work on each number by itself, or only change the shape."""

import math

import numpy as np

from dpnn.backends.base import Array, Mode, Slot
from dpnn.backends.reference.op import LayerOp
from dpnn.nn.graph import Node
from dpnn.nn.pointwise import Dropout, ReLU
from dpnn.philox import by_sample


class ReLUOp(LayerOp[ReLU]):
    """y = max(x, 0), dx = dy where y > 0."""

    def forward(self) -> None:
        np.maximum(self.x[: self.step.rows], 0, out=self.y[: self.step.rows])

    def backward(self) -> None:
        if self.dx is not None:
            rows = self.step.rows
            np.multiply(self.dy[:rows], self.y[:rows] > 0, out=self.dx[:rows])


class DropoutOp(LayerOp[Dropout]):
    """y = x mask, dx = dy mask; a sample's mask is drawn from (seed, epoch, its id, the layer's name)."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        super().__init__(node, slot, mode)
        self.drops = mode == "train"
        if self.drops:
            self.ids = slot.input(node, 1)
        self.name, self.shape = node.name, node.shape
        self.threshold = int(self.layer.rate * 2**32)
        """A number is kept where its random word of 32 bits is at least this."""

    def forward(self) -> None:
        x, y = self.x[: self.step.rows], self.y[: self.step.rows]
        if self.drops:
            self.mask = self._draw()
            np.multiply(x, self.mask, out=y)
        else:
            y[...] = x

    def backward(self) -> None:
        if self.dx is not None:
            np.multiply(self.dy[: self.step.rows], self.mask, out=self.dx[: self.step.rows])

    def _draw(self) -> Array:
        """0 or 1 / (1 - rate), (rows, *shape)."""
        step = self.step
        words = by_sample(step.seed, step.epoch, self.name, self.ids[: step.rows], math.prod(self.shape))
        kept = (words >= self.threshold).reshape(step.rows, *self.shape)
        mask: Array = kept * self.x.dtype.type(1 / (1 - self.layer.rate))
        return mask
