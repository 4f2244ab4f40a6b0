"""What a convolution's algorithms have in common: its numbers, its arrays, scratch cut out of bytes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol, cast

import numpy as np

from dpnn.backends.base import Array, Step
from dpnn.native import Call
from dpnn.nn.conv import Conv
from dpnn.nn.graph import Node
from dpnn.nn.layer import pair

Direction = Literal["forward", "backward_data", "backward_weights"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward_data", "backward_weights")
Shapes = Mapping[str, tuple[int, ...]]
"""The scratch arrays that an algorithm wants, float32, by name."""

_LINE = 64


@dataclass(frozen=True)
class Geometry:
    """A convolution of `n` images; letters as in `backends.base`."""

    n: int
    c: int
    h: int
    w: int
    k: int
    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    p: int
    q: int

    @classmethod
    def of(cls, node: Node, n: int) -> "Geometry":
        """Of a Conv node, for n rows."""
        layer = cast(Conv, node.layer)
        sizes = pair(layer.size), pair(layer.stride), pair(layer.padding)
        (c, h, w), (k, p, q) = node.input_shapes[0], node.shape
        return cls(n, c, h, w, k, *sizes, layer.groups, p, q)

    @property
    def multiply_adds(self) -> int:
        """Of one direction."""
        return self.n * self.p * self.q * self.k * self.c // self.groups * math.prod(self.size)

    @property
    def key(self) -> str:
        """A name for the shape: what a choice is remembered by."""
        numbers = (self.n, self.c, self.h, self.w, self.k, *self.size, *self.stride, *self.padding, self.groups)
        return "x".join(map(str, numbers))

    def channels(self, group: int) -> tuple[slice, slice]:
        """The input and the output channels of a group."""
        c, k = self.c // self.groups, self.k // self.groups
        return slice(group * c, (group + 1) * c), slice(group * k, (group + 1) * k)


def _nothing() -> Array:
    return np.empty(0, np.float32)


@dataclass
class Bound:
    """The arrays of a convolution of a certain number of rows; images as (N, H, W, C), the filters as (K, C, R, S).

    Each direction has set those that it reads and writes.
    """

    w: Array
    x: Array = field(default_factory=_nothing)
    y: Array = field(default_factory=_nothing)
    dx: Array = field(default_factory=_nothing)
    dy: Array = field(default_factory=_nothing)
    dw: Array = field(default_factory=_nothing)
    bias: Array | None = None
    relu: bool = False
    scale: Array | None = None
    """In evaluation, a factor for each output channel that a BatchNorm behind the convolution gives; bias is then the
    rest of it."""


class Algorithm(Protocol):
    """One way to compute convolutions."""

    name: str

    def applies(self, g: Geometry, direction: Direction) -> bool:
        """Whether it computes this direction of such a convolution."""
        ...

    def nbytes(self, g: Geometry, direction: Direction) -> int:
        """Bytes of scratch."""
        ...

    def bind(self, g: Geometry, direction: Direction, room: Array, arrays: Bound, step: Step) -> list[Call]:
        """The calls that compute it, with `room` as scratch."""
        ...


def nbytes(shapes: Shapes) -> int:
    """The bytes that `cut` needs for them."""
    return sum(-(-math.prod(shape) * 4 // _LINE) * _LINE for shape in shapes.values())


def cut(block: Array, shapes: Shapes) -> dict[str, Array]:
    """The arrays, out of a block of bytes; out of memory of their own where the block is too small."""
    arrays: dict[str, Array] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * 4
        raw = block[offset:end] if end <= block.size else np.empty(math.prod(shape) * 4, np.uint8)
        arrays[name] = raw.view(np.float32).reshape(shape)
        offset = -(-end // _LINE) * _LINE
    return arrays


def copy_window(x: Array, window: Array, corner: tuple[int, int]) -> Iterator[Call]:
    """Into `window` (N, rows, columns, C) what x (N, H, W, C) has from `corner` on, zeros outside of x."""
    bounds = []
    for start, extent, n in zip(corner, window.shape[1:3], x.shape[1:3], strict=True):
        lo, hi = max(-start, 0), min(n - start, extent)
        bounds.append((lo, max(lo, hi)))
    (top, bottom), (left, right) = bounds
    for outside in (window[:, :top], window[:, bottom:], window[:, top:bottom, :left], window[:, top:bottom, right:]):
        if outside.size:
            yield partial(outside.fill, 0.0)
    inside = window[:, top:bottom, left:right]
    if inside.size:
        source = x[:, corner[0] + top : corner[0] + bottom, corner[1] + left : corner[1] + right]
        yield partial(np.copyto, inside, source)


def images_last(x: Array) -> Array:
    """(N, C, H, W) seen as (N, H, W, C), which is contiguous where the plan keeps images channels-last."""
    return x.transpose(0, 2, 3, 1)
