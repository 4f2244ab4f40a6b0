"""Layers that work on each number by itself: kernels/pointwise.cu."""

import numpy as np

from dpnn.backends.base import Group, Mode, Slot
from dpnn.backends.cuda.device import Device, blocks
from dpnn.backends.cuda.op import KernelOp
from dpnn.nn.pointwise import ReLU


class ReLUOp(KernelOp[ReLU]):
    """y = max(x, 0), dx = dy where y > 0; dx may be dy."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self._forward = device.kernel("pointwise.cu", "relu")
        self._backward = device.kernel("pointwise.cu", "relu_gradient")

    def run_forward(self, rows: int) -> None:
        n = self.y[:rows].size
        self._forward(blocks(n), (256,), self.x, self.y, np.int64(n))

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            n = self.dy[:rows].size
            self._backward(blocks(n), (256,), self.y, self.dy, self.dx, np.int64(n))
