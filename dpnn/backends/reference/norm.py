"""Normalisation. With r = 1 / sqrt(var + eps) and z = (x - mean) r, batch normalisation is y = weight z + bias.

Sums over the batch are taken in float64: in float32 a large mean would leave little of the variance.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import numpy as np

from dpnn.backends.base import Array, Mode, Slot, put
from dpnn.backends.reference.op import LayerOp
from dpnn.nn.graph import Node
from dpnn.nn.layer import Layer
from dpnn.nn.norm import BatchNorm, BatchNormalize, BatchSums, LocalResponseNorm

L = TypeVar("L", bound=Layer)
N = TypeVar("N", BatchNorm, BatchNormalize)


class ChannelOp(LayerOp[L]):
    """What has one value a channel: vectors (C,) beside activations (N, C, H, W) or (N, C)."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        super().__init__(node, slot, mode)
        self.others = (0, *range(2, self.x.ndim))
        """The dims that a value for each channel is summed over."""
        self.n_pixels = math.prod(self.x.shape[2:])

    def sum(self, array: Array) -> Array:
        """The sum over all but the channels, float64 (C,)."""
        total: Array = array.sum(axis=self.others, dtype=np.float64)
        return total

    def spread(self, vector: Array, dtype: np.dtype[Any] | None = None) -> Array:
        """A vector (C,) in a shape that multiplies activations, in their type unless told otherwise."""
        return vector.astype(dtype or self.x.dtype).reshape(-1, *(1,) * (self.x.ndim - 2))


class NormalizeOp(ChannelOp[N], ABC):
    """BatchNorm and BatchNormalize alike; they differ in whose mean and variance they take, and in dx."""

    m: int
    """How many numbers of a channel the mean and the variance were taken over."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        super().__init__(node, slot, mode)
        self.weight, self.bias = slot.param(node, "weight"), slot.param(node, "bias")
        self.mean, self.var = slot.param(node, "running_mean"), slot.param(node, "running_var")

    def bind_gradients(self, node: Node, slot: Slot) -> None:
        super().bind_gradients(node, slot)
        self.d_weight, self.d_bias = slot.d_param(node, "weight"), slot.d_param(node, "bias")
        self.d_running_mean = slot.d_param(node, "running_mean")
        self.d_running_var = slot.d_param(node, "running_var")

    def forward(self) -> None:
        if self.trains:
            self.mean, self.var, self.m = self.moments()
            share = self.step.rows / max(self.step.total, 1)
            put(self.d_running_mean, self.mean * share, self.step)
            put(self.d_running_var, self.var * (self.m / max(self.m - 1, 1) * share), self.step)
        self.r = 1 / np.sqrt(self.var + self.layer.eps)
        self.y[: self.step.rows] = self.z() * self.spread(self.weight) + self.spread(self.bias)

    def backward(self) -> None:
        dy, z = self.dy[: self.step.rows], self.z()
        d_weight, d_bias = self.sum(dy * z), self.sum(dy)
        put(self.d_weight, d_weight, self.step)
        put(self.d_bias, d_bias, self.step)
        self.backward_x(dy, z, d_weight, d_bias)

    def z(self) -> Array:
        """The normalised input, (rows, C, ...)."""
        return (self.x[: self.step.rows] - self.spread(self.mean)) * self.spread(self.r)

    @abstractmethod
    def moments(self) -> tuple[Array, Array, int]:
        """Mean and (biased) variance of each channel, float64 (C,), and over how many numbers; zeros over none."""

    @abstractmethod
    def backward_x(self, dy: Array, z: Array, d_weight: Array, d_bias: Array) -> None:
        """What goes back to the inputs, from the micro-batch's own gradients of weight and bias, float64 (C,)."""


