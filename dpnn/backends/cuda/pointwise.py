"""Layers that work on each number by itself: kernels/pointwise.cu."""

import math
import zlib

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Slot
from dpnn.backends.cuda.device import Device, blocks
from dpnn.backends.cuda.join import Sum
from dpnn.backends.cuda.op import KernelOp
from dpnn.nn.pointwise import Dropout, ReLU

_FOURS = 1024
"""Numbers of a block whose threads have four each."""
_MOST = 65535
"""Blocks of a grid's second dimension."""


class ReLUOp(KernelOp[ReLU]):
    """y = max(x, 0), dx = dy where y > 0; dx may be dy."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self._forward = device.kernel("pointwise.cu", "relu")
        self._backward = device.kernel("pointwise.cu", "relu_gradient")

    def run_forward(self, rows: int) -> None:
        n = self.y[:rows].size
        self._forward(blocks(n, _FOURS), (256,), self.x, self.y, np.int64(n))

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            n = self.dy[:rows].size
            self._backward(blocks(n, _FOURS), (256,), self.y, self.dy, self.dx, np.int64(n))


class DropoutOp(KernelOp[Dropout]):
    """y = x mask, dx = dy mask; both draw the mask, from (seed, epoch, a sample's id, the layer's name)."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.drops = mode == "train"
        if self.drops:
            self.ids = slot.input(self.node, 1)
        self.size = math.prod(self.node.shape)
        # A vector is as an image of one channel: its numbers lie in memory as they are numbered.
        self.channels = self.node.shape[0] if len(self.node.shape) == 3 else 1
        self.n_pixels = self.size // self.channels
        self.purpose = np.uint32(zlib.crc32(self.node.name.encode()))
        self.threshold = np.uint32(self.layer.rate * 2**32)
        """A number is kept where its random word of 32 bits is at least this."""
        self.scale = 1 / (1 - self.layer.rate)
        self._drop = device.kernel("pointwise.cu", "dropout")
        self._copy = Sum(device)

    def run_forward(self, rows: int) -> None:
        if self.drops:
            self._run(self.x, self.y, rows)
        else:
            self._copy([self.x], self.y, rows * self.size)

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            self._run(self.dy, self.dx, rows)

    def _run(self, x: Array, y: Array, rows: int) -> None:
        grid = (*blocks(-(-self.n_pixels // 4) * self.channels), min(rows, _MOST))
        seed, epoch = (np.uint32(word & 0xFFFFFFFF) for word in (self.step.seed, self.step.epoch))
        self._drop(
            grid, (256,), x, self.ids, y, seed, epoch, self.purpose, self.threshold, self.scale,
            rows, self.n_pixels, self.channels,
        )  # fmt: skip
