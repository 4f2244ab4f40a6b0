"""Our side on several ranks: a network as `dpnn train` builds it, over MPI, without a loader."""

import numpy as np
from harness import RATE
from ours import JOB, random_images

from dpnn import config, models
from dpnn.comm.grains import stack_places
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.reduce import measured_bucket
from dpnn.comm.world import World, start
from dpnn.data import Batch
from dpnn.evaluate import Model, segments_of
from dpnn.nn import Network, Shape
from dpnn.optim import STATES
from dpnn.plan import Placed
from dpnn.strategies.allreduce import Allreduce
from dpnn.strategies.flats import Flats


class Replica:
    """This rank's replica, and its batch of `rows` random samples; `step` is a training step on all ranks.

    Without a `world` it meets the others here. With `grains` sums are reproducible, over so many of them.
    """

    def __init__(
        self, network: Network, shape: Shape, rows: int, threads: int, world: World | None = None, grains: int = 0
    ) -> None:
        """Collective."""
        world = world or start()
        mesh = Mesh(world)
        total = rows * mesh.replicas
        overrides = ["train.reproducible=true", f"train.grains={grains}"] if grains else []
        job = config.parse(JOB.format(rows=total, rate=RATE, threads=threads), overrides)
        model = Model(job, Placed.whole(models.graph(job, network, shape)), mesh.part, threads)
        store = model.store
        segments = segments_of(store.pieces)
        states, limit_s = STATES[job.optimizer.name], job.parallel.stall_abort_s
        places = stack_places(grains, mesh.replicas)
        self.node = node = Node(mesh, store.size, model.dtype, states, model.kernels, limit_s, partials=places)
        flats = Flats.of(model.memory, node)
        store.place(flats.params, flats.grads)
        optimizer = flats.optimizer(job.optimizer, segments, node.sums, model.team, model.arithmetic)
        if mesh.replica == 0:
            store.draw(job.seed)
        node.share(node.params)
        self._strategy = Allreduce(mesh, node, flats, optimizer, job)
        self._strategy.rate, self._strategy.samples = RATE, rows
        measured = measured_bucket(node, limit_s)
        self.bucket_nbytes = world.first(lambda: measured)
        pieces = grains // mesh.replicas or 1
        plan = (rows // pieces, pieces, self.bucket_nbytes, grains > 0)
        layout = model.lay_out(world, lambda: model.training(*plan))
        self.executor = model.executor(layout, strategy=self._strategy)
        rng = np.random.default_rng(mesh.replica)
        x = random_images(rng, rows, shape)
        (classes,) = model.graph.nodes[model.graph.output].shape
        labels = rng.integers(0, classes, rows, np.int32)
        ids = np.arange(rows, dtype=np.uint64) + mesh.replica * rows
        self._step = (Batch(x, labels, ids, rows, 0, 0, None), [(rows // pieces, total // pieces)] * pieces, total)
        self._waited_s = 0.0

    def step(self) -> None:
        """One step over the batch."""
        self.executor.run(*self._step)
        self._waited_s += self._strategy.wait_s

    def waited_s(self) -> float:
        """How long the steps since the last call have waited for other ranks."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def about(self) -> str:
        """What lies behind the figures."""
        found = [f"buckets of {self.bucket_nbytes / 2**20:.2g} MiB, {self.node.comm.size} ranks share memory"]
        if self.node.note:
            found.append(f"memory isn't shared: {self.node.note}")
        progress = self._strategy._progress
        if progress is not None and progress.helps:
            found.append("a thread moves MPI")
        return ", ".join(found)
