"""A network with one of everything, and what a plan of it needs, without MPI."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from dpnn.backends.reference import Reference
from dpnn.data import Batch
from dpnn.nn import (
    Add,
    AvgPool,
    BatchNorm,
    Branches,
    Chain,
    Concat,
    Conv,
    Dense,
    Dropout,
    Flatten,
    Graph,
    Heads,
    MaxPool,
    Network,
    ReLU,
    SoftmaxCrossEntropy,
)
from dpnn.plan import Arena, Executor, Layout, Placed, Plan, Store, compile_plan

CLASSES, SHAPE = 3, (2, 8, 8)


def wide(sync: bool = False, dropout: float = 0.5) -> Network:
    """Forks, joins, heads, dropout, normalisation: every way in which nodes are put together."""
    block = Branches(Chain(Conv(4, 3, padding=1), ReLU()), Chain(Conv(2, 1)), join=Concat(), name="wide")
    residual = Branches(Chain(Conv(6, 3, padding=1), BatchNorm(sync=sync)), Chain(), join=Add(), name="residual")
    aside = Chain(AvgPool(3), Flatten(), Dense(CLASSES))
    main = Chain(ReLU(), Flatten(), Dropout(dropout), Dense(CLASSES))
    return Chain(
        Conv(3, 3), BatchNorm(sync=sync), MaxPool(2), block, residual, Branches(main, aside, join=Heads(1, 0.3))
    )


@dataclass
class Recorder:
    """A strategy of one rank that keeps what it was told."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def begin(self) -> None:
        self.calls.append(("begin",))

    def open(self, lo: int, hi: int) -> None:
        self.calls.append(("open", lo, hi))

    def ready(self, lo: int, hi: int) -> None:
        self.calls.append(("ready", lo, hi))

    def poke(self) -> None:
        pass

    def tell(self, loss: float) -> None:
        self.calls.append(("tell", loss))

    def finish(self) -> None:
        self.calls.append(("finish",))


class Alone:
    """The sum over one replica."""

    def __init__(self, array: Any) -> None:
        pass

    def start(self, lo: int, hi: int) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass
class Built:
    """A plan, bound."""

    graph: Graph
    plan: Plan
    layout: Layout
    store: Store
    executor: Executor
    strategy: Recorder


@pytest.fixture
def build() -> Callable[..., Built]:
    """Make a training plan of a network, or (`mode`) an evaluation plan over the same store."""

    def make(
        network: Network,
        rows: int = 4,
        microbatches: int = 1,
        bucket_nbytes: int = 400,
        dtype: Any = np.float64,
        mode: Any = "train",
        store: Store | None = None,
    ) -> Built:
        graph = Graph(network, SHAPE, SoftmaxCrossEntropy())
        backend = Reference(np.dtype(dtype))
        placed = Placed.whole(graph)
        nodes = placed.nodes(0)
        store = store or Store(nodes, backend.dtype)
        plan = compile_plan(placed, 0, [backend], mode, rows, microbatches, store.pieces, bucket_nbytes)
        layout, arena, strategy = Layout(plan), Arena(), Recorder()
        arena.reserve(layout.nbytes)
        executor = Executor(layout, store, arena, 7, Alone, strategy if mode == "train" else None)
        return Built(graph, plan, layout, store, executor, strategy)

    return make


@pytest.fixture
def batch() -> Callable[[int], Batch]:
    """`rows` random samples."""

    def make(rows: int) -> Batch:
        rng = np.random.default_rng(rows)
        x = rng.normal(size=(rows, *SHAPE))
        labels = rng.integers(0, CLASSES, rows).astype(np.int32)
        return Batch(x, labels, np.arange(rows, dtype=np.uint64), rows, 0, 0, 0)

    return make
