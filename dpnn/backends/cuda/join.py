"""Forks and joins, and flattening, which here has to change the order in memory: kernels/join.cu."""

import math
from collections.abc import Sequence

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Slot
from dpnn.backends.cuda.device import Device, blocks
from dpnn.backends.cuda.op import KernelOp
from dpnn.backends.cuda.tiling import Tiling
from dpnn.nn.join import Add, Concat, Fork
from dpnn.nn.pointwise import Flatten

_FILE = "join.cu"
_FOURS = 1024
"""Numbers of a block whose threads have four each."""


class Sum:
    """y = the sum of arrays of one size, in their order, and a ReLU where asked for; of one array a copy."""

    def __init__(self, device: Device, relu: bool = False) -> None:
        self._kernel, self._relu = device.kernel(_FILE, "sum"), int(relu)

    def __call__(self, xs: Sequence[Array], y: Array, n: int) -> None:
        """Of the first n numbers, at least one."""
        some, rest = [*xs[:4]], [*xs[4:]]
        while some:
            relu = 0 if rest else self._relu
            self._kernel(blocks(n, _FOURS), (256,), *some, *(None,) * (4 - len(some)), y, relu, np.int64(n))
            some, rest = [y, *rest[:3]] if rest else [], rest[3:]


class ForkOp(KernelOp[Fork]):
    """y is x's buffer; dx = the sum of what the readers give back."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self._sum = Sum(device)

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        self.dys = slot.d_outputs(self.node)
        self.dx = slot.d_input(self.node)

    def run_forward(self, rows: int) -> None:
        """Nothing: the output is a view."""

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            self._sum(self.dys, self.dx, rows * math.prod(self.node.shape))


class AddOp(KernelOp[Add]):
    """y = the sum of the inputs; each dx = dy where y > 0 or there is no ReLU. The first dx is dy's own buffer."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.xs = [slot.input(self.node, i) for i in range(len(self.node.inputs))]
        self._sum = Sum(device, self.relu)
        self._gradient = device.kernel(_FILE, "sum_gradient")

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        super().bind_gradients(group, slot)
        others = [slot.d_input(self.node, i) for i in range(1, len(self.node.inputs))]
        self.d_others = [dx for dx in others if dx is not None]

    def run_forward(self, rows: int) -> None:
        self._sum(self.xs, self.y, rows * math.prod(self.node.shape))

    def run_backward(self, rows: int) -> None:
        n = rows * math.prod(self.node.shape)
        grid, others = blocks(n, _FOURS), self.d_others
        if self.relu:
            self._gradient(grid, (256,), self.y, self.dy, others[0] if others else None, np.int64(n))
            others = others[1:]
        for dx in others:
            self._gradient(grid, (256,), None, self.dy, dx, np.int64(n))


class ConcatOp(KernelOp[Concat]):
    """y = the inputs one after the other along the channels; each dx is its slice of dy."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.widths = [channels for channels, *_ in self.node.input_shapes]
        self.xs = [slot.input(self.node, i) for i in range(len(self.widths))]
        self.ys = self._slices(self.y)
        fours = all(width % 4 == 0 for width in self.widths)
        self.tilings = [Tiling(width, device, fours) for width in self.widths]
        self._copies = [tiling.kernel(_FILE, "copy") for tiling in self.tilings]

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        super().bind_gradients(group, slot)
        self.dys = self._slices(self.dy)
        self.dxs = [slot.d_input(self.node, i) for i in range(len(self.node.inputs))]

    def _slices(self, whole: Array) -> list[Array]:
        """The channels of each input."""
        ends = np.cumsum([channels for channels, *_ in self.node.input_shapes]).tolist()
        return [whole[:, lo:hi] for lo, hi in zip([0, *ends], ends, strict=False)]

    def run_forward(self, rows: int) -> None:
        for i, (x, y) in enumerate(zip(self.xs, self.ys, strict=True)):
            self._copy(i, x, self.widths[i], y, self.node.shape[0], rows)

    def run_backward(self, rows: int) -> None:
        for i, (dx, dy) in enumerate(zip(self.dxs, self.dys, strict=True)):
            if dx is not None:
                self._copy(i, dy, self.node.shape[0], dx, self.widths[i], rows)

    def _copy(self, i: int, x: Array, x_pitch: int, y: Array, y_pitch: int, rows: int) -> None:
        tiling, pixels = self.tilings[i], rows * math.prod(self.node.shape[1:])
        self._copies[i](tiling.grid(pixels), tiling.block, x, x_pitch, y, y_pitch, np.int64(pixels), self.widths[i])


class FlattenOp(KernelOp[Flatten]):
    """y (N, C H W) in that order, from channels-last memory."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.channels, *image = self.node.input_shapes[0]
        self.n_pixels = math.prod(image)
        self._transpose = device.kernel(_FILE, "transpose")

    def run_forward(self, rows: int) -> None:
        self._turn(self.x, self.y, self.n_pixels, self.channels, rows)

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            self._turn(self.dy, self.dx, self.channels, self.n_pixels, rows)

    def _turn(self, x: Array, y: Array, down: int, across: int, rows: int) -> None:
        """y (rows, across, down) = x (rows, down, across)."""
        self._transpose((rows * -(-down // 32) * -(-across // 32),), (32, 8), x, y, down, across)
