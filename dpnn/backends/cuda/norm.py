"""Batch normalisation, on one replica and over all: kernels/norm.cu."""

import math
from abc import ABC, abstractmethod
from typing import TypeVar

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Room, Slot
from dpnn.backends.cuda.device import Device, blocks
from dpnn.backends.cuda.op import KernelOp, L
from dpnn.backends.cuda.tiling import Tiling
from dpnn.nn.norm import BatchNorm, BatchNormalize, BatchSums

N = TypeVar("N", BatchNorm, BatchNormalize)

_FILE = "norm.cu"
_ACROSS, _DOWN = 8, 32
"""Channels and chunks of a block of those kernels that add up over chunks."""


class ChannelOp(KernelOp[L]):
    """Activations as (pixels, C) and what has one value a channel; sums of blocks of pixels lie in scratch."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.channels, self.n_pixels = self.x.shape[1], math.prod(self.x.shape[2:])
        self.tiling = Tiling(self.channels, device)
        self.over_chunks = blocks(self.channels, _ACROSS), (_ACROSS, _DOWN)

    @staticmethod
    def partial_nbytes(group: Group, rows: int, device: Device) -> int:
        """Of two sums of each channel, float64, of each chunk of pixels."""
        channels, *image = group.nodes[0].input_shapes[0]
        return 16 * channels * Tiling(channels, device).grid(rows * math.prod(image))[1]


class NormalizeOp(ChannelOp[N], ABC):
    """BatchNorm and BatchNormalize alike; they differ in whose mean and variance they take, and in dx.

    Kept from forward to backward: mean and variance, float32 (2, C).
    """

    centre: Array | None = None
    """What dx owes to the batch's mean and variance, float32 (2, C), where they are made of this op's x."""
    d_sums: Array | None = None
    """The derivatives by mean and variance, float64 (2, C), where these are made of an input."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.weight, self.bias = slot.param(self.node, "weight"), slot.param(self.node, "bias")
        self.mean, self.var = slot.param(self.node, "running_mean"), slot.param(self.node, "running_var")
        if self.trains:
            kept = slot.room(group)[0]
            self.mean, self.var = kept[: 4 * self.channels], kept[4 * self.channels :]
        self._moments = device.kernel(_FILE, "batch_moments")
        self._normalize = self.tiling.kernel(_FILE, "batch_normalize")
        self._gradient_sums = self.tiling.kernel(_FILE, "batch_gradient_sums")
        self._gradients = device.kernel(_FILE, "batch_gradients")
        self._gradient = self.tiling.kernel(_FILE, "batch_normalize_gradient")

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        super().bind_gradients(group, slot)
        self.partial_gradients = slot.room(group)[2]

    @abstractmethod
    def put_moments(self, rows: int) -> None:
        """Mean, variance and the gradients of running statistics."""

    def moments_of(self, sums: Array, chunks: int, n: int, rows: int) -> None:
        """Those of sums, float64 (chunks, 2, C), of n numbers a channel."""
        d = self.d_params
        share = np.float64(rows / max(self.step.total, 1))
        self._moments(
            *self.over_chunks, sums, chunks, np.int64(n), share, self.mean, self.var,
            d["running_mean"], d["running_var"], self.add, self.channels,
        )  # fmt: skip

    def run_forward(self, rows: int) -> None:
        if self.trains:
            self.put_moments(rows)
        pixels = rows * self.n_pixels
        self._normalize(
            self.tiling.grid(pixels), self.tiling.block, self.x, self.mean, self.var, self.weight, self.bias, self.y,
            self.layer.eps, int(self.relu), np.int64(pixels), self.channels,
        )  # fmt: skip

    def run_backward(self, rows: int) -> None:
        pixels, eps, d = rows * self.n_pixels, self.layer.eps, self.d_params
        grid, block = self.tiling.grid(pixels), self.tiling.block
        affine = self.mean, self.var, self.weight, self.bias
        size = eps, int(self.relu), np.int64(pixels), self.channels
        self._gradient_sums(grid, block, self.x, self.dy, *affine, self.partial_gradients, *size)
        self._gradients(
            *self.over_chunks, self.partial_gradients, grid[1], np.int64(pixels), self.var, self.weight, eps,
            d["weight"], d["bias"], self.add, self.centre, self.d_sums, self.channels,
        )  # fmt: skip
        if self.dx is not None:
            self._gradient(grid, block, self.x, self.dy, *affine, self.centre, self.dx, *size)


class BatchNormOp(NormalizeOp[BatchNorm]):
    """Over this rank's rows."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.partial = slot.room(group)[1]
        self._sums = self.tiling.kernel(_FILE, "batch_sums")

    @classmethod
    def room(cls, group: Group, rows: int, mode: Mode, device: Device) -> Room:
        channels, partial = group.nodes[0].shape[0], cls.partial_nbytes(group, rows, device)
        return Room(8 * channels, partial, partial + 8 * channels) if mode == "train" else Room()

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        super().bind_gradients(group, slot)
        self.centre = self.partial_gradients[-8 * self.x.shape[1] :]

    def put_moments(self, rows: int) -> None:
        pixels = rows * self.n_pixels
        grid = self.tiling.grid(pixels)
        self._sums(grid, self.tiling.block, self.x, self.partial, np.int64(pixels), self.channels)
        self.moments_of(self.partial, grid[1], pixels, rows)


class BatchNormalizeOp(NormalizeOp[BatchNormalize]):
    """Over the rows of all replicas, whose sums are the second input."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        if self.trains:
            self.sums = slot.input(self.node, 1)

    @classmethod
    def room(cls, group: Group, rows: int, mode: Mode, device: Device) -> Room:
        kept = 8 * group.nodes[0].shape[0]
        return Room(kept, 0, cls.partial_nbytes(group, rows, device)) if mode == "train" else Room()

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        super().bind_gradients(group, slot)
        self.d_sums = slot.d_input(self.node, 1)

    def put_moments(self, rows: int) -> None:
        self.moments_of(self.sums, 1, self.step.batch * self.n_pixels, rows)

    def nothing_backward(self) -> None:
        super().nothing_backward()
        if self.d_sums is not None:
            self.device.zero(self.d_sums)


class BatchSumsOp(ChannelOp[BatchSums]):
    """y (2, C) = the sums of x and x²; dy (2, C) = the derivatives by mean and variance (see nn.norm.BatchSums)."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.partial = slot.room(group)[1]
        self._sums = self.tiling.kernel(_FILE, "batch_sums")
        self._total = device.kernel(_FILE, "batch_total")
        self._gradient = self.tiling.kernel(_FILE, "batch_sums_gradient")

    @classmethod
    def room(cls, group: Group, rows: int, mode: Mode, device: Device) -> Room:
        return Room(forward=cls.partial_nbytes(group, rows, device))

    def run_forward(self, rows: int) -> None:
        pixels = rows * self.n_pixels
        grid = self.tiling.grid(pixels)
        self._sums(grid, self.tiling.block, self.x, self.partial, np.int64(pixels), self.channels)
        self._total(*self.over_chunks, self.partial, grid[1], self.y, self.channels)

    def nothing_forward(self) -> None:
        self.device.zero(self.y)

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            n, pixels = self.step.batch * self.n_pixels, rows * self.n_pixels
            self._gradient(
                self.tiling.grid(pixels), self.tiling.block, self.x, self.y, self.dy, self.dx,
                np.int64(n), np.int64(pixels), self.channels,
            )  # fmt: skip
