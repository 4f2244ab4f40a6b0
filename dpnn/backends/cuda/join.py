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
    """y = the inputs one after the other along the channels; each dx is its slice of dy. A launch for four of them."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.widths = [channels for channels, *_ in self.node.input_shapes]
        self.xs = [slot.input(self.node, i) for i in range(len(self.widths))]
        fours = all(width % 4 == 0 for width in self.widths)
        self.tilings = [Tiling(sum(self.widths[i : i + 4]), device, fours) for i in range(0, len(self.widths), 4)]
        self._kernel = device.kernel(_FILE, "concat4" if fours else "concat")

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        super().bind_gradients(group, slot)
        self.dxs = [slot.d_input(self.node, i) for i in range(len(self.node.inputs))]

    def run_forward(self, rows: int) -> None:
        self._copy(self.xs, self.y, rows, back=0)

    def run_backward(self, rows: int) -> None:
        self._copy(self.dxs, self.dy, rows, back=1)

    def _copy(self, xs: Sequence[Array | None], y: Array, rows: int, back: int) -> None:
        pixels, channels = rows * math.prod(self.node.shape[1:]), self.node.shape[0]
        for i, tiling in enumerate(self.tilings):
            some, widths = xs[4 * i : 4 * i + 4], self.widths[4 * i : 4 * i + 4]
            missing = 4 - len(some)
            columns = y[:, sum(self.widths[: 4 * i]) :]
            self._kernel(
                tiling.grid(pixels), tiling.block, *some, *(None,) * missing, *widths, *(0,) * missing,
                columns, channels, np.int64(pixels), back,
            )  # fmt: skip


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
