"""Convolution of stride 1 with filters of 3 x 3 or 5 x 5 by Winograd's minimal filtering: kernels/winograd.c.

36 products in place of 144 (3 x 3) or 100 (5 x 5). In float32 results differ from the direct sum by about 1e-5 of the
largest output.
"""

from ctypes import c_int64
from dataclasses import replace

from dpnn.backends.base import Array, Step
from dpnn.backends.onednn.geometry import Bound, Direction, Geometry, Shapes, cut, nbytes
from dpnn.native import Call, Kernels

_PLACES, _PANEL, _ROWS = 36, 16, 12
_NBYTES = 24 << 20
"""Of transformed inputs and outputs at a time: they are to stay in the last cache."""
_LEAST, _LEAST_OF_GRADIENT = 168, 408
"""Tiles at a time that make up for reading all filters again, or for adding to their whole gradient again."""


class Winograd:
    """The algorithm `winograd`."""

    name = "winograd"

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def applies(self, g: Geometry, direction: Direction) -> bool:
        """3 x 3 or 5 x 5, stride 1; the padding is such that the turned convolution has one too."""
        return g.size in ((3, 3), (5, 5)) and g.stride == (1, 1) and max(g.padding) < g.size[0]

    def nbytes(self, g: Geometry, direction: Direction) -> int:
        """For transformed filters, inputs and outputs."""
        return nbytes(_shapes(g, direction))

    def bind(self, g: Geometry, direction: Direction, room: Array, arrays: Bound, step: Step) -> list[Call]:
        """One call."""
        kernels, scratch, shape = self._kernels, cut(room, _shapes(g, direction)).values(), _shape(g, direction)
        if direction == "backward_weights":
            bound = (shape, arrays.x, arrays.dy, arrays.dw)
            assign, add = (kernels.bind("winograd_gradient", *bound, later, *scratch) for later in (False, True))
            return [lambda: assign() if step.first else add()]
        if direction == "backward_data":
            return [kernels.bind("winograd", shape, arrays.dy, arrays.w, None, None, False, True, arrays.dx, *scratch)]
        rest = (arrays.scale, arrays.bias, arrays.relu, False, arrays.y)
        return [kernels.bind("winograd", shape, arrays.x, arrays.w, *rest, *scratch)]


def _turned(g: Geometry) -> Geometry:
    """The convolution that makes the input's gradient of the output's: channels swapped, padding complemented."""
    padding = (g.size[0] - 1 - g.padding[0], g.size[1] - 1 - g.padding[1])
    return replace(g, c=g.k, h=g.p, w=g.q, k=g.c, p=g.h, q=g.w, padding=padding)


def _shapes(g: Geometry, direction: Direction) -> Shapes:
    """Scratch, for one group: transformed filters (or their gradient), inputs, outputs; an odd number of lines each."""
    g = _turned(g) if direction == "backward_data" else g
    tiles, (c, k) = _tiles(g, direction), _panels(g)
    return {
        "u": (_PLACES, k * c * _PANEL | 1, _PANEL),
        "v": (_PLACES, c * tiles | 1, _PANEL),
        "z": (_PLACES, k * tiles | 1, _PANEL),
    }


def _panels(g: Geometry) -> tuple[int, int]:
    """Panels of input and of output channels of one group."""
    c, k = (-(-channels // g.groups // _PANEL) for channels in (g.c, g.k))
    return c, k


def _tiles(g: Geometry, direction: Direction) -> int:
    """Tiles at a time."""
    m = 7 - g.size[0]
    count = g.n * -(-g.p // m) * -(-g.q // m)
    fitting = _NBYTES // (4 * _PLACES * _PANEL * sum(_panels(g)))
    tiles = min(count, max(fitting, _LEAST_OF_GRADIENT if direction == "backward_weights" else _LEAST))
    return -(-tiles // _ROWS) * _ROWS


def _shape(g: Geometry, direction: Direction) -> object:
    """The kernels' Shape."""
    g = _turned(g) if direction == "backward_data" else g
    numbers = (g.n, g.h, g.w, g.c, g.p, g.q, g.k, *g.padding, g.size[0], g.groups, _tiles(g, direction))
    return (c_int64 * len(numbers))(*numbers)
