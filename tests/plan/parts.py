"""A network trained over the parts of a mesh, and by one rank; and networks and placements drawn at random."""

import random
import tracemalloc
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from dpnn import config
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.reduce import BucketReducer
from dpnn.comm.world import World
from dpnn.data import Batch, no_samples
from dpnn.evaluate import Model, segments_of
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
    LocalResponseNorm,
    MaxPool,
    Network,
    ReLU,
    SoftmaxCrossEntropy,
)
from dpnn.optim import STATES
from dpnn.plan import Placement, spread
from dpnn.plan.placement import settled
from dpnn.strategies.allreduce import Allreduce
from dpnn.strategies.flats import Flats

CLASSES, SHAPE = 5, (3, 8, 8)


@dataclass
class Course:
    """What is trained, and how."""

    network: Network
    shape: tuple[int, ...] = SHAPE
    classes: int = CLASSES
    rows: int = 6
    microbatches: int = 1
    steps: int = 3
    rate: float = 0.02
    backend: dict[str, Any] = field(default_factory=lambda: {"name": "reference", "precision": "float64", "threads": 1})
    pipeline: str = "1f1b"
    clip: float = 0.0
    disturbance: float = 0.0
    """Relative, of all parameters to begin with."""
    traced: bool = False
    """Whether what Python reserves in the last step is counted."""

    @property
    def graph(self) -> Graph:
        return Graph(self.network, self.shape, SoftmaxCrossEntropy())

    def job(self) -> config.Job:
        return config.Job(
            seed=3,
            data=config.Data(train="data"),
            model=config.Model(name="resnet20"),
            train=config.Train(steps=self.steps, global_batch=self.rows),
            optimizer=config.Optimizer(name="momentum", lr=self.rate, clip=self.clip, weight_decay=1e-3),
            parallel=config.Parallel(stall_abort_s=30, pipeline=self.pipeline),
            backend=config.Backend(**self.backend),
        )

    def batch(self, step: int) -> Batch:
        """All samples of a step."""
        rng = np.random.default_rng(step)
        x = rng.normal(size=(self.rows, *self.shape))
        labels = rng.integers(0, self.classes, self.rows).astype(np.int32)
        return Batch(x, labels, np.arange(self.rows, dtype=np.uint64) + 1000 * step, self.rows, 0, step, None)


@dataclass
class Trained:
    """The network's parameters by name, whole; the losses of all steps; the plan, and the bytes that it sent a step;
    the bytes that were reserved at most in the last one.
    """

    params: dict[str, np.ndarray]
    losses: list[float]
    model: Model
    plan: Any
    sent: float
    reserved: int


