"""The sizes of a convolution, as its kernels want them: channels of one group, and rounded up to quads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from dpnn.backends.cuda.cut import STEP
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Node
from dpnn.nn.layer import pair


def quads(n: int) -> int:
    """n, rounded up to a multiple of 4."""
    return -(-n // 4) * 4


@dataclass(frozen=True)
class Shape:
    """One image's convolution: `c` and `k` are one group's."""

    groups: int
    c: int
    h: int
    w: int
    k: int
    p: int
    q: int
    r: int = 1
    s: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, node: Node) -> "Shape":
        """Of a Conv, or of a Dense: a convolution of images of one pixel."""
        layer, (shape,) = cast(Conv | Dense, node.layer), node.input_shapes
        if isinstance(layer, Dense):
            return cls(1, shape[0], 1, 1, layer.units, 1, 1)
        (c, h, w), (_, p, q), g = shape, node.shape, layer.groups
        size, stride, padding = pair(layer.size), pair(layer.stride), pair(layer.padding)
        return cls(g, c // g, h, w, layer.filters // g, p, q, *size, stride, padding)

    @property
    def taps(self) -> int:
        """Numbers of a filter for each channel."""
        return self.r * self.s


@dataclass(frozen=True)
class Walk:
    """How a product walks over images (N, h, w, groups, c): for each pixel of a grid (N, p, q) over all taps."""

    h: int
    w: int
    groups: int
    c: int
    taps: tuple[int, int]
    p: int
    q: int
    stride: tuple[int, int]
    before: tuple[int, int]

    def arguments(self, digits: tuple[int, int]) -> tuple[int, ...]:
        """What a kernel wants behind the images; `digits`: sizes of its sum's middle and inner digit."""
        middle, inner = digits
        step = (STEP // inner // middle, STEP // inner % middle, STEP % inner)
        sizes = (self.h, self.w, self.groups * self.c, self.c, *self.taps, self.p, self.q)
        return (*sizes, *self.stride, *self.before, *step)


@dataclass(frozen=True)
class Target:
    """Where a product's rows go: a grid (N, p, q) of pixels in images (N, h, w), or the rows of a matrix."""

    apart: int
    group_apart: int
    p: int = 1
    q: int = 1
    h: int = 1
    w: int = 1
    stride: tuple[int, int] = (1, 1)
    first: tuple[int, int] = (0, 0)

    @property
    def arguments(self) -> tuple[int, ...]:
        """What a kernel wants behind `add`."""
        return (self.apart, self.group_apart, self.p, self.q, self.h, self.w, *self.stride, *self.first)


@dataclass(frozen=True)
class Residue:
    """A stride's residue of rows or columns of the inputs: those `first`, `first` + stride, ...; `n` of them.

    They meet only the `taps` taps last, last - stride, ... of a filter, in this order along the outputs, the first of
    them at the output `before` places in front of their own number.
    """

    first: int
    n: int
    taps: int
    last: int
    before: int


def residues(size: int, padding: int, stride: int, taps: int) -> Iterator[Residue]:
    """Along one dimension with `size` inputs.

    The output o reads the input i with the tap r = i + padding - o stride. Inputs first + j stride have
    first + padding = number stride + residue, so r = residue + t stride meets the output o = j + number - t.
    """
    for residue in range(stride):
        first = (residue - padding) % stride
        n = -(-(size - first) // stride)
        number = (first + padding - residue) // stride
        met = -(-(taps - residue) // stride) if residue < taps else 0
        if n > 0:
            yield Residue(first, n, met, residue + (met - 1) * stride, met - 1 - number)


def forward_walk(shape: Shape) -> Walk:
    """Over the inputs, for each output."""
    sizes = (shape.h, shape.w, shape.groups, quads(shape.c), (shape.r, shape.s), shape.p, shape.q)
    return Walk(*sizes, shape.stride, shape.padding)


def backward_walks(shape: Shape) -> Iterator[tuple[Walk, Target, tuple[int, int]]]:
    """Over the gradients of outputs, for each input; and where the gradients go, and the first tap of the filter."""
    channels = shape.groups * shape.c
    for down in residues(shape.h, shape.padding[0], shape.stride[0], shape.r):
        for right in residues(shape.w, shape.padding[1], shape.stride[1], shape.s):
            taps, before = (down.taps, right.taps), (down.before, right.before)
            if 0 in taps:
                taps = (0, 1)
            walk = Walk(shape.p, shape.q, shape.groups, quads(shape.k), taps, down.n, right.n, (1, 1), before)
            target = Target(
                channels, shape.c, down.n, right.n, shape.h, shape.w, shape.stride, (down.first, right.first)
            )
            yield walk, target, (down.last, right.last)
