"""oneDNN's own convolutions: activations channels-last, filters in the layout that it asks for.

The filters are reordered into scratch before each call; their gradient is reordered from there into its place.
"""

import math
from ctypes import c_void_p

import numpy as np

from dpnn.backends.base import Array, Step
from dpnn.backends.onednn.geometry import Bound, Direction, Geometry
from dpnn.backends.onednn.library import Failed, Library, dims
from dpnn.backends.onednn.primitive import (
    BIAS,
    DIFF_DST,
    DIFF_SRC,
    DIFF_WEIGHTS,
    DST,
    LINE,
    SCALES,
    SRC,
    WEIGHTS,
    Description,
    Layouts,
    Owned,
    Primitive,
    attributes,
    reorder,
    same,
)
from dpnn.native import Call

Operand = tuple[int, c_void_p, Array]
"""Index of an argument, memory description, array."""

_DIRECT, _TRAINING = 1, 64
_SLOPE = 1e-30
"""Of ReLU below 0. With 0 oneDNN takes a maximum, which hides what is not a number behind a 0."""
_RELU = 0x20


class Convolution:
    """Descriptions of oneDNN's convolutions of one geometry, and calls bound to arrays."""

    def __init__(self, library: Library, g: Geometry, bfloat16: bool) -> None:
        self._library, self._g, self._bfloat16 = library, g, bfloat16
        self._layouts = Layouts(library)
        images = ((g.n, g.c, g.h, g.w), (g.n, g.k, g.p, g.q))
        self._x, self._y = (self._layouts.strided(s, (s[1] * s[2] * s[3], 1, s[3] * s[1], s[1])) for s in images)
        r, s = g.size
        shape = (g.k, g.c // g.groups, r, s) if g.groups == 1 else (g.groups, g.k // g.groups, g.c // g.groups, r, s)
        self._w = self._layouts.free(shape)
        self._canonical = self._layouts.strided(shape, [math.prod(shape[i + 1 :]) for i in range(len(shape))])
        self._line = Owned(library, "memory_desc", library.make("memory_desc_create_with_tag", 1, dims([g.k]), 3, LINE))
        self._window = (dims(g.stride), dims((0, 0)), dims(g.padding), dims(g.padding))
        self._forward: dict[tuple[bool, bool], Description] = {}

    def forward(self, bias: bool, relu: bool) -> Description:
        """y = x * w + bias; then ReLU."""
        key = bias, relu
        if key not in self._forward:
            library = self._library
            attribute = attributes(library, [("eltwise", (_RELU, _SLOPE, 0.0))] if relu else (), self._bfloat16)
            handle = library.make(
                "convolution_forward_primitive_desc_create", library.engine, _TRAINING, _DIRECT,
                self._x.handle, self._w.handle, self._line.handle if bias else None, self._y.handle, *self._window,
                attribute.handle,
            )  # fmt: skip
            self._forward[key] = Description(library, handle)
        return self._forward[key]

    def backward_data(self) -> Description:
        """dx from dy."""
        library, hint = self._library, self.forward(bias=False, relu=False)
        attribute = attributes(library, bfloat16=self._bfloat16)
        handle = library.make(
            "convolution_backward_data_primitive_desc_create", library.engine, _DIRECT,
            self._x.handle, self._w.handle, self._y.handle, *self._window, hint.owned.handle, attribute.handle,
        )  # fmt: skip
        return Description(library, handle)

    def backward_weights(self) -> Description:
        """dw from x and dy."""
        library, hint = self._library, self.forward(bias=False, relu=False)
        attribute = attributes(library, bfloat16=self._bfloat16)
        handle = library.make(
            "convolution_backward_weights_primitive_desc_create", library.engine, _DIRECT,
            self._x.handle, self._w.handle, None, self._y.handle, *self._window, hint.owned.handle, attribute.handle,
        )  # fmt: skip
        return Description(library, handle)

    def bind_forward(self, room: Array, arrays: Bound) -> list[Call]:
        """The calls of a forward convolution."""
        description = self.forward(arrays.bias is not None, arrays.relu)
        calls, w = self._filters(description, room, arrays.w, arrays.scale)
        arguments = [(SRC, self._x.handle, arrays.x), (DST, self._y.handle, arrays.y), w]
        if arrays.bias is not None:
            arguments.append((BIAS, self._line.handle, arrays.bias))
        return [*calls, Primitive(description, arguments)]

    def bind_backward_data(self, room: Array, arrays: Bound) -> list[Call]:
        """The calls that make dx."""
        description = self.backward_data()
        calls, w = self._filters(description, room, arrays.w)
        arguments = [(DIFF_SRC, self._x.handle, arrays.dx), (DIFF_DST, self._y.handle, arrays.dy), w]
        return [*calls, Primitive(description, arguments)]

    def bind_backward_weights(self, room: Array, arrays: Bound, step: Step) -> list[Call]:
        """The calls that make dw."""
        description, library = self.backward_weights(), self._library
        layout = description.layout(DIFF_WEIGHTS)
        dw = _enough(room, description.nbytes(DIFF_WEIGHTS))
        arguments = [
            (SRC, self._x.handle, arrays.x),
            (DIFF_DST, self._y.handle, arrays.dy),
            (DIFF_WEIGHTS, layout, dw),
        ]
        ends = [(SRC, layout, dw), (DST, self._canonical.handle, arrays.dw)]
        assign, add = (Primitive(reorder(library, layout, self._canonical.handle, add), ends) for add in (False, True))
        return [Primitive(description, arguments), lambda: assign() if step.first else add()]

    def _filters(
        self, description: Description, room: Array, w: Array, scale: Array | None = None
    ) -> tuple[list[Call], Operand]:
        """The call that brings the filters into the layout asked for, where it isn't their own; and the argument.

        `scale` (K,): a factor for each filter, which that call multiplies by.
        """
        library, canonical, layout = self._library, self._canonical.handle, description.layout(WEIGHTS)
        if scale is None and same(library, layout, canonical):
            return [], (WEIGHTS, layout, w)
        blocked = _enough(room, description.nbytes(WEIGHTS))
        ends = [(SRC, canonical, w), (DST, layout, blocked)]
        if scale is not None:
            ends.append((SCALES, self._line.handle, scale))
        scaled_dims = 0 if scale is None else 1 + (self._g.groups > 1)
        call = Primitive(reorder(library, canonical, layout, scaled_dims=scaled_dims), ends)
        return [call], (WEIGHTS, layout, blocked)


def _enough(room: Array, nbytes: int) -> Array:
    return room if room.size >= nbytes else np.empty(nbytes, np.uint8)


class Direct:
    """The algorithm `direct`; with `bfloat16` inputs are rounded to that."""

    name = "direct"

    def __init__(self, library: Library, bfloat16: bool) -> None:
        self._library, self._bfloat16 = library, bfloat16
        self._known: dict[Geometry, Convolution] = {}

    def applies(self, g: Geometry, direction: Direction) -> bool:
        """Whether oneDNN has more than its reference."""
        try:
            return not self._describe(g, direction).name.startswith("ref")
        except Failed:
            return False

    def nbytes(self, g: Geometry, direction: Direction) -> int:
        """For the filters, or their gradient, in the layout that oneDNN asks for."""
        return self._describe(g, direction).nbytes(DIFF_WEIGHTS if direction == "backward_weights" else WEIGHTS)

    def bind(self, g: Geometry, direction: Direction, room: Array, arrays: Bound, step: Step) -> list[Call]:
        """The calls of one direction."""
        convolution = self._convolution(g)
        if direction == "forward":
            return convolution.bind_forward(room, arrays)
        if direction == "backward_data":
            return convolution.bind_backward_data(room, arrays)
        return convolution.bind_backward_weights(room, arrays, step)

    def _describe(self, g: Geometry, direction: Direction) -> Description:
        convolution = self._convolution(g)
        if direction == "forward":
            return convolution.forward(bias=True, relu=True)
        return convolution.backward_data() if direction == "backward_data" else convolution.backward_weights()

    def _convolution(self, g: Geometry) -> Convolution:
        if g not in self._known:
            self._known[g] = Convolution(self._library, g, self._bfloat16)
        return self._known[g]
