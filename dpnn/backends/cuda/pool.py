"""Pooling: kernels/pool.cu."""

import math
from typing import TypeVar

from dpnn.backends.base import Array, Group, Mode, Room, Slot
from dpnn.backends.cuda.device import Device, Grid, Kernel
from dpnn.backends.cuda.op import KernelOp
from dpnn.nn.layer import Layer, pair
from dpnn.nn.pool import AvgPool, GlobalAvgPool, MaxPool, Pool

P = TypeVar("P", bound=Layer)
THREADS = 256
MOST_IMAGES = 65535
"""What the second dimension of a grid may be; kernels go round for the images beyond."""


class PoolOp(KernelOp[P]):
    """x, dx (N, C, H, W) and the grids that cover them."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.channels, self.height, self.width = self.node.input_shapes[0]
        self.vector = 4 if self.channels % 4 == 0 else 1
        """Channels of a thread."""

    def find(self, name: str) -> Kernel:
        """The kernel of that name for so many channels."""
        return self.device.kernel("pool.cu", name if self.vector == 1 else f"{name}_{self.vector}")

    def over(self, pixels: int, rows: int) -> tuple[Grid, Grid]:
        """The grid (pixels, images) and the block (channels, pixels) for images of so many pixels."""
        across = min(self.channels // self.vector, THREADS)
        along = THREADS // across
        return (-(-pixels // along), min(rows, MOST_IMAGES)), (across, along)


W = TypeVar("W", bound=Pool)


class WindowOp(PoolOp[W]):
    """What has windows: their numbers are the last arguments of its kernels."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        p, q = self.node.shape[1:]
        size, padding = pair(self.layer.size), pair(self.layer.padding)
        self.pixels, self.windows = self.height * self.width, p * q
        self.numbers = (self.height, self.width, self.channels, p, q, *size, *self.layer.step, *padding)


class MaxPoolOp(WindowOp[MaxPool]):
    """The places of the largest numbers are kept for backward."""

    places: Array | None = None

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        if self.dx is not None:
            self.places = slot.room(group)[0]
        wide = ""
        if _place_nbytes(self.layer) > 1:
            wide, self.vector = "_wide", 1
        self._forward, self._backward = self.find(f"max_pool{wide}"), self.find(f"max_pool_gradient{wide}")

    @classmethod
    def room(cls, group: Group, rows: int, mode: Mode, device: Device) -> Room:
        node = group.nodes[0]
        if mode == "eval" or not node.needs_grad or not isinstance(node.layer, MaxPool):
            return Room()
        return Room(kept=rows * math.prod(node.shape) * _place_nbytes(node.layer))

    def run_forward(self, rows: int) -> None:
        self._forward(*self.over(self.windows, rows), self.x, self.y, self.places, rows, *self.numbers)

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            self._backward(*self.over(self.pixels, rows), self.dy, self.places, self.dx, rows, *self.numbers)


class AvgPoolOp(WindowOp[AvgPool]):
    """Nothing is kept."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self._forward, self._backward = self.find("avg_pool"), self.find("avg_pool_gradient")

    def run_forward(self, rows: int) -> None:
        self._forward(*self.over(self.windows, rows), self.x, self.y, rows, *self.numbers)

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            self._backward(*self.over(self.pixels, rows), self.dy, self.dx, rows, *self.numbers)


class GlobalAvgPoolOp(PoolOp[GlobalAvgPool]):
    """y (N, C). Backward is that of a mean over one window, as large as the image."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self._forward, self._backward = self.find("global_avg_pool"), self.find("avg_pool_gradient")
        image = (self.height, self.width)
        self.pixels = math.prod(image)
        self.numbers = (*image, self.channels, 1, 1, *image, *image, 0, 0)

    def run_forward(self, rows: int) -> None:
        across = min(self.channels // self.vector, 32)
        grid = (-(-self.channels // (across * self.vector)), min(rows, MOST_IMAGES))
        block = (across, min(THREADS // across, 32))
        self._forward(grid, block, self.x, self.y, rows, self.pixels, self.channels)

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            self._backward(*self.over(self.pixels, rows), self.dy, self.dx, rows, *self.numbers)


def _place_nbytes(layer: MaxPool) -> int:
    """Bytes of a place in a window: one more than there are must have a number, for none."""
    return 1 if math.prod(pair(layer.size)) <= 255 else 4
