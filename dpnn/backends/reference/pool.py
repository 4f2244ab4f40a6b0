"""Pooling, by walking over the places (r, s) inside the window: each gives one number to every window at once."""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from dpnn.backends.base import Array, Mode, Slot
from dpnn.backends.reference.op import LayerOp
from dpnn.nn.graph import Node
from dpnn.nn.layer import pair
from dpnn.nn.pool import AvgPool, GlobalAvgPool, MaxPool, Pool

P = TypeVar("P", bound=Pool)


class PoolOp(LayerOp[P]):
    """The geometry of windows that both kinds share."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        super().__init__(node, slot, mode)
        self.size, self.stride, self.padding = pair(self.layer.size), self.layer.step, pair(self.layer.padding)
        self.windows = node.shape[1:]

    def padded(self, rows: int, fill: float) -> Array:
        """Room for `rows` images with their padding, and with what windows need beyond it."""
        _, c, *image = self.x.shape
        extent = [
            max(n + 2 * padding, (count - 1) * stride + size)
            for n, padding, count, stride, size in zip(
                image, self.padding, self.windows, self.stride, self.size, strict=True
            )
        ]
        return np.full((rows, c, *extent), fill, self.x.dtype)

    def inner(self, padded: Array) -> Array:
        """The image in a padded array (a view)."""
        (above, left), (h, w) = self.padding, self.x.shape[2:]
        return padded[:, :, above : above + h, left : left + w]

    def places(self, padded: Array) -> Iterator[Array]:
        """For each place in the window, in order, its number in every window: views (N, C, P, Q)."""
        (down, right), (p, q) = self.stride, self.windows
        for r in range(self.size[0]):
            for s in range(self.size[1]):
                yield padded[:, :, r : r + down * p : down, s : s + right * q : right]


class MaxPoolOp(PoolOp[MaxPool]):
    """y = the largest number of the window; dx gives dy to the first of those equal to it."""

    def forward(self) -> None:
        y = self.y[: self.step.rows]
        y.fill(-np.inf)
        for x in self.places(self._padded_input()):
            np.maximum(x, y, out=y)

    def backward(self) -> None:
        if self.dx is None:
            return
        rows = self.step.rows
        y, left = self.y[:rows], self.dy[:rows].copy()
        d_padded = self.padded(rows, 0.0)
        for x, dx in zip(self.places(self._padded_input()), self.places(d_padded), strict=True):
            given = left * (x == y)
            dx += given
            left -= given
        self.dx[:rows] = self.inner(d_padded)

    def _padded_input(self) -> Array:
        padded = self.padded(self.step.rows, -np.inf)
        self.inner(padded)[...] = self.x[: self.step.rows]
        return padded


class AvgPoolOp(PoolOp[AvgPool]):
    """y = the sum of the window / how many of its numbers lie in the image or its padding."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        super().__init__(node, slot, mode)
        extents = [n + 2 * padding for n, padding in zip(self.x.shape[2:], self.padding, strict=True)]
        rows, cols = (
            np.minimum(np.arange(count) * stride + size, extent) - np.arange(count) * stride
            for count, stride, size, extent in zip(self.windows, self.stride, self.size, extents, strict=True)
        )
        self.counts = np.outer(rows, cols).astype(self.x.dtype)
        """(P, Q)"""

    def forward(self) -> None:
        y = self.y[: self.step.rows]
        padded = self.padded(self.step.rows, 0.0)
        self.inner(padded)[...] = self.x[: self.step.rows]
        y.fill(0.0)
        for x in self.places(padded):
            y += x
        y /= self.counts

    def backward(self) -> None:
        if self.dx is None:
            return
        rows = self.step.rows
        share = self.dy[:rows] / self.counts
        d_padded = self.padded(rows, 0.0)
        for dx in self.places(d_padded):
            dx += share
        self.dx[:rows] = self.inner(d_padded)


class GlobalAvgPoolOp(LayerOp[GlobalAvgPool]):
    """y (N, C) = the mean over H and W."""

    def forward(self) -> None:
        self.y[: self.step.rows] = self.x[: self.step.rows].mean(axis=(2, 3))

    def backward(self) -> None:
        if self.dx is not None:
            n_pixels = self.x.shape[2] * self.x.shape[3]
            self.dx[: self.step.rows] = self.dy[: self.step.rows, :, None, None] / n_pixels
