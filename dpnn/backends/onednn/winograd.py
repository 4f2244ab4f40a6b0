"""Convolution of stride 1 with filters of 3 x 3 or 5 x 5 by Winograd's minimal filtering: kernels/winograd.c.

36 products in place of 144 (3 x 3) or 100 (5 x 5). In float32 results differ from the direct sum by about 1e-5 of the
largest output.
"""

from ctypes import c_int64
from dataclasses import replace

from dpnn.backends.base import Array, Step
from dpnn.backends.onednn.geometry import Bound, Geometry, Shapes
from dpnn.native import Call, Kernels

_PLACES, _PANEL, _ROWS = 36, 16, 12
_NBYTES = 24 << 20
"""Of transformed inputs and outputs at a time: they are to stay in the last cache."""
_LEAST, _LEAST_OF_GRADIENT = 168, 408
"""Tiles at a time that make up for reading all filters again, or for adding to their whole gradient again."""


def applies(g: Geometry) -> bool:
    """Whether these filters can be used for a convolution, forward and backward."""
    return g.size in ((3, 3), (5, 5)) and g.stride == (1, 1) and max(g.padding) < g.size[0]


def turned(g: Geometry) -> Geometry:
    """The convolution that makes the input's gradient of the output's: channels swapped, padding complemented."""
    padding = (g.size[0] - 1 - g.padding[0], g.size[1] - 1 - g.padding[1])
    return replace(g, c=g.k, h=g.p, w=g.q, k=g.c, p=g.h, q=g.w, padding=padding)


def shapes(g: Geometry, gradient: bool = False) -> Shapes:
    """Scratch: transformed filters, inputs and outputs of one group."""
    tiles, c, k = _tiles(g, gradient), *_panels(g)
    return {
        "u": (_PLACES, k, c, _PANEL, _PANEL),
        "v": (_PLACES, c, tiles, _PANEL),
        "z": (_PLACES, k, tiles, _PANEL),
    }


def forward(g: Geometry, kernels: Kernels, scratch: dict[str, Array], arrays: Bound) -> list[Call]:
    """y = x * w, with scale, bias and ReLU as the arrays say."""
    rest = (arrays.scale, arrays.bias, arrays.relu, False, arrays.y)
    return [kernels.bind("winograd", _shape(g), arrays.x, arrays.w, *rest, *scratch.values())]


def backward_data(g: Geometry, kernels: Kernels, scratch: dict[str, Array], arrays: Bound) -> list[Call]:
    """dx from dy; scratch is that of `turned(g)`."""
    rest = (None, None, False, True, arrays.dx)
    return [kernels.bind("winograd", _shape(turned(g)), arrays.dy, arrays.w, *rest, *scratch.values())]


def backward_weights(g: Geometry, kernels: Kernels, scratch: dict[str, Array], arrays: Bound, step: Step) -> list[Call]:
    """dw from x and dy."""
    bound = (_shape(g, gradient=True), arrays.x, arrays.dy, arrays.dw)
    assign, add = (kernels.bind("winograd_gradient", *bound, later, *scratch.values()) for later in (False, True))
    return [lambda: assign() if step.first else add()]


def _panels(g: Geometry) -> tuple[int, int]:
    """Panels of input and of output channels of one group."""
    c, k = (-(-channels // g.groups // _PANEL) for channels in (g.c, g.k))
    return c, k


def _tiles(g: Geometry, gradient: bool) -> int:
    """Tiles at a time."""
    m = 7 - g.size[0]
    count = g.n * -(-g.p // m) * -(-g.q // m)
    fitting = _NBYTES // (4 * _PLACES * _PANEL * sum(_panels(g)))
    tiles = min(count, max(fitting, _LEAST_OF_GRADIENT if gradient else _LEAST))
    return -(-tiles // _ROWS) * _ROWS


def _shape(g: Geometry, gradient: bool = False) -> object:
    """The kernels' Shape."""
    numbers = (g.n, g.h, g.w, g.c, g.p, g.q, g.k, *g.padding, g.size[0], g.groups, _tiles(g, gradient))
    return (c_int64 * len(numbers))(*numbers)
