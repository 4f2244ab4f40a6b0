"""Convolution as a matrix product: every window a row (P Q, R S C), times the filters (R S C, K).

Windows are copied into scratch a few rows of the image at a time; a window of 1 x 1 with stride 1 is the image itself.
Each thread has rows of its own, and a gradient of the filters of its own, which are added at the end.
"""

import math
from functools import partial
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import as_strided

from dpnn.backends.base import Array, Step, put
from dpnn.backends.onednn.geometry import Bound, Direction, Geometry, Shapes, copy_window, cut, nbytes
from dpnn.backends.onednn.op import BLOCK, copies
from dpnn.native import Call
from dpnn.team import Team

_NUMBERS = 1 << 17
"""About how many numbers of windows are copied at a time: they stay in a core's own cache."""
_PIXELS = 1 << 12
"""Pixels that are multiplied at a time where nothing is copied."""


class Unfold:
    """The algorithm `unfold`."""

    name = "unfold"

    def __init__(self, team: Team) -> None:
        self._team = team

    def applies(self, g: Geometry, direction: Direction) -> bool:
        """The input's gradient only where windows don't overlap because they are pixels."""
        return direction != "backward_data" or _is_product(g)

    def nbytes(self, g: Geometry, direction: Direction) -> int:
        """For windows and filters."""
        return nbytes(_shapes(g, direction, self._team))

    def bind(self, g: Geometry, direction: Direction, room: Array, arrays: Bound, step: Step) -> list[Call]:
        """Copies and products, each thread its own."""
        scratch = cut(room, _shapes(g, direction, self._team))
        if direction == "forward":
            return _forward(g, self._team, scratch, arrays)
        if direction == "backward_data":
            return _backward_data(g, self._team, arrays)
        return _backward_weights(g, self._team, scratch, arrays, step)


def _is_product(g: Geometry) -> bool:
    """Whether every window is one pixel, so that nothing has to be copied."""
    return g.size == (1, 1) and g.stride == (1, 1) and g.padding == (0, 0)


def _shapes(g: Geometry, direction: Direction, team: Team) -> Shapes:
    """Windows of each thread; the filters as (K, R S C), where they don't lie so; or each thread's gradient of them and
    a piece's part of it."""
    if direction == "backward_data":
        return {}
    windows = _window_shapes(g, team)
    if direction == "forward":
        return windows if _is_product(g) else {**windows, "w": (g.k, _length(g))}
    return {**windows, **{f"dw{i}": (2, g.k, _length(g)) for i in range(team.size)}}


def _forward(g: Geometry, team: Team, scratch: dict[str, Array], arrays: Bound) -> list[Call]:
    """y = x * w, with bias and ReLU as the arrays say."""
    w, y = scratch.get("w", arrays.w.reshape(g.k, -1)), arrays.y.reshape(-1, g.k)
    shares = []
    for i, pieces in enumerate(_shares(g, team)):
        calls: list[Call] = []
        for piece in pieces:
            copied, windows = _windows(g, arrays.x, piece, scratch, i)
            calls += copied
            rows = y[piece.start : piece.stop]
            for group, window in enumerate(windows):
                ks = g.channels(group)[1]
                calls.append(partial(np.matmul, window, w[ks].T, rows[:, ks]))
            if arrays.scale is not None:
                calls.append(partial(np.multiply, rows, arrays.scale, rows))
            if arrays.bias is not None:
                calls.append(partial(np.add, rows, arrays.bias, rows))
            if arrays.relu:
                calls.append(partial(np.maximum, rows, np.float32(0), out=rows))
        shares.append(calls)
    reorder = [copies(team, _canonical(w, g), arrays.w)] if "w" in scratch else []
    return [*reorder, partial(team.run, shares)]


def _backward_data(g: Geometry, team: Team, arrays: Bound) -> list[Call]:
    """dx from dy, where `_is_product`."""
    dx, dy, w = arrays.dx.reshape(-1, g.c), arrays.dy.reshape(-1, g.k), arrays.w.reshape(g.k, -1)
    shares = []
    for pieces in _shares(g, team):
        calls: list[Call] = []
        for piece, group in product(pieces, range(g.groups)):
            cs, ks = g.channels(group)
            rows = slice(piece.start, piece.stop)
            calls.append(partial(np.matmul, dy[rows, ks], w[ks], dx[rows, cs]))
        shares.append(calls)
    return [partial(team.run, shares)]


