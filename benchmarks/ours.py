"""Our side of a measurement: a network as `dpnn train` builds it, on one rank, without MPI and without a loader."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np
from harness import RATE

from dpnn import config, models
from dpnn.balance import Nobody
from dpnn.data import Batch
from dpnn.evaluate import Model, segments_of
from dpnn.nn import Conv, Dense, Network, Shape
from dpnn.optim import Optimizer
from dpnn.plan import Placed, Store

JOB = """
[data]
train = "random numbers"
[model]
name = "given"
[train]
steps = 1
global_batch = {rows}
[optimizer]
name = "momentum"
lr = {rate:f}
momentum = 0.9
weight_decay = 1e-4
[backend]
name = "auto"
threads = {threads}
"""


def fill(store: Store) -> None:
    """Initial values as Store.draw draws them, but others, in a tenth of the time."""
    rng = np.random.default_rng(0)
    for piece in store.pieces:
        param = store.params[piece.offset : piece.end]
        if piece.spec.draw == "he":
            rng.standard_normal(dtype=np.float32, out=param)
            param *= math.sqrt(2 / piece.spec.fan_in)
        else:
            param[...] = piece.spec.draw == "ones"
    store.params_wire.push()


def random_images(rng: np.random.Generator, rows: int, shape: Shape) -> np.ndarray:
    """A batch, in memory as the loader brings images: channels-last."""
    x = rng.standard_normal((rows, *shape[1:], shape[0]), np.float32)
    return x.transpose(0, 3, 1, 2) if len(shape) == 3 else x


class Alone(Nobody):
    """The strategy of a rank without others: nothing is exchanged, `finish` updates the parameters."""

    def __init__(self, optimizer: Optimizer, grads: np.ndarray) -> None:
        self._optimizer, self._grads = optimizer, grads

    def finish(self) -> None:
        """Update all parameters."""
        self._optimizer.apply(0, self._grads.size, RATE)


class Ours:
    """A network and a batch of random numbers; `step` is a training step, or (`eval`) a forward pass.

    `strategy` is what the gradients, in buckets of `bucket_nbytes` or in one, are handed to. `gpu`: on the first GPU,
    where a step is over when all is computed.
    """

    def __init__(
        self,
        network: Network,
        shape: Shape,
        rows: int,
        threads: int,
        mode: Literal["train", "eval"],
        strategy: Callable[[Optimizer, np.ndarray], Alone] = Alone,
        bucket_nbytes: int = 0,
        gpu: bool = False,
    ) -> None:
        job = config.parse(JOB.format(rows=rows, rate=RATE, threads=threads), ["backend.name=cuda"] if gpu else [])
        placed = Placed.whole(models.graph(job, network, shape))
        self.model = model = Model(job, placed, 0, threads, local_rank=0 if gpu else None)
        store, layout, updates = model.store, None, None
        if mode == "train":
            segments = segments_of(store.pieces)
            params, grads = store.params_wire.array, store.grads_wire.array
            state = {"momentum": model.memory.lift(np.zeros_like(store.params)).array}
            optimizer = Optimizer(job.optimizer, segments, params, grads, model.team, model.arithmetic, state)
            updates = strategy(optimizer, grads)
            layout = model.training(rows, bucket_nbytes=bucket_nbytes)
        else:
            layout = model.evaluation(rows)
        self.strategy = updates
        self.executor = model.executor(layout, strategy=updates)
        self._nbytes = layout.nbytes + (3 if updates else 1) * store.params.nbytes
        fill(store)
        rng = np.random.default_rng(0)
        x = random_images(rng, rows, shape)
        (classes,) = model.graph.nodes[model.graph.output].shape
        labels = rng.integers(0, classes, rows, np.int32)
        self._step = (Batch(x, labels, np.arange(rows, dtype=np.uint64), rows, 0, 0, None), [(rows, rows)], rows)

    def step(self) -> None:
        """One step over the batch."""
        self.executor.run(*self._step)
        self.model.memory.wait()

    def scores(self, x: np.ndarray) -> np.ndarray:
        """The network's output for other images, (rows, classes); in mode "eval"."""
        batch, counts, total = self._step
        self.executor.run(batch._replace(x=x), counts, total)
        return self.executor.results[0][: batch.rows]

    def backends(self) -> str:
        """Which backends compute how many of the groups, and why not the best one."""
        found = Counter(group.backend.name for group in self.executor.plan.groups)
        names = [f"{name} ({n} groups)" for name, n in found.items()]
        return ", ".join([*names, self.model.note] if self.model.note else names)

    def nbytes(self) -> int:
        """What all buffers take, known before the first step."""
        return self._nbytes

    def peer_nbytes(self) -> int:
        """About what PyTorch takes, eager and both layouts: parameters, outputs kept, and some that come and go."""
        rows, train = self.executor.plan.rows, self.executor.plan.mode == "train"
        # ReLU's outputs aren't kept, they are made in place; but poolings keep where their maxima were.
        outputs = [4 * rows * math.prod(node.shape) for node in self.model.graph.nodes if node.shape]
        # Two processes hold parameters (in training also gradients and momentum); one of them at a time takes a step.
        held = 2 * (3 if train else 1) * self.model.store.params.nbytes
        return held + train * sum(outputs) + 3 * max(outputs)

    def multiply_adds(self) -> int:
        """Of one training step, in convolutions and dense layers, as the direct algorithm has them.

        Forward, backward by the weights, and backward by the data save where no gradient is wanted.
        """
        graph = self.model.graph
        total = 0
        for node in graph.nodes:
            if isinstance(node.layer, Conv | Dense):
                weight = next(param.spec.shape for param in node.params if param.role == "weight")
                passes = 3 if graph.nodes[node.inputs[0]].needs_grad else 2
                total += passes * math.prod(node.shape[1:]) * math.prod(weight)
        return self.executor.plan.rows * total
