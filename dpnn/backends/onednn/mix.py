"""Sums of normalised and plain inputs, with a ReLU: BatchNorm, Add, ReLU, and what a residual block ends in, in one.

    y = ReLU( sum over normalised inputs (weight (x - mean) r + bias) + sum over plain inputs x )

with r = 1 / sqrt(var + eps).

In training a first pass takes the sums of x - x0 and its square, x0 being one pixel, so that a large mean cancels
nothing; a second makes y. Backward a first pass makes dz (dy where the ReLU let it pass) and the sums of dz and
dz (x - mean), a second makes each dx = weight r (dz - sum(dz) / m - (x - mean) r² sum(dz (x - mean)) / m).
"""

import math
from functools import partial
from typing import cast

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Slot, put
from dpnn.backends.onednn.op import CallsOp, Tools, flat
from dpnn.native import Call, Kernels
from dpnn.nn.graph import Node
from dpnn.nn.norm import BatchNorm, BatchNormalize


class Norm:
    """One normalised input: its arrays, and what its passes hand on to one another, (C,) each.

    The moments are those of the micro-batch's own rows.
    """

    def __init__(self, node: Node, slot: Slot, mode: Mode, kernels: Kernels) -> None:
        c, trains = node.shape[0], mode == "train" and node.needs_grad
        self.x, self.eps, self.step = slot.input(node), cast(BatchNorm, node.layer).eps, slot.step
        self.kernels, self.n_pixels = kernels, math.prod(node.shape[1:])
        self.weight, self.bias = slot.param(node, "weight"), slot.param(node, "bias")
        self.running = slot.param(node, "running_mean"), slot.param(node, "running_var")
        self.mean, self.r, self.sums = np.empty(c), np.empty(c), np.empty((2, c))
        self.work = np.empty((kernels.threads, 4, c))
        self.centre, self.a, self.b, self.d = (np.empty(c, np.float32) for _ in range(4))
        self.dx: Array | None = None
        if trains:
            self.dx = slot.d_input(node)
            self.d_weight, self.d_bias = slot.d_param(node, "weight"), slot.d_param(node, "bias")
            self.d_running = slot.d_param(node, "running_mean"), slot.d_param(node, "running_var")

    def bind_moments(self, rows: int) -> list[Call]:
        """The calls that make mean and variance for the second pass, and the running statistics' share."""
        x = flat(self.x, rows)
        moments = self.kernels.bind("moments", *x.shape, x, self.centre, self.sums, len(self.work), self.work)
        return [self._take_centre, moments, partial(self._use_moments, len(x))]

    def _take_centre(self) -> None:
        """x0: the first pixel."""
        np.copyto(self.centre, flat(self.x, 1)[0])

    def _use_moments(self, m: int) -> None:
        offset, square = self.sums / m
        self._use_batch(self.centre + offset, square - offset * offset, m)

    def _use_batch(self, mean: Array, var: Array, m: int) -> None:
        """Mean and biased variance of m numbers a channel."""
        step = self.step
        np.copyto(self.mean, mean)
        np.maximum(var, 0.0, out=var)
        share = step.rows / max(step.total, 1)
        put(self.d_running[0], mean * share, step)
        put(self.d_running[1], var * (m / max(m - 1, 1) * share), step)
        self._use(mean, var)
        np.copyto(self.centre, mean)

    def use_running(self) -> None:
        """The same from the running statistics, in evaluation."""
        self._use(*self.running)

    def _use(self, mean: Array, var: Array) -> None:
        """y = a x + b."""
        np.divide(1.0, np.sqrt(var + self.eps), out=self.r)
        factor = self.weight * self.r
        self.a[...] = factor
        self.b[...] = self.bias - mean * factor

    def use_gradients(self, s: Array, p: Array, m: int) -> None:
        """The parameters' gradients from the sums of dz and of dz (x - mean); dx = a dz + b x + d."""
        put(self.d_bias, s, self.step)
        put(self.d_weight, p * self.r, self.step)
        factor = self.weight * self.r
        self._use_slope(factor, s, -factor * self.r**2 * p / m, m)

    def _use_slope(self, factor: Array, s: Array, slope: Array, m: int) -> None:
        self.a[...] = factor
        self.b[...] = slope
        self.d[...] = -factor * s / m - slope * self.mean

    def zero(self) -> None:
        """What else backward writes where there are no rows."""


class SyncNorm(Norm):
    """The same with the moments of all replicas' rows; what goes back through them is their gradient's, not dx's."""

    def __init__(self, node: Node, slot: Slot, mode: Mode, kernels: Kernels) -> None:
        super().__init__(node, slot, mode, kernels)
        if mode == "train":
            self.collected = slot.input(node, 1)
            self.d_collected = slot.d_input(node, 1) if node.needs_grad else None

    def bind_moments(self, rows: int) -> list[Call]:
        return [self._use_collected]

    def _use_collected(self) -> None:
        m = self.step.batch * self.n_pixels
        mean, square = self.collected / max(m, 1)
        self._use_batch(mean, square - mean * mean, m)

    def zero(self) -> None:
        if self.d_collected is not None:
            self.d_collected.fill(0.0)

    def _use_slope(self, factor: Array, s: Array, slope: Array, m: int) -> None:
        """dx = a dz; d_mean = -weight r sum(dz), d_var = -weight r³ sum(dz (x - mean)) / 2, of this rank's rows."""
        self.a[...] = factor
        self.b.fill(0.0)
        self.d.fill(0.0)
        if self.d_collected is not None:
            np.multiply(factor, -s, out=self.d_collected[0])
            np.multiply(slope, m / 2, out=self.d_collected[1])


