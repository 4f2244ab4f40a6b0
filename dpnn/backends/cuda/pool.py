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
IMAGES = 2
"""Those that a thread takes at a time, as in kernels/pool.cu."""
MOST = 65535
"""What the second and third dimension of a grid may be; kernels go round for what lies beyond."""


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

    def across(self, most: int) -> tuple[int, int]:
        """Threads of a block side by side over the channels, and such blocks."""
        threads = self.channels // self.vector
        across = min(threads, most)
        return across, -(-threads // across)


W = TypeVar("W", bound=Pool)


class WindowOp(PoolOp[W]):
    """What has windows: their numbers are the last arguments of its kernels."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        p, q = self.node.shape[1:]
        size, padding = pair(self.layer.size), pair(self.layer.padding)
        self.pixels, self.windows = self.height * self.width, p * q
        self.numbers = (self.height, self.width, self.channels, p, q, *size, *self.layer.step, *padding)

    def over(self, pixels: int, rows: int) -> tuple[Grid, Grid]:
        """The grid (channels, pixels, images) and the block (channels, pixels) for images of so many pixels."""
        across, columns = self.across(32 // self.vector)
        along = THREADS // across
        return (columns, min(-(-pixels // along), MOST), min(-(-rows // IMAGES), MOST)), (across, along)


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
    """y (N, C)."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self._forward, self._backward = self.find("global_avg_pool"), self.find("global_avg_pool_gradient")
        self.pixels = self.height * self.width

    def run_forward(self, rows: int) -> None:
        self._forward(*self.over(rows), self.x, self.y, rows, self.pixels, self.channels)

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            self._backward(*self.over(rows), self.dy, self.dx, rows, self.pixels, self.channels)

    def over(self, rows: int) -> tuple[Grid, Grid]:
        """The grid (channels, images) and the block (channels, pixels)."""
        across, columns = self.across(32)
        return (columns, min(rows, MOST)), (across, min(THREADS // across, 32))


def _place_nbytes(layer: MaxPool) -> int:
    """Bytes of a place in a window: one more than there are must have a number, for none."""
    return 1 if math.prod(pair(layer.size)) <= 255 else 4
