"""Layers that work on each number by itself, or only change the shape."""

import math
from dataclasses import dataclass
from typing import ClassVar

from dpnn.nn.layer import Layer, Shape


@dataclass(frozen=True)
class ReLU(Layer):
    """max(x, 0)."""

    def infer(self, *shapes: Shape) -> Shape:
        return shapes[0]


@dataclass(frozen=True)
class Dropout(Layer):
    """In training each number is 0 with probability `rate`, else divided by 1 - `rate` (Srivastava et al. 2014).

    Which ones depends on the run's seed, the epoch, the sample's id and the layer's name only: not on the rank that
    has the sample, nor on its place in the batch. Evaluation copies. Inputs: (x, ids).
    """

    rate: float = 0.5

    reads_ids: ClassVar[bool] = True

    def infer(self, *shapes: Shape) -> Shape:
        if not 0 <= self.rate < 1:
            raise self._error(f"rate = {self.rate}; use 0 or more, less than 1")
        return shapes[0]


@dataclass(frozen=True)
class Flatten(Layer):
    """(C, H, W) -> (C H W,), in that order."""

    def infer(self, *shapes: Shape) -> Shape:
        return (math.prod(shapes[0]),)
