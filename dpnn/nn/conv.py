"""Convolution."""

import math
from dataclasses import dataclass

from dpnn.nn.layer import Layer, ParamSpec, Shape, pair
from dpnn.nn.window import Size, slide


@dataclass(frozen=True)
class Conv(Layer):
    """`filters` filters of `size` over the image: (C, H, W) -> (filters, P, Q).

    As everywhere in this field it is a cross-correlation: the filter isn't mirrored. `size`, `stride` and `padding`
    (with zeros, on both sides) are one number or (rows, columns). With `groups` = G, input and output channels are cut
    into G runs, and each run of filters sees its own run of inputs only (Krizhevsky et al. 2012).
    Parameters: weight (filters, C / G, rows, columns), bias (filters,).
    """

    filters: int
    size: Size
    stride: Size = 1
    padding: Size = 0
    groups: int = 1
    bias: bool = True

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 1 or len(shapes[0]) != 3:
            raise self._misfit(shapes, "an image (C, H, W)")
        if self.filters < 1 or self.groups < 1:
            raise self._error(f"filters = {self.filters}, groups = {self.groups}; use 1 or more of both")
        for what, n in (("filters", self.filters), ("input channels", shapes[0][0])):
            if n % self.groups:
                raise self._error(f"{what} = {n} can't be divided among groups = {self.groups}; use a divisor of {n}")
        return (self.filters, *slide(self._who, shapes[0], self.size, self.stride, self.padding))

    def params(self, *shapes: Shape) -> dict[str, ParamSpec]:
        size = pair(self.size)
        channels = shapes[0][0] // self.groups
        fan_in = channels * math.prod(size)
        specs = {"weight": ParamSpec((self.filters, channels, *size), "he", fan_in, decay=True)}
        if self.bias:
            specs["bias"] = ParamSpec((self.filters,), "zeros")
        return specs
