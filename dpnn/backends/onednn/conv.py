"""Convolution: which algorithm, chosen once by timing for each direction and shape; then its calls."""

from functools import partial
from time import perf_counter
from typing import cast

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Room, Slot, Step, put
from dpnn.backends.onednn import unfold, winograd
from dpnn.backends.onednn.choices import Choices
from dpnn.backends.onednn.direct import Direct, exists
from dpnn.backends.onednn.geometry import Bound, Geometry, Shapes, cut, images_last, nbytes
from dpnn.backends.onednn.library import Library
from dpnn.backends.onednn.op import CallsOp, Tools
from dpnn.native import Call
from dpnn.nn.conv import Conv
from dpnn.nn.norm import BatchNorm, BatchNormalize

DIRECTIONS = ("forward", "backward_data", "backward_weights")
_TRIVIAL = 1 << 22
"""Multiply-adds below which nothing is timed."""
_LONG = 0.1
"""Seconds of a call that is long enough to be timed once."""


class Kit:
    """What every convolution works with: the library, kernels and threads, the choices made so far."""

    def __init__(self, library: Library, tools: Tools, choices: Choices, bfloat16: bool) -> None:
        self.library, self.tools, self.choices, self.bfloat16 = library, tools, choices, bfloat16
        self._direct: dict[Geometry, Direct] = {}
        self._exists: dict[Geometry, bool] = {}

    def direct(self, g: Geometry) -> Direct:
        """oneDNN's convolution of a geometry."""
        if g not in self._direct:
            self._direct[g] = Direct(self.library, g, self.bfloat16)
        return self._direct[g]

    def algorithms(self, g: Geometry, direction: str) -> list[str]:
        """Those that can be used, the first of them where nothing is timed."""
        if g not in self._exists:
            self._exists[g] = exists(self.direct(g))
        names = ["direct"] if self._exists[g] else []
        if names and self.bfloat16:
            return names
        if direction != "backward_data" or unfold.is_product(g):
            names.append("unfold")
        if winograd.applies(g):
            names.append("winograd")
        return names or ["direct"]

    def choose(self, g: Geometry, direction: str) -> str:
        """The fastest algorithm, as timed now or before."""
        names = self.algorithms(g, direction)
        if len(names) == 1 or g.multiply_adds < _TRIVIAL:
            return names[0]
        return self.choices.fastest(f"{direction} {g.key}", names, lambda name: self._time(g, direction, name))

    def scratch(self, g: Geometry, direction: str, name: str) -> int:
        """Bytes of scratch."""
        if name == "direct":
            direct = self.direct(g)
            sizes = {
                "forward": lambda: direct.forward(True, True, False).nbytes(33),
                "backward_data": lambda: direct.backward_data().nbytes(33),
                "backward_weights": lambda: direct.backward_weights().nbytes(161),
            }
            return sizes[direction]()
        return nbytes(self._shapes(g, direction, name))

    def _shapes(self, g: Geometry, direction: str, name: str) -> Shapes:
        """Scratch of our own algorithms."""
        if name == "winograd":
            return winograd.shapes(
                winograd.turned(g) if direction == "backward_data" else g, direction == DIRECTIONS[2]
            )
        shapes = {"forward": unfold.forward_shapes, "backward_weights": unfold.gradient_shapes}
        return shapes[direction](g, self.tools.team) if direction in shapes else {}

    def bind(self, g: Geometry, direction: str, name: str, room: Array, arrays: Bound, step: Step) -> list[Call]:
        """The calls of one direction; `room`: its scratch."""
        if name == "direct":
            direct = self.direct(g)
            if direction == "backward_weights":
                return direct.bind_backward_weights(room, arrays, step)
            bind = direct.bind_forward if direction == "forward" else direct.bind_backward_data
            return bind(room, arrays)
        scratch = cut(room, self._shapes(g, direction, name))
        if name == "winograd":
            kernels = self.tools.kernels
            if direction == "backward_weights":
                return winograd.backward_weights(g, kernels, scratch, arrays, step)
            run = winograd.forward if direction == "forward" else winograd.backward_data
            return run(g, kernels, scratch, arrays)
        team = self.tools.team
        if direction == "backward_weights":
            return unfold.backward_weights(g, team, scratch, arrays, step)
        return (unfold.forward if direction == "forward" else unfold.backward_data)(g, team, scratch, arrays)

    def _time(self, g: Geometry, direction: str, name: str) -> float:
        """Seconds of one call, on arrays of ones (memory never written would be one page of zeros)."""
        x, y = (np.ones(shape, np.float32) for shape in ((g.n, g.h, g.w, g.c), (g.n, g.p, g.q, g.k)))
        w, dw = (np.ones((g.k, g.c // g.groups, *g.size), np.float32) for _ in range(2))
        room = np.ones(self.scratch(g, direction, name), np.uint8)
        arrays = Bound(w, x, y, dx=x, dy=y, dw=dw)
        calls = self.bind(g, direction, name, room, arrays, Step())
        best = float("inf")
        for _ in range(4):  # the first one warms up
            begin = perf_counter()
            for call in calls:
                call()
            last, best = best, perf_counter() - begin
            best = min(last, best)
            if best > _LONG and last < float("inf"):
                break
        return best


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
        arrays = Bound(self.w, images_last(self.x[:rows]), dy=images_last(self.tail.dys[0][:rows]), dw=self.dw)
        calls = self.tail.gather(rows, self.total if self.bias is not None else None)
        if self.bias is not None:
            calls.append(partial(put, self.d_bias, self.total[0], self.step))
        calls += self._bind("backward_weights", rows, self.room_backward, arrays)
        if self.dx is not None:
            arrays.dx = images_last(self.dx[:rows])
            calls += self._bind("backward_data", rows, self.room_backward, arrays)
        return calls

    def _bind(self, direction: str, rows: int, room: Array, arrays: Bound) -> list[Call]:
        """The algorithm is that of the most rows, so that a step's result doesn't depend on when it was timed."""
        name = self.kit.choose(Geometry.of(self.node, self.capacity), direction)
        return self.kit.bind(Geometry.of(self.node, rows), direction, name, room, arrays, self.step)

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
    sizes = dict.fromkeys(DIRECTIONS, 0)
    for direction in DIRECTIONS if mode == "train" else DIRECTIONS[:1]:
        sizes[direction] = kit.scratch(g, direction, kit.choose(g, direction))
    forward, data, weights = (sizes[direction] for direction in DIRECTIONS)
    return Room(forward=forward, backward=max(data, weights))
