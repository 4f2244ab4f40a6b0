"""My nodes' parameters and gradients, each in one flat array.

The trained parameters lie in forward order: backward completes the gradient array from its end to its start, so a
bucket of gradients is a contiguous slice, ready early, never packed. Running statistics follow as a tail. Offsets come
from the graph and the placement only, so equal parts of all replicas have equal arrays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.memory import HOST, Memory, Wire, zeros
from dpnn.nn.graph import Node
from dpnn.nn.init import draw
from dpnn.nn.layer import ParamSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class Piece:
    """The numbers [lo, hi) of a flattened parameter, which lie from `offset` on in the flat arrays."""

    name: str
    lo: int
    hi: int
    offset: int
    spec: ParamSpec
    whole: tuple[int, ...]
    """The shape of the whole parameter; `spec.shape` is that of what its node holds."""

    @property
    def end(self) -> int:
        """One past its last place in the flat arrays."""
        return self.offset + self.hi - self.lo


def lay(nodes: Sequence[Node]) -> tuple[Piece, ...]:
    """Where the parameters of some nodes lie in flat arrays of theirs; running statistics last."""
    params = sorted((param for node in nodes for param in node.params), key=lambda param: param.spec.statistic != 0)
    pieces, offset = [], 0
    for param in params:
        hi = param.lo + math.prod(param.spec.shape)
        pieces.append(Piece(param.name, param.lo, hi, offset, param.spec, param.whole))
        offset = pieces[-1].end
    return tuple(pieces)


def clip(pieces: Sequence[Piece], lo: int, hi: int) -> tuple[Piece, ...]:
    """What lies in the slice [lo, hi) of the flat arrays; offsets count from lo."""
    clipped = []
    for piece in pieces:
        begin, end = max(lo, piece.offset), min(hi, piece.end)
        if begin < end:
            first = piece.lo + begin - piece.offset
            clipped.append(Piece(piece.name, first, first + end - begin, begin - lo, piece.spec, piece.whole))
    return tuple(clipped)


class Store:
    """The flat arrays `params` and `grads` of the parameters of `nodes`, on the host and where a backend computes."""

    def __init__(self, nodes: Sequence[Node], dtype: np.dtype[Any], memory: Memory = HOST) -> None:
        self.pieces = lay(nodes)
        self.size = self.pieces[-1].end if self.pieces else 0
        """Of each flat array."""
        self._dtype, self._memory = dtype, memory
        self._pieces = {(piece.name, piece.lo): piece for piece in self.pieces}

    def place(self, params: Wire, grads: Wire) -> None:
        """Keep them in these arrays from now on; before anything is bound to others."""
        self.params_wire, self.grads_wire = params, grads

    @cached_property
    def params_wire(self) -> Wire:
        """Between `params` and the backend's; who changes the one or reads the other pushes, or pulls."""
        return self._memory.lift(zeros(self.size, self._dtype))

    @cached_property
    def grads_wire(self) -> Wire:
        """Between `grads` and the backend's."""
        return self._memory.lift(zeros(self.size, self._dtype))

    @property
    def params(self) -> Array:
        """On the host."""
        return self.params_wire.buf

    @property
    def grads(self) -> Array:
        """On the host."""
        return self.grads_wire.buf

    @property
    def n_trained(self) -> int:
        """How many of the numbers are trained: they stand first."""
        return sum(piece.hi - piece.lo for piece in self.pieces if piece.spec.statistic == 0)

    def param(self, name: str, lo: int = 0) -> Array:
        """The parameter, or my piece of it from `lo` on, as the backend sees it: a view in its own shape."""
        return self._view(self.params_wire.array, name, lo)

    def grad(self, name: str, lo: int = 0) -> Array:
        """Its gradient, likewise."""
        return self._view(self.grads_wire.array, name, lo)

    def _view(self, flat: Array, name: str, lo: int) -> Array:
        piece = self._pieces[name, lo]
        return flat[piece.offset : piece.end].reshape(piece.spec.shape)

    def draw(self, seed: int) -> None:
        """Set the initial values: a function of (seed, name, index) alone."""
        for piece in self.pieces:
            flat = self.params[piece.offset : piece.end]
            flat[...] = draw(seed, piece.name, piece.spec, piece.lo, piece.hi, flat.dtype)

    def split(self, flat: Array) -> dict[str, Array]:
        """A flat array as arrays by parameter name (views); of a store that holds whole parameters."""
        return {piece.name: self._view(flat, piece.name, piece.lo) for piece in self.pieces}