def _backward_weights(g: Geometry, team: Team, scratch: dict[str, Array], arrays: Bound, step: Step) -> list[Call]:
    """dw from x and dy."""
    dy = arrays.dy.reshape(-1, g.k)
    shares, sums = [], []
    for i, pieces in enumerate(_shares(g, team)):
        total, part = scratch[f"dw{i}"]
        sums.append(total)
        calls: list[Call] = []
        for number, piece in enumerate(pieces):
            copied, windows = _windows(g, arrays.x, piece, scratch, i)
            calls += copied
            target = part if number else total
            for group, window in enumerate(windows):
                ks = g.channels(group)[1]
                calls.append(partial(np.matmul, dy[piece.start : piece.stop, ks].T, window, target[ks]))
            if number:
                calls.append(partial(np.add, total, part, total))
        shares.append(calls)
    ends = []
    for run in team.cut(g.k, least=-(-BLOCK // _length(g))):
        first, *others = (total[run.start : run.stop] for total in sums)
        adds = [partial(np.add, first, other, first) for other in others]
        ends.append([*adds, partial(put, arrays.dw[run.start : run.stop], _canonical(first, g), step)])
    return [partial(team.run, shares), partial(team.run, ends)]


def _length(g: Geometry) -> int:
    """Numbers of a window of one group."""
    return math.prod(g.size) * g.c // g.groups


def _canonical(filters: Array, g: Geometry) -> Array:
    """(K, R S C) seen as (K, C, R, S)."""
    return filters.reshape(len(filters), *g.size, -1).transpose(0, 3, 1, 2)


def _shares(g: Geometry, team: Team) -> list[list[range]]:
    """For each thread its runs of windows, numbered over all images, each run within an image or of whole pixels."""
    if _is_product(g):
        pixels = g.n * g.p * g.q
        return [
            [range(lo, min(lo + _PIXELS, run.stop)) for lo in range(run.start, run.stop, _PIXELS)]
            for run in team.cut(pixels, least=64)
        ]
    rows = _rows(g)
    pieces = [
        range((n * g.p + lo) * g.q, (n * g.p + min(lo + rows, g.p)) * g.q)
        for n in range(g.n)
        for lo in range(0, g.p, rows)
    ]
    return [[pieces[i] for i in run] for run in team.cut(len(pieces))]


def _rows(g: Geometry) -> int:
    """Rows of an image whose windows are copied at a time."""
    return max(1, min(g.p, _NUMBERS // (g.q * _length(g) * g.groups)))


def _window_shapes(g: Geometry, team: Team) -> Shapes:
    """For each thread some rows of windows, and the rows of the image that they are copied from, with padding."""
    if _is_product(g):
        return {}
    rows, (r, s), (down, right) = _rows(g), g.size, g.stride
    windows = (g.groups, rows * g.q, _length(g))
    image = (1, (rows - 1) * down + r, (g.q - 1) * right + s, g.c)
    return {f"{name}{i}": shape for i in range(team.size) for name, shape in (("windows", windows), ("image", image))}


def _windows(g: Geometry, x: Array, piece: range, scratch: dict[str, Array], i: int) -> tuple[list[Call], list[Array]]:
    """The windows of a run as (windows, R S C), a group each; and the calls that copy them into thread i's scratch."""
    if _is_product(g):
        pixels = x.reshape(-1, g.c)[piece.start : piece.stop]
        return [], [pixels[:, g.channels(group)[0]] for group in range(g.groups)]
    n, first = divmod(piece.start // g.q, g.p)
    count, (r, s), (down, right) = len(piece) // g.q, g.size, g.stride
    image = scratch[f"image{i}"][:, : (count - 1) * down + r]
    windows = scratch[f"windows{i}"][:, : len(piece)]
    row, column, channel = image.strides[1:]
    c = g.c // g.groups
    shape = (g.groups, count, g.q, r, s, c)
    view = as_strided(image, shape, (c * channel, down * row, right * column, row, column, channel), writeable=False)
    corner = (first * down - g.padding[0], -g.padding[1])
    calls: list[Call] = [*copy_window(x[n : n + 1], image, corner), partial(np.copyto, windows.reshape(shape), view)]
    return calls, list(windows)
