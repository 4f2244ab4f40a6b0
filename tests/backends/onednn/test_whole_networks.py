"""Whole networks learn as on the reference: ten steps from equal parameters."""

import math
from typing import Any

import numpy as np
import pytest

from dpnn import config, models, nn
from dpnn.backends.base import Backend
from dpnn.backends.reference import Reference
from dpnn.data import Batch
from dpnn.optim import Optimizer, Segment
from dpnn.plan import Arena, Executor, Layout, Placed, Store, compile_plan
from dpnn.team import Team

from ..conftest import ONEDNN
from .conftest import Nobody

STEPS, CLASSES = 10, 5
CLOSE = 1e-3
"""Of the loss: small differences grow from step to step, where a ReLU or a maximum decides otherwise."""


class Descent(Nobody):
    """Stochastic gradient descent of a lone rank."""

    def __init__(self, store: Store, lr: float) -> None:
        segments = [Segment(p.offset, p.end, p.spec.decay, p.spec.statistic) for p in store.pieces]
        options = config.Optimizer(name="sgd", lr=lr)
        self.optimizer = Optimizer(options, segments, store.params, store.grads, Team(2), ONEDNN.kernels)
        self.n, self.lr = store.params.size, lr

    def finish(self) -> None:
        self.optimizer.apply(0, self.n, self.lr)


class Run:
    """Training of a graph by some backends; `losses` of the steps."""

    def __init__(self, graph: nn.Graph, backends: list[Backend], rows: int, lr: float) -> None:
        placed, dtype = Placed.whole(graph), np.dtype(np.float32)
        self.store = Store(placed.nodes(0), dtype)
        plan = compile_plan(placed, 0, backends, "train", rows, 1, self.store.pieces, 1 << 20)
        layout, arena = Layout(plan), Arena()
        arena.reserve(layout.nbytes)
        self.executor = Executor(layout, self.store, arena, 0, lambda array: Nobody(), Descent(self.store, lr))
        self.losses: list[float] = []

    def step(self, batch: Batch) -> None:
        self.executor.run(batch, [(batch.rows, batch.rows)], batch.rows)
        self.losses.append(self.executor.loss)


@pytest.mark.parametrize(
    ("name", "side", "rows", "lr", "options"),
    [
        ("lenet", 28, 4, 1e-3, {}),
        ("alexnet", 67, 2, 1e-4, {}),
        ("googlenet", 79, 2, 1e-5, {"heads": True}),
        pytest.param("vgg", 32, 2, 2e-5, {"depth": 11}, marks=pytest.mark.soak),
        ("resnet", 33, 4, 1e-3, {"depth": 18}),
        pytest.param("resnet", 33, 4, 1e-4, {"depth": 50, "sync": True}, marks=pytest.mark.soak),
    ],
    ids=["lenet", "alexnet", "googlenet-heads", "vgg11", "resnet18", "resnet50-sync"],
)
def test_losses_of_ten_steps(name: str, side: int, rows: int, lr: float, options: dict[str, Any]):
    shape = (1 if name == "lenet" else 3, side, side)
    graph = nn.Graph(models.build(name, CLASSES, shape, options), shape, nn.SoftmaxCrossEntropy())
    ours = Run(graph, [ONEDNN, Reference(np.float32)], rows, lr)
    exact = Run(graph, [Reference(np.float32)], rows, lr)
    rng = np.random.default_rng(1)
    for piece in ours.store.pieces:
        param = ours.store.param(piece.name)
        param[...] = piece.spec.draw == "ones"
        if piece.spec.draw == "he":
            param[...] = rng.standard_normal(param.shape, np.float32) * math.sqrt(2 / piece.spec.fan_in)
        if piece.name.endswith(("body.batchnorm2.weight", "body.batchnorm3.weight")):
            param[...] = 0.2  # residual blocks begin small, as in Goyal et al. 2017, section 5.1: else it is chaos
    exact.store.params[...] = ours.store.params
    x, labels = rng.standard_normal((rows, *shape), np.float32), np.arange(rows, dtype=np.int32) % CLASSES
    ids = np.arange(rows, dtype=np.uint64)
    for step in range(STEPS):  # the same samples each time, so that the loss falls
        for run in (ours, exact):
            run.step(Batch(x, labels, ids, rows, 0, step, None))
    assert ours.losses == pytest.approx(exact.losses, rel=CLOSE)
    assert ours.losses[-1] < 0.9 * ours.losses[0]
