"""What brings the operands of products into the order that they want: kernels/conv_layout.cu."""

from dataclasses import dataclass

import numpy as np

from dpnn.backends.base import Array
from dpnn.backends.cuda.device import Device, blocks
from dpnn.backends.cuda.geometry import Shape, quads
from dpnn.backends.cuda.product import Matrix


@dataclass(frozen=True)
class Order:
    """How a matrix (G, (taps, inner), n) is read out of filters: distances of groups, n and inner in memory.

    `inner` is rounded up to `rows` with zeros. The tap (a, b) is read at `first` + (a, b) `step` of rows `across` long.
    """

    groups: int
    n: int
    inner: int
    rows: int
    group_apart: int
    n_apart: int
    inner_apart: int
    taps: tuple[int, int] = (1, 1)
    across: int = 1
    first: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)

    @property
    def size(self) -> int:
        """Numbers of the matrix."""
        return self.groups * self.taps[0] * self.taps[1] * self.rows * quads(self.n)


def forward_order(shape: Shape) -> Order:
    """Filters (G, K, C, R, S) as (G, (R, S, C), K)."""
    size, taps = shape.c * shape.taps, (shape.r, shape.s)
    return Order(shape.groups, shape.k, shape.c, quads(shape.c), shape.k * size, size, shape.taps, taps, shape.s)


def backward_order(shape: Shape, taps: tuple[int, int], first: tuple[int, int]) -> Order:
    """Filters (G, K, C, R, S) as (G, (taps, K), C), of every stride-th tap from `first` backward."""
    size, step = shape.c * shape.taps, (-shape.stride[0], -shape.stride[1])
    sizes = (shape.groups, shape.c, shape.k, quads(shape.k), shape.k * size, shape.taps, size)
    return Order(*sizes, taps, shape.s, first, step)


class Operands:
    """Copies in another order."""

    def __init__(self, device: Device) -> None:
        self._pad = device.kernel("conv_layout.cu", "pad_channels")
        self._arrange = device.kernel("conv_layout.cu", "arrange_filters")

    def padded(self, x: Array, pixels: int, c: int, scratch: Array) -> Array:
        """(pixels, c) with its channels rounded up to quads; itself where they are."""
        if c % 4 == 0:
            return x
        self._pad(blocks(pixels * quads(c) // 4), (256,), x, scratch, np.int64(pixels), c)
        return scratch

    def matrix(self, filters: Array, order: Order, scratch: Array) -> Matrix:
        """The matrix that a product wants on its right."""
        apart = quads(order.n)
        grid = (-(-order.rows // 8), -(-apart // 32), order.groups)
        sizes = (order.n, order.inner, order.rows, apart, *order.taps, order.across)
        taps = (order.first[0], order.step[0], order.first[1], order.step[1])
        self._arrange(
            grid, (256,), filters, scratch, *sizes, *taps, order.group_apart, order.n_apart, order.inner_apart
        )
        return Matrix(scratch, order.n, order.taps[0] * order.taps[1] * order.rows, apart)
