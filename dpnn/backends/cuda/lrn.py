"""Local response normalisation: kernels/lrn.cu."""

import numpy as np

from dpnn.backends.base import Group, Mode, Slot
from dpnn.backends.cuda.device import Device
from dpnn.backends.cuda.op import KernelOp
from dpnn.nn.norm import LocalResponseNorm

THREADS = 256


class LocalResponseNormOp(KernelOp[LocalResponseNorm]):
    """Nothing is kept: backward computes the sums of squares again."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        channels, height, width = self.node.shape
        before, after = (min(n, channels - 1) for n in (self.layer.size // 2, (self.layer.size - 1) // 2))
        scale = self.layer.alpha / self.layer.size
        self.numbers = (channels, before, after, float(scale), float(self.layer.beta), float(self.layer.k))
        self.pixels = height * width
        five = "_5" if before == after == 2 and channels % 4 == 0 else ""
        threads = channels // 4 if five else channels
        self.tiles = -(-threads // THREADS)
        across = -(-threads // self.tiles)
        self.block = (across, THREADS // across)
        self.shared = 0 if five else 4 * self.block[1] * min(across + before + after, channels)
        """Bytes of a block's lines."""
        self._forward = device.kernel("lrn.cu", f"lrn{five}")
        self._backward = device.kernel("lrn.cu", f"lrn_gradient{five}")

    def run_forward(self, rows: int) -> None:
        self._forward(self._grid(rows), self.block, self.x, self.y, np.int64(rows * self.pixels), *self.numbers)

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            arguments = (self.x, self.dy, self.dx, np.int64(rows * self.pixels), *self.numbers)
            self._backward(self._grid(rows), self.block, *arguments, shared=self.shared)

    def _grid(self, rows: int) -> tuple[int, int]:
        return -(-rows * self.pixels // self.block[1]), self.tiles