class BatchNormOp(NormalizeOp[BatchNorm]):
    """Over this rank's rows: dx = weight r (dy - (d_bias + z d_weight) / m)."""

    def moments(self) -> tuple[Array, Array, int]:
        x = self.x[: self.step.rows]
        m = self.step.rows * self.n_pixels
        mean = self.sum(x) / max(m, 1)
        return mean, self.sum((x - self.spread(mean, np.dtype(np.float64))) ** 2) / max(m, 1), m

    def backward_x(self, dy: Array, z: Array, d_weight: Array, d_bias: Array) -> None:
        if self.dx is not None:
            m = max(self.m, 1)
            centred = dy - self.spread(d_bias / m) - z * self.spread(d_weight / m)
            self.dx[: self.step.rows] = centred * self.spread(self.weight * self.r)


class BatchNormalizeOp(NormalizeOp[BatchNormalize]):
    """Over the rows of all replicas. With mean and variance as inputs beside x, of this rank's rows:

    dx = dy weight r,   d_mean = -weight r d_bias,   d_var = -weight r² d_weight / 2.
    """

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        super().__init__(node, slot, mode)
        if self.trains:
            self.sums = slot.input(node, 1)

    def bind_gradients(self, node: Node, slot: Slot) -> None:
        super().bind_gradients(node, slot)
        self.d_sums = slot.d_input(node, 1)

    def moments(self) -> tuple[Array, Array, int]:
        m = self.step.batch * self.n_pixels
        mean, mean_square = self.sums / max(m, 1)
        return mean, np.maximum(mean_square - mean**2, 0), m

    def backward_x(self, dy: Array, z: Array, d_weight: Array, d_bias: Array) -> None:
        if self.dx is not None:
            self.dx[: self.step.rows] = dy * self.spread(self.weight * self.r)
        if self.d_sums is not None:
            self.d_sums[0] = -self.weight * self.r * d_bias
            self.d_sums[1] = -self.weight * self.r**2 * d_weight / 2


class BatchSumsOp(ChannelOp[BatchSums]):
    """y (2, C) = the sums of x and x²; dy (2, C) = the derivatives by mean and variance (see nn.norm.BatchSums)."""

    def forward(self) -> None:
        x = self.x[: self.step.rows]
        self.y[0] = self.sum(x)
        self.y[1] = self.sum(np.square(x, dtype=np.float64))

    def backward(self) -> None:
        if self.dx is None:
            return
        m = max(self.step.batch * self.n_pixels, 1)
        d_mean, d_var = self.dy / m
        mean = self.y[0] / m
        offset = self.x[: self.step.rows] - self.spread(mean)
        self.dx[: self.step.rows] = offset * self.spread(2 * d_var) + self.spread(d_mean)


class LocalResponseNormOp(LayerOp[LocalResponseNorm]):
    """y = x d^-beta with d = k + alpha / size * (sum of x² over the window);

    dx = dy d^-beta - 2 alpha beta / size * x * (sum of dy x d^(-beta-1) over the windows that see x).
    """

    def forward(self) -> None:
        x = self.x[: self.step.rows]
        self.y[: self.step.rows] = x * self._d(x) ** -self.layer.beta

    def backward(self) -> None:
        if self.dx is None:
            return
        layer, x, dy = self.layer, self.x[: self.step.rows], self.dy[: self.step.rows]
        d = self._d(x)
        seen = dy * x * d ** (-layer.beta - 1)
        # Channel c sees size // 2 channels before it, so that many after it are where c is seen from.
        seen_by = _sum_of_neighbours(seen, before=(layer.size - 1) // 2, after=layer.size // 2)
        self.dx[: self.step.rows] = dy * d**-layer.beta - 2 * layer.alpha * layer.beta / layer.size * x * seen_by

    def _d(self, x: Array) -> Array:
        layer = self.layer
        squares = _sum_of_neighbours(x * x, before=layer.size // 2, after=(layer.size - 1) // 2)
        return layer.k + layer.alpha / layer.size * squares


def _sum_of_neighbours(x: Array, before: int, after: int) -> Array:
    """The sum over the channels c - before ... c + after of (N, C, H, W), zeros beyond the ends."""
    padded = np.pad(x, ((0, 0), (before, after), (0, 0), (0, 0)))
    total = np.zeros_like(x)
    for offset in range(before + 1 + after):
        total += padded[:, offset : offset + x.shape[1]]
    return total
