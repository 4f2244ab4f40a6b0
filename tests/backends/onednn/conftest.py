"""A network on two plans: oneDNN's, with the reference behind it, and the reference's alone, in float64.

At a kink (a ReLU's input that is almost zero, two numbers of a window that are almost equal) rounding decides to which
side a gradient goes. The exact plan takes these decisions from the other one, after a check that they are no worse
than rounding, and so the tolerance for everything else can be narrow.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.base import Array, Backend, Group, Mode, Op, Room, Slot
from dpnn.backends.onednn.conv import Kit
from dpnn.backends.onednn.geometry import Algorithm, Direction, Geometry
from dpnn.backends.reference import Reference
from dpnn.backends.reference.pointwise import ReLUOp
from dpnn.backends.reference.pool import MaxPoolOp
from dpnn.data import Batch
from dpnn.nn.graph import Node
from dpnn.plan import Arena, Executor, Layout, Placed, Store, compile_plan

from ..conftest import ONEDNN

CLOSE = 1e-4
"""Of the largest number of an array: what is allowed, forward, backward and at a kink."""
CLASSES = 3
Decisions = dict[str, list[tuple[Array, Array]]]
"""What a node with a kink read and wrote, in each micro-batch of the step."""


class Watched:
    """oneDNN; notes the inputs and outputs of nodes with a kink."""

    def __init__(self, decisions: Decisions) -> None:
        self.name, self.dtype, self.channels_last = ONEDNN.name, ONEDNN.dtype, ONEDNN.channels_last
        self.about, self.choices = ONEDNN.about, ONEDNN.choices
        self.memory, self.kernels, self.arithmetic = ONEDNN.memory, ONEDNN.kernels, ONEDNN.arithmetic
        self.decisions = decisions

    def groups(self, nodes: Sequence[Node], mode: Mode) -> list[Group]:
        return [replace(group, backend=self) for group in ONEDNN.groups(nodes, mode)]

    def room(self, group: Group, rows: int, mode: Mode) -> Room:
        return ONEDNN.room(group, rows, mode)

    def build(self, group: Group, slot: Slot, mode: Mode) -> Op:
        return WatchedOp(ONEDNN.build(group, slot, mode), group, slot, self.decisions)


class WatchedOp:
    def __init__(self, op: Op, group: Group, slot: Slot, decisions: Decisions) -> None:
        self.op, self.step = op, slot.step
        self.backward, self.weights = op.backward, getattr(op, "weights", None)
        kinked = [node for node in group.nodes if isinstance(node.layer, nn.ReLU | nn.MaxPool)]
        self.notes = [decisions.setdefault(node.name, []) for node in kinked]
        self.arrays = [(slot.input(group.nodes[0]), slot.output(group.nodes[-1])) for _ in kinked]

    def forward(self) -> None:
        self.op.forward()
        for notes, arrays in zip(self.notes, self.arrays, strict=True):
            x, y = (array[: self.step.rows].copy() for array in arrays)
            notes.append((x, y))


class Follower(Reference):
    """The reference in float64, which follows decisions."""

    def __init__(self, decisions: Decisions) -> None:
        super().__init__(np.float64)
        self.decisions = decisions

    def build(self, group: Group, slot: Slot, mode: Mode) -> Op:
        (node,) = group.nodes
        kind = {nn.ReLU: FollowingReLU, nn.MaxPool: FollowingMaxPool}.get(type(node.layer))
        return kind(node, slot, mode, self.decisions[node.name]) if kind else super().build(group, slot, mode)


class FollowingReLU(ReLUOp):
    """y = x where the other let it pass."""

    def __init__(self, node: Node, slot: Slot, mode: Mode, decisions: list[tuple[Array, Array]]) -> None:
        super().__init__(node, slot, mode)
        self.decisions = decisions

    def forward(self) -> None:
        x = self.x[: self.step.rows]
        self.passes = self.decisions.pop(0)[1] > 0
        assert np.abs(x[self.passes != (x > 0)]).max(initial=0) <= CLOSE * np.abs(x).max(initial=0)
        self.y[: self.step.rows] = x * self.passes

    def backward(self) -> None:
        if self.dx is not None:
            self.dx[: self.step.rows] = self.dy[: self.step.rows] * self.passes


class FollowingMaxPool(MaxPoolOp):
    """y = the number at the place of each window that the other took: the first that is equal to its output."""

    def __init__(self, node: Node, slot: Slot, mode: Mode, decisions: list[tuple[Array, Array]]) -> None:
        super().__init__(node, slot, mode)
        self.decisions = decisions

    def forward(self) -> None:
        x, y = self.decisions.pop(0)
        padded = self.padded(self.step.rows, -np.inf)
        self.inner(padded)[...] = x
        equal = np.stack([place == y for place in self.places(padded)])
        assert equal.any(axis=0).all()
        self.first = equal & (equal.cumsum(axis=0) == 1)
        super().forward()
        exact, mine = self.y[: self.step.rows].copy(), self.y[: self.step.rows]
        mine[...] = 0
        for chosen, place in zip(self.first, self.places(self._padded_input()), strict=True):
            mine[chosen] = place[chosen]
        assert np.abs(mine - exact).max(initial=0) <= CLOSE * np.abs(exact).max(initial=0)

    def backward(self) -> None:
        if self.dx is not None:
            d_padded = self.padded(self.step.rows, 0.0)
            for chosen, dx in zip(self.first, self.places(d_padded), strict=True):
                dx += self.dy[: self.step.rows] * chosen
            self.dx[: self.step.rows] = self.inner(d_padded)


class Nobody:
    """A strategy, and a sum over replicas, of a lone rank."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