def train(world: World, course: Course, placement: Placement | None = None) -> Trained:
    """Train over all ranks of `world`, in replicas of as many parts as the placement has."""
    placement = placement or Placement(1, (0,) * len(course.graph.nodes))
    job, mesh = course.job(), Mesh(world, placement.parts)
    placed = spread(course.graph, placement)
    model = Model(job, placed, mesh.part, 1, 0)
    store, limit_s = model.store, job.parallel.stall_abort_s
    node = Node(mesh, store.size, model.dtype, STATES["momentum"], model.kernels, limit_s)
    flats = Flats.of(model.memory, node)
    store.place(flats.params, flats.grads)
    if mesh.replica == 0:
        store.draw(3)
        np.multiply(store.params, 1 + course.disturbance, out=store.params)
    node.share(node.params)
    optimizer = flats.optimizer(job.optimizer, segments_of(store.pieces), node.sums, model.team, model.arithmetic)
    strategy = Allreduce(mesh, node, flats, optimizer, job)
    strategy.rate = course.rate
    mine = range(course.rows * mesh.replica // mesh.replicas, course.rows * (mesh.replica + 1) // mesh.replicas)
    cuts = [len(mine) * i // course.microbatches for i in range(course.microbatches + 1)]
    most = max(hi - lo for lo, hi in pairwise(cuts))
    layout = model.lay_out(world, lambda: model.training(most, course.microbatches, 4096))
    sum_over = partial(BucketReducer, mesh.data, limit_s=limit_s)
    executor = model.executor(layout, sum_over, strategy, mesh=mesh)
    losses = []
    for step in range(course.steps):
        batch, run = course.batch(step), slice(mine.start, mine.stop)
        own = batch._replace(x=batch.x[run], labels=batch.labels[run], ids=batch.ids[run], rows=len(mine))
        strategy.samples = len(mine)
        counts = [(hi - lo, (hi - lo) * mesh.replicas) for lo, hi in pairwise(cuts)]
        if course.traced and step == course.steps - 1:
            tracemalloc.start()
        executor.run(own if mesh.part == placed.reader else no_samples(0, step), counts, course.rows)
        losses.append(strategy.loss)
    reserved = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    strategy.close()
    sent = executor._edges.nbytes / course.steps if executor._edges else 0
    return Trained(collected(mesh, model), losses, model, layout.plan, sent, reserved)


def collected(mesh: Mesh, model: Model) -> dict[str, np.ndarray]:
    """The whole parameters, of the pieces that all parts hold."""
    mine = [(p.name, p.lo, p.whole, model.store.params[p.offset : p.end]) for p in model.store.pieces]
    found: dict[str, list[Any]] = {}
    for pieces in mesh.model.allgather(mine):
        for name, lo, whole, flat in pieces:
            found.setdefault(name, []).append((lo, whole, flat))
    return {
        name: np.concatenate([flat for _, _, flat in sorted(pieces, key=lambda p: p[0])]).reshape(pieces[0][1])
        for name, pieces in found.items()
    }


def random_network(rng: random.Random) -> Network:
    """A Chain with Branches in it, of all layers."""
    parts: list[Network] = [Conv(rng.choice([3, 4]), 3, padding=1), ReLU()]
    channels = parts[0].filters
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["conv", "norm", "pool", "wide", "residual", "lrn", "dropout"])
        if kind == "conv":
            channels = rng.choice([4, 5, 6])
            parts += [Conv(channels, 3, padding=1), *([ReLU()] if rng.random() < 0.5 else [])]
        elif kind == "norm":
            parts += [BatchNorm(sync=rng.random() < 0.5), ReLU()]
        elif kind == "pool":
            parts.append(rng.choice([MaxPool(3, 1, padding=1), AvgPool(3, 1, padding=1)]))
        elif kind == "lrn":
            parts.append(LocalResponseNorm(3))
        elif kind == "dropout":
            parts.append(Dropout(0.3))
        elif kind == "wide":
            widths = [rng.choice([2, 3]) for _ in range(rng.randint(2, 5))]
            parts.append(Branches(*(_branch(rng, width) for width in widths), join=Concat()))
            channels = sum(widths)
        else:
            branches = [_branch(rng, channels) for _ in range(rng.randint(1, 4))]
            parts.append(Branches(*branches, Chain(), join=Add()))
    tail = Chain(Flatten(), Dense(8), ReLU(), Dropout(0.2), Dense(CLASSES))
    if rng.random() < 0.3:
        return Chain(*parts, Branches(tail, Chain(AvgPool(4), Flatten(), Dense(CLASSES)), join=Heads(1, 0.3)))
    return Chain(*parts, tail)


def _branch(rng: random.Random, width: int) -> Network:
    first: list[Network] = [Conv(width, 1)]
    if rng.random() < 0.3:
        first = [Branches(Conv(width, 1), Conv(width, 3, padding=1), join=Add())]
    if rng.random() < 0.5:
        first += [ReLU(), Conv(width, 3, padding=1)]
    if rng.random() < 0.3:
        first.append(BatchNorm())
    return Chain(*first)


def random_placement(rng: random.Random, graph: Graph, parts: int) -> Placement:
    """In runs, or each node for itself; some layers shared out by their filters."""
    n = len(graph.nodes)
    if rng.random() < 0.5:
        cuts = sorted(rng.choices(range(n), k=parts - 1))
        part_of = [sum(i >= cut for cut in cuts) for i in range(n)]
    else:
        part_of = [rng.randrange(parts) for _ in range(n)]
    shards = {}
    for node in graph.nodes:
        filters = getattr(node.layer, "filters", getattr(node.layer, "units", 0))
        filters *= getattr(node.layer, "groups", 1) == 1
        if filters >= parts and rng.random() < 0.3:
            shards[node.index] = tuple(rng.sample(range(parts), rng.randint(2, parts)))
    return settled(graph, parts, part_of, shards)