class MixOp(CallsOp):
    """The group's inputs: those of BatchNorm nodes are normalised, all others are plain."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        super().__init__(group, slot, mode, tools)
        self.view, self.training = group.forward_view, mode == "train"
        self.norms: list[Norm] = []
        self.plains: list[Array] = []
        self.d_plains: list[Array] = []
        for node, i in group.inputs:
            if isinstance(node.layer, BatchNorm | BatchNormalize):
                if i == 0:
                    kind = Norm if isinstance(node.layer, BatchNorm) else SyncNorm
                    self.norms.append(kind(node, slot, mode, tools.kernels))
            else:
                self.plains.append(slot.input(node, i))
                dx = slot.d_input(node, i) if self.tail.trains else None
                self.d_plains += [] if dx is None else [dx]
        self.summand = np.empty(self.tail.channels, np.float32)
        self.sums = np.empty((1 + len(self.norms), self.tail.channels))
        self._backward[0] += [norm.zero for norm in self.norms]
        self.prepare(len(self.tail.y))

    def bind_forward(self, rows: int) -> list[Call]:
        if self.view:
            return []
        calls: list[Call] = []
        for norm in self.norms:
            calls += norm.bind_moments(rows) if self.training else [norm.use_running]
        if self.norms:
            calls.append(self._add_summands)
        y, xs = flat(self.tail.y, rows), [flat(norm.x, rows) for norm in self.norms]
        plains = [flat(x, rows) for x in self.plains]
        return [
            *calls,
            self.tools.kernels.bind(
                "combine", *y.shape, len(xs), xs, [norm.a for norm in self.norms], self.summand if xs else None,
                len(plains), plains, self.tail.relu, y,
            ),
        ]  # fmt: skip

    def _add_summands(self) -> None:
        np.sum([norm.b for norm in self.norms], axis=0, out=self.summand)

    def bind_backward(self, rows: int) -> list[Call]:
        dz = flat(self.tail.dys[0], rows)
        copies = [dx for dx in (flat(dx, rows) for dx in self.d_plains) if dx.ctypes.data != dz.ctypes.data]
        xs, centres = [flat(norm.x, rows) for norm in self.norms], [norm.centre for norm in self.norms]
        calls = self.tail.gather(rows, self.sums if self.norms else None, copies, xs, centres)
        # The gradient that is written over dz comes last.
        pairs = list(zip(self.norms, xs, self.sums[1:], strict=True))
        for norm, x, p in sorted(pairs, key=lambda item: _start(item[0].dx) == dz.ctypes.data):
            calls.append(partial(norm.use_gradients, self.sums[0], p, len(dz)))
            if norm.dx is not None:
                dx = flat(norm.dx, rows)
                calls.append(
                    self.tools.kernels.bind("normalize_gradient", *dz.shape, dz, x, norm.a, norm.b, norm.d, dx)
                )
        return calls


class BatchSumsOp(CallsOp):
    """BatchSums: the sums of x and x², and dx = d_mean / M + (x - mean) 2 d_var / M (see nn.norm.BatchSums)."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        super().__init__(group, slot, mode, tools)
        node = group.nodes[0]
        self.x, c = slot.input(node), self.tail.channels
        self.n_pixels = math.prod(node.input_shapes[0][1:])
        self.dx = slot.d_input(node) if self.tail.trains else None
        self.work = np.empty((tools.kernels.threads, 2, c))
        self.zero, self.b, self.d = np.zeros(c, np.float32), np.empty(c, np.float32), np.empty(c, np.float32)
        self._forward[0] = [partial(self.tail.y.fill, 0.0)]
        self.prepare(len(self.x))

    def bind_forward(self, rows: int) -> list[Call]:
        x = flat(self.x, rows)
        return [self.tools.kernels.bind("sums", *x.shape, x, self.tail.y, len(self.work), self.work)]

    def bind_backward(self, rows: int) -> list[Call]:
        if self.dx is None:
            return []
        x, dx = flat(self.x, rows), flat(self.dx, rows)
        line = (self.zero, self.b, self.d)
        return [self._use_gradients, self.tools.kernels.bind("normalize_gradient", *x.shape, x, x, *line, dx)]

    def _use_gradients(self) -> None:
        m = max(self.step.batch * self.n_pixels, 1)
        d_mean, d_var = self.tail.dys[0] / m
        self.b[...] = 2 * d_var
        self.d[...] = d_mean - 2 * d_var * self.tail.y[0] / m


def _start(array: Array | None) -> int:
    return 0 if array is None else array.ctypes.data
