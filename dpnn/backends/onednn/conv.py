"""Convolution: which algorithm, chosen once by timing for each direction and shape; then its calls."""

from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import cast

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Room, Slot, Step, put
from dpnn.backends.onednn.choices import Choices
from dpnn.backends.onednn.geometry import DIRECTIONS, Algorithm, Bound, Direction, Geometry, images_last
from dpnn.backends.onednn.op import CallsOp, Tools
from dpnn.native import Call, denormals_flushed
from dpnn.nn.conv import Conv
from dpnn.nn.norm import BatchNorm, BatchNormalize

_TRIVIAL = 1 << 22
"""Multiply-adds below which nothing is timed."""
_LONG_S, _ENOUGH_S = 0.1, 0.05
"""A call so long needs to be timed once only; short ones are repeated for about so long."""


class Kit:
    """What every convolution works with: our tools, the algorithms, the choices made among them."""

    def __init__(self, tools: Tools, algorithms: Sequence[Algorithm], choices: Choices) -> None:
        self.tools, self._algorithms, self._choices = tools, algorithms, choices

    def algorithms(self, g: Geometry, direction: Direction) -> dict[str, Algorithm]:
        """Those that can be used, by name, the best guess first; the first of all as a last resort."""
        found = [algorithm for algorithm in self._algorithms if algorithm.applies(g, direction)]
        return {algorithm.name: algorithm for algorithm in found or self._algorithms[:1]}

    def choose(self, g: Geometry, direction: Direction) -> Algorithm:
        """The fastest algorithm, as timed now or before."""
        found = self.algorithms(g, direction)
        if len(found) == 1 or g.multiply_adds < _TRIVIAL:
            return next(iter(found.values()))
        question = f"{direction} {g.key}"
        return found[self._choices.fastest(question, list(found), lambda name: self.time(g, direction, found[name]))]

    def time(self, g: Geometry, direction: Direction, algorithm: Algorithm) -> float:
        """Seconds of one call, on arrays of ones (memory never written would be one page of zeros)."""
        x, y = (np.ones(shape, np.float32) for shape in ((g.n, g.h, g.w, g.c), (g.n, g.p, g.q, g.k)))
        w, dw = (np.ones((g.k, g.c // g.groups, *g.size), np.float32) for _ in range(2))
        room = np.ones(algorithm.nbytes(g, direction), np.uint8)
        calls = algorithm.bind(g, direction, room, Bound(w, x, y, dx=x, dy=y, dw=dw), Step())
        times: list[float] = []
        with denormals_flushed():
            # The first one warms up.
            while len(times) < 2 or (min(times) < _LONG_S and (len(times) < 4 or sum(times) < _ENOUGH_S)):
                begin = perf_counter()
                for call in calls:
                    call()
                times.append(perf_counter() - begin)
        return min(times)


class ConvOp(CallsOp):
    """Conv, in evaluation BatchNorm, then ReLU and Fork, in one."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, kit: Kit) -> None:
        super().__init__(group, slot, mode, kit.tools)
        self.kit, self.node = kit, group.nodes[0]
        node, layer = self.node, cast(Conv, self.node.layer)
        self.x, self.w = slot.input(node), slot.param(node, "weight")
        self.capacity = len(self.x)
        self.bias = slot.param(node, "bias") if layer.bias else None
        self.norm = None
        norms = [n for n in group.nodes if isinstance(n.layer, BatchNorm | BatchNormalize)]
        if norms:
            roles = ("weight", "bias", "running_mean", "running_var")
            self.norm = [slot.param(norms[0], role) for role in roles]
            self.eps = cast(BatchNorm, norms[0].layer).eps
            self.scale, self.shift = np.empty(node.shape[0], np.float32), np.empty(node.shape[0], np.float32)
        if self.tail.trains:
            self.dx = slot.d_input(node)
            self.dw = slot.d_param(node, "weight")
            if layer.bias:
                self.d_bias = slot.d_param(node, "bias")
                self.total = np.empty((1, node.shape[0]))
        self.prepare(len(self.tail.y))

    def bind_forward(self, rows: int) -> list[Call]:
        arrays = Bound(self.w, images_last(self.x[:rows]), images_last(self.tail.y[:rows]), relu=self.tail.relu)
        calls: list[Call] = []
        if self.norm is not None:
            calls.append(self._fold)
            arrays.scale, arrays.bias = self.scale, self.shift
        elif self.bias is not None:
            arrays.bias = self.bias
        return [*calls, *self._bind("forward", rows, self.room_forward, arrays)]

    def bind_backward(self, rows: int) -> list[Call]:
        calls = self.tail.gather(rows, self.total if self.bias is not None else None)
        if self.bias is not None:
            calls.append(partial(put, self.d_bias, self.total[0], self.step))
        if self.dx is not None:
            arrays = self._bound_backward(rows)
            arrays.dx = images_last(self.dx[:rows])
            calls += self._bind("backward_data", rows, self.room_backward, arrays)
        return calls

    def bind_weights(self, rows: int) -> list[Call]:
        arrays = self._bound_backward(rows)
        arrays.dw = self.dw
        return self._bind("backward_weights", rows, self.room_weights, arrays)

    def _bound_backward(self, rows: int) -> Bound:
        return Bound(self.w, images_last(self.x[:rows]), dy=images_last(self.tail.dys[0][:rows]))

    def _bind(self, direction: Direction, rows: int, room: Array, arrays: Bound) -> list[Call]:
        """The algorithm is that of the most rows, so that a step's result doesn't depend on when it was timed."""
        algorithm = self.kit.choose(Geometry.of(self.node, self.capacity), direction)
        return algorithm.bind(Geometry.of(self.node, rows), direction, room, arrays, self.step)

    def _fold(self) -> None:
        """The normalisation as a factor and a summand for each channel."""
        weight, bias, mean, var = self.norm or []
        np.sqrt(var + self.eps, out=self.scale)
        np.divide(weight, self.scale, out=self.scale)
        np.multiply(mean if self.bias is None else mean - self.bias, self.scale, out=self.shift)
        np.subtract(bias, self.shift, out=self.shift)


def room(group: Group, rows: int, mode: Mode, kit: Kit) -> Room:
    """The scratch of a group."""
    g = Geometry.of(group.nodes[0], rows)
    directions: tuple[Direction, ...] = DIRECTIONS if mode == "train" else ("forward",)
    nbytes = {direction: kit.choose(g, direction).nbytes(g, direction) for direction in directions}
    return Room(
        forward=nbytes["forward"], backward=nbytes.get("backward_data", 0), weights=nbytes.get("backward_weights", 0)
    )
