"""Where every activation and every gradient of one lies: laid out once by lifetime, in one block of memory.

A buffer lives from the first to the last instruction of a micro-batch that touches it; two whose lives don't meet may
share their place. Training and evaluation are never in flight at once, so they use the same arena.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.backends.base import Step
from dpnn.nn.graph import Node
from dpnn.nn.layer import Input
from dpnn.plan.schedule import Backward, Forward, Load, Loss, Plan
from dpnn.plan.store import Store

Array = NDArray[Any]
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register

Key = tuple[int, int]
"""(node, -1): the output of a node. (node, position): the gradient by one of its inputs."""


@dataclass(frozen=True)
class Life:
    """How large a buffer is, and the first and the last instruction that touch it."""

    nbytes: int
    first: int
    last: int


class Arena:
    """One aligned block of memory; `reserve` before `take`, so that it is allocated once."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._block: Array | None = None

    def reserve(self, nbytes: int) -> None:
        """Ask for room; several plans that are never in flight at once ask for the same room."""
        if self._block is not None:
            raise RuntimeError("the arena is allocated already: reserve all room before taking any")
        self._nbytes = max(self._nbytes, nbytes)

    def take(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array over the arena's bytes from `offset` on."""
        if self._block is None:
            raw = np.empty(self._nbytes + ALIGNMENT, np.uint8)
            self._block = raw[-raw.ctypes.data % ALIGNMENT :]
        nbytes = math.prod(shape) * dtype.itemsize
        return self._block[offset : offset + nbytes].view(dtype).reshape(shape)


class Layout:
    """The offset of every buffer of a plan in the arena, and the views that share another buffer's place."""

    def __init__(self, plan: Plan, dtype: np.dtype[Any]) -> None:
        self.plan, self.graph, self.rows, self.dtype = plan, plan.graph, plan.rows, dtype
        self._same: dict[Key, Key] = {}
        for group in plan.groups:
            node = group.nodes[-1]
            if group.forward_view:
                self._same[node.index, -1] = (node.inputs[0], -1)
            if group.backward_view and self.graph.readers(node):
                self._same[node.index, 0] = self._gradient(node)
        self.offsets, self.nbytes = pack(self._lives(plan))

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of a node's output, with room for the largest micro-batch."""
        return (self.rows, *node.shape) if node.layer.batched else node.shape

    def type(self, node: Node) -> np.dtype[Any]:
        """The type of a node's output."""
        name = node.layer.holds if isinstance(node.layer, Input) else node.layer.dtype
        return self.dtype if name == "float" else np.dtype(name)

    def root(self, key: Key) -> Key:
        """The buffer that a view shares the place of; a buffer of its own is its own root."""
        while key in self._same:
            key = self._same[key]
        return key

    def _gradient(self, node: Node) -> Key:
        """The gradient by the output of `node`: its one reader's."""
        reader, position = self.graph.readers(node)[0]
        return reader.index, position

    def _lives(self, plan: Plan) -> dict[Key, Life]:
        lives: dict[Key, Life] = {}
        nodes = self.graph.nodes

        def touch(node: Node, position: int, at: int) -> None:
            source = node if position < 0 else nodes[node.inputs[position]]
            if source.layer.collected:
                return
            key = self.root((node.index, position))
            nbytes = math.prod(self.shape(source)) * self.type(source).itemsize
            old = lives.get(key, Life(nbytes, at, at))
            lives[key] = Life(max(old.nbytes, nbytes), min(old.first, at), max(old.last, at))

        end = len(plan.instructions)
        for at, instruction in enumerate(plan.instructions):
            match instruction:
                case Load(micro, _):
                    if micro > 0:  # the micro-batches of a slot are alike: the first one's lives are all lives
                        break
                    for index in (self.graph.images, self.graph.labels, self.graph.ids):
                        touch(nodes[index], -1, at)
                case Forward(group, _) | Backward(group, _):
                    for node in plan.groups[group].nodes:
                        touch(node, -1, at)
                        for position, source in enumerate(node.inputs):
                            touch(nodes[source], -1, at)
                            if isinstance(instruction, Backward) and nodes[source].needs_grad:
                                touch(node, position, at)
                        if isinstance(instruction, Backward):
                            for reader, position in self.graph.readers(node):
                                touch(reader, position, at)
                case Loss():
                    for index in self.graph.losses:
                        if plan.mode == "train" or not nodes[index].training_only:
                            touch(nodes[index], -1, at)
                case _:
                    pass
        if plan.mode == "eval":  # the scores and labels are read after the last instruction
            for index in (self.graph.output, self.graph.labels):
                touch(nodes[index], -1, end)
        return lives


def pack(lives: dict[Key, Life]) -> tuple[dict[Key, int], int]:
    """Offsets of buffers such that no two whose lives meet overlap, and the bytes needed in all.

    Greedy by size, each at the lowest gap that takes it (Pisarchyk and Lee 2020, section 5.2).
    """
    offsets: dict[Key, int] = {}
    placed: list[tuple[int, int, Life]] = []
    total = 0
    for key, life in sorted(lives.items(), key=lambda item: (-item[1].nbytes, item[0])):
        nbytes = -(-life.nbytes // ALIGNMENT) * ALIGNMENT
        offset = 0
        for lo, hi, other in placed:  # sorted by lo
            if other.first > life.last or other.last < life.first:
                continue
            if lo >= offset + nbytes:
                break
            offset = max(offset, hi)
        offsets[key] = offset
        placed.append((offset, offset + nbytes, life))
        placed.sort(key=lambda item: item[0])
        total = max(total, offset + nbytes)
    return offsets, total


class Buffers:
    """The arrays of one slot, by node: what a backend sees while it builds an op (`backends.base.Slot`)."""

    def __init__(self, layout: Layout, arena: Arena, store: Store, collected: dict[Key, Array], step: Step) -> None:
        self.step = step
        self._layout, self._arena, self._store, self._collected = layout, arena, store, collected

    def input(self, node: Node, position: int = 0) -> Array:
        """What `node` reads as its input number `position`."""
        return self.output(self._layout.graph.nodes[node.inputs[position]])

    def output(self, node: Node) -> Array:
        """What `node` writes in forward."""
        return self._array((node.index, -1), node)

    def d_output(self, node: Node) -> Array:
        """The gradient by the node's output."""
        return self.d_outputs(node)[0]

    def d_outputs(self, fork: Node) -> list[Array]:
        """The gradients that each reader wrote."""
        readers = self._layout.graph.readers(fork)
        return [self._array((reader.index, position), fork) for reader, position in readers]

    def d_input(self, node: Node, position: int = 0) -> Array | None:
        """Where `node` writes the gradient by its input number `position`; None where nobody wants it."""
        source = self._layout.graph.nodes[node.inputs[position]]
        return self._array((node.index, position), source) if source.needs_grad else None

    def param(self, node: Node, role: str) -> Array:
        """A parameter, as a view of the flat array."""
        return self._store.param(f"{node.name}.{role}")

    def d_param(self, node: Node, role: str) -> Array:
        """Its gradient, likewise."""
        return self._store.grad(f"{node.name}.{role}")

    def _array(self, key: Key, node: Node) -> Array:
        if node.layer.collected:
            return self._collected[key]
        layout = self._layout
        return self._arena.take(layout.offsets[layout.root(key)], layout.shape(node), layout.type(node))
