"""Convolution as a matrix product: weight (K, C R S) times the image's windows as columns (C R S, P Q N)."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dpnn.backends.base import Array, Mode, Slot, put
from dpnn.backends.reference.op import LayerOp
from dpnn.nn.conv import Conv
from dpnn.nn.graph import Node
from dpnn.nn.layer import pair

COLUMNS = 1 << 21
"""About how many numbers of columns are made at a time: the memory that a batch takes is bounded."""


class ConvOp(LayerOp[Conv]):
    """y[n, k] = bias[k] + sum over c, r, s of weight[k, c, r, s] x[n, c, p stride + r, q stride + s]."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        super().__init__(node, slot, mode)
        self.size, self.stride, self.padding = pair(self.layer.size), pair(self.layer.stride), pair(self.layer.padding)
        self.p, self.q = node.shape[1:]
        g = self.layer.groups
        self.w = slot.param(node, "weight").reshape(g, self.layer.filters // g, -1)
        if self.layer.bias:
            self.bias = slot.param(node, "bias")
        self.run = max(1, COLUMNS // (g * self.w.shape[2] * self.p * self.q))

    def bind_gradients(self, node: Node, slot: Slot) -> None:
        super().bind_gradients(node, slot)
        self.dw = slot.d_param(node, "weight")
        if self.layer.bias:
            self.d_bias = slot.d_param(node, "bias")

    def forward(self) -> None:
        for x, y in self._runs(self.x, self.y):
            product = self.w @ self._columns(x)
            y[...] = np.moveaxis(product.reshape(*y.shape[1:], -1), -1, 0)
            if self.layer.bias:
                y += self.bias[:, None, None]

    def backward(self) -> None:
        if self.layer.bias:
            put(self.d_bias, self.dy[: self.step.rows].sum(axis=(0, 2, 3)), self.step)
        if self.dx is not None:
            for dx, dy in self._runs(self.dx, self.dy):
                self._add_columns(self.w.swapaxes(1, 2) @ self._outputs(dy), dx)

    def weights(self) -> None:
        """The gradient of the filters."""
        dw = np.zeros_like(self.w)
        for x, dy in self._runs(self.x, self.dy):
            dw += self._outputs(dy) @ self._columns(x).swapaxes(1, 2)
        put(self.dw, dw.reshape(self.dw.shape), self.step)

    def _runs(self, *arrays: Array) -> list[tuple[Array, ...]]:
        """The micro-batch's rows of the arrays, a few images at a time."""
        rows = self.step.rows
        return [tuple(a[i : min(i + self.run, rows)] for a in arrays) for i in range(0, rows, self.run)]

    def _outputs(self, dy: Array) -> Array:
        """(N, K, P, Q) -> (G, K/G, P Q N)."""
        return np.moveaxis(dy, 0, -1).reshape(*self.w.shape[:2], -1)

    def _columns(self, x: Array) -> Array:
        """Every window as a column: (N, C, H, W) -> (G, C/G R S, P Q N)."""
        n, c, h, w = x.shape
        padded, inner = self._padded(c, h, w, n)
        inner[...] = np.moveaxis(x, 0, -1)
        windows = sliding_window_view(padded, self.size, axis=(1, 2))[:, :: self.stride[0], :: self.stride[1]]
        return windows.transpose(0, 4, 5, 1, 2, 3).reshape(*self.w.shape[::2], -1)

    def _add_columns(self, columns: Array, dx: Array) -> None:
        """The transpose of `_columns`: every number of every window is added to where it came from; assigns dx."""
        n, c, h, w = dx.shape
        (rows, cols), (down, right) = self.size, self.stride
        windows = columns.reshape(c, rows, cols, self.p, self.q, n)
        padded, inner = self._padded(c, h, w, n)
        for r in range(rows):
            for s in range(cols):
                padded[:, r : r + down * self.p : down, s : s + right * self.q : right] += windows[:, r, s]
        dx[...] = np.moveaxis(inner, -1, 0)

    def _padded(self, c: int, h: int, w: int, n: int) -> tuple[Array, Array]:
        """Zeros for images with their padding, (C, H', W', N), and the part of it that is the images, a view.

        The images stand last because then all that is copied and added is contiguous.
        """
        above, left = self.padding
        padded = np.zeros((c, h + 2 * above, w + 2 * left, n), self.x.dtype)
        return padded, padded[:, above : above + h, left : left + w]