class Onlooker(Nobody):
    """A strategy that keeps the scores, whose place other buffers take in the backward pass."""

    def tell(self, loss: float) -> None:
        self.scores = self.executor.results[0].copy()


class Side:
    """One plan of a graph, bound. Memory is NaN until something is written."""

    def __init__(self, graph: nn.Graph, backends: Sequence[Backend], rows: int, microbatches: int, mode: Mode) -> None:
        placed, dtype = Placed.whole(graph), backends[0].dtype
        self.store = Store(placed.nodes(0), dtype)
        plan = compile_plan(placed, 0, backends, mode, rows, microbatches, self.store.pieces, 1 << 12)
        layout, arena = Layout(plan), Arena()
        arena.reserve(layout.nbytes)
        self.onlooker = Onlooker() if mode == "train" else None
        self.executor = Executor(layout, self.store, arena, 7, lambda array: Nobody(), self.onlooker)
        if self.onlooker:
            self.onlooker.executor = self.executor
        arena.take(0, (layout.nbytes,), np.dtype(np.uint8)).fill(255)
        self.store.grads.fill(np.nan)
        self.kinds = [tuple(type(node.layer) for node in group.nodes) for group in plan.groups]

    @property
    def scores(self) -> Array:
        """Of the last micro-batch."""
        return self.onlooker.scores if self.onlooker else self.executor.results[0]


class Pair:
    """A network on both plans, with the same parameters. `rows`: the most of a micro-batch."""

    def __init__(
        self,
        network: nn.Network,
        shape: nn.Shape,
        rows: int,
        microbatches: int = 1,
        mode: Mode = "train",
        seed: int = 0,
    ) -> None:
        self.graph = nn.Graph(network, shape, nn.SoftmaxCrossEntropy(smoothing=0.1))
        decisions: Decisions = {}
        backends = [Watched(decisions), Reference(np.float32)]
        self.ours = Side(self.graph, backends, rows, microbatches, mode)
        self.exact = Side(self.graph, [Follower(decisions)], rows, microbatches, mode)
        self.shape, self.rows, self.microbatches, self.mode = shape, rows, microbatches, mode
        self.rng = np.random.default_rng(seed)
        self.ours.store.draw(seed)
        for piece in self.ours.store.pieces:
            if piece.spec.draw != "he":
                low = 0.5 if piece.spec.draw == "ones" else -0.5
                self.ours.store.param(piece.name)[...] = self.rng.uniform(low, low + 1, piece.spec.shape)
        self.exact.store.params[...] = self.ours.store.params

    def step(self, rows: int, share: float = 0.0) -> None:
        """A step of `rows` samples on both; everything that it makes is compared.

        A gradient is measured by the largest number of its array, or by this share of the largest of all arrays.
        """
        x = self.rng.standard_normal((rows, *self.shape)).astype(np.float32)
        labels = self.rng.integers(0, self.graph.nodes[self.graph.output].shape[0], rows).astype(np.int32)
        batch = Batch(x, labels, np.arange(rows, dtype=np.uint64) + 11, rows, 1, 0, None)
        bounds = [rows * m // self.microbatches for m in range(self.microbatches + 1)]
        counts = [(hi - lo,) * 2 for lo, hi in pairwise(bounds)]
        for side in (self.ours, self.exact):
            side.executor.run(batch, counts, rows)
        ours, exact = self.ours, self.exact
        last = counts[-1][0]
        same("scores", ours.scores[:last], exact.scores[:last])
        same("loss", ours.executor.loss, exact.executor.loss)
        if self.mode == "train":
            wanted = exact.store.split(exact.store.grads)
            least = share * np.abs(exact.store.grads[: exact.store.n_trained]).max()
            for name, grad in ours.store.split(ours.store.grads).items():
                # A normalisation further on may cancel a bias: its gradient is measured by that of the weights, too.
                scale = np.abs(wanted[f"{name.rpartition('.')[0]}.weight"]).max() if name.endswith(".bias") else 0.0
                same(f"gradient of {name}", grad, wanted[name], max(scale, least))


def same(what: str, ours: Any, wanted: Any, scale: float = 0.0, close: float = CLOSE) -> None:
    """The numbers of two arrays differ by little in relation to the largest; NaN differs from everything."""
    largest = max(scale, float(np.abs(wanted).max(initial=0)))
    difference = float(np.abs(np.asarray(ours, np.float64) - wanted).max(initial=0))
    assert difference <= close * largest, f"{what}: differs by {difference:.3g} of {largest:.3g}"


def force(patch: pytest.MonkeyPatch, **names: str) -> None:
    """Convolutions take the algorithm named for each direction, wherever it can be used."""

    def choose(kit: Kit, g: Geometry, direction: Direction) -> Algorithm:
        found = kit.algorithms(g, direction)
        return found.get(names[direction]) or next(iter(found.values()))

    patch.setattr(Kit, "choose", choose)
