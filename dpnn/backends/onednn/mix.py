"""Sums of normalised and plain inputs, with a ReLU: BatchNorm, Add, ReLU, and what a residual block ends in, in one.

    y = ReLU( sum over normalised inputs (weight (x - mean) r + bias) + sum over plain inputs x )

with r = 1 / sqrt(var + eps).

In training a first pass takes the sums of x - x0 and its square, x0 being one pixel, so that a large mean cancels
nothing; a second makes y. Backward a first pass makes dz (dy where the ReLU let it pass) and the sums of dz and
dz (x - mean), a second makes each dx = weight r (dz - sum(dz) / m - (x - mean) r² sum(dz (x - mean)) / m).
"""

from functools import partial
from typing import cast

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Slot, put
from dpnn.backends.onednn.op import CallsOp, Tools, flat
from dpnn.native import Call
from dpnn.nn.graph import Node
from dpnn.nn.norm import BatchNorm


class Norm:
    """One normalised input: its arrays, and what its passes hand on to one another, (C,) each."""

    def __init__(self, node: Node, slot: Slot, trains: bool, threads: int) -> None:
        c = node.shape[0]
        self.x, self.eps, self.step = slot.input(node), cast(BatchNorm, node.layer).eps, slot.step
        self.weight, self.bias = slot.param(node, "weight"), slot.param(node, "bias")
        self.running = slot.param(node, "running_mean"), slot.param(node, "running_var")
        self.mean, self.r, self.sums = np.empty(c), np.empty(c), np.empty((2, c))
        self.work = np.empty((threads, 4, c))
        self.centre, self.a, self.b, self.d = (np.empty(c, np.float32) for _ in range(4))
        self.dx: Array | None = None
        if trains:
            self.dx = slot.d_input(node)
            self.d_weight, self.d_bias = slot.d_param(node, "weight"), slot.d_param(node, "bias")
            self.d_running = slot.d_param(node, "running_mean"), slot.d_param(node, "running_var")

    def take_centre(self) -> None:
        """x0: the first pixel."""
        np.copyto(self.centre, flat(self.x, 1)[0])

    def use_moments(self, m: int) -> None:
        """Mean and variance of m numbers a channel, for the second pass; and the running statistics' share."""
        step = self.step
        offset, square = self.sums / m
        np.add(self.centre, offset, out=self.mean)
        var = np.maximum(square - offset * offset, 0.0)
        share = step.rows / max(step.total, 1)
        put(self.d_running[0], self.mean * share, step)
        put(self.d_running[1], var * (m / max(m - 1, 1) * share), step)
        self._use(self.mean, var)
        np.copyto(self.centre, self.mean)

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
        slope = -factor * self.r**2 * p / m
        self.a[...] = factor
        self.b[...] = slope
        self.d[...] = -factor * s / m - slope * self.mean


class MixOp(CallsOp):
    """The group's inputs: those of BatchNorm nodes are normalised, all others are plain."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        super().__init__(group, slot, mode, tools)
        self.view, self.training = group.forward_view, mode == "train"
        trains, edges = self.tail.trains, group.inputs
        norms = [node for node, _ in edges if isinstance(node.layer, BatchNorm)]
        self.norms = [Norm(node, slot, trains, tools.kernels.threads) for node in norms]
        plain = [(node, i) for node, i in edges if not isinstance(node.layer, BatchNorm)]
        self.plains = [slot.input(node, i) for node, i in plain]
        self.d_plains = [dx for node, i in plain if trains and (dx := slot.d_input(node, i)) is not None]
        self.summand = np.empty(self.tail.channels, np.float32)
        self.sums = np.empty((1 + len(self.norms), self.tail.channels))
        self.prepare()

    def bind_forward(self, rows: int) -> list[Call]:
        if self.view:
            return []
        calls: list[Call] = []
        for norm in self.norms:
            if self.training:
                x = flat(norm.x, rows)
                calls.append(norm.take_centre)
                calls.append(self.tools.kernels.bind("moments", *x.shape, x, norm.centre, norm.sums, norm.work))
                calls.append(partial(norm.use_moments, len(x)))
            else:
                calls.append(norm.use_running)
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


def _start(array: Array | None) -> int:
    return 0 if array is None else array.ctypes.data
