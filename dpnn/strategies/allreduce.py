"""Synchronous training: one gradient, summed over all replicas while backward goes on.

Every loss is divided by the number of samples of the whole step, so the plain sum over the replicas is the mean over
all samples, also when they hold different numbers of them. The loss, requests to stop and bad samples travel with it
as a few numbers of their own, from the last forward to `finish`. Each replica updates those parameters of its node
whose sums it made, piece by piece while they are still in its cache; with clipping, once the norm of all is known.
"""

import math
from functools import partial
from time import perf_counter

import numpy as np

from dpnn import config
from dpnn.comm.grains import GrainReducer
from dpnn.comm.lifted import GrainsOverHost, Reducer, lifted
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.progress import progress
from dpnn.comm.reduce import BucketReducer, GradientReducer
from dpnn.errors import NotFiniteError
from dpnn.optim import Optimizer
from dpnn.strategies.base import NEVER, Since
from dpnn.strategies.flats import Flats


class Allreduce:
    """One update a step, the same on every replica."""

    together = True

    def __init__(self, mesh: Mesh, node: Node, flats: Flats, optimizer: Optimizer, job: config.Job) -> None:
        limit_s = job.parallel.stall_abort_s
        self.rate, self.stop, self.loss, self.samples = 0.0, False, 0.0, 0
        self.skipped = self.bad_samples = 0
        self.wait_s = self.update_s = 0.0
        self.steps, self.since, self.alone = 0, NEVER, False
        self._n, self._began = node.grads.size, 0.0
        self._clips, self._optimizer = job.optimizer.clip > 0, optimizer
        self._told = np.zeros(3)  # loss, requests to stop, bad samples
        self._has_told = False
        self._squares = np.zeros(1)  # of the gradient: of my shares, then of all
        self._late: list[tuple[int, int]] = []
        """What arrived before it could be used."""
        self._node, self._flats, self._all = node, flats, flats.lifted or job.train.reproducible
        """The last: whether each replica adds up all squares, not only those of its share."""
        self._gradients, self.sums_by = self._reducer(job, limit_s)
        self._progress = progress(node.data, len(node.groups))
        self._telling = BucketReducer(mesh.crew.comm, self._told, limit_s, "losses")
        self._norms = [BucketReducer(comm, self._squares, limit_s, "norms") for comm in (node.comm, mesh.model)]

    def begin(self) -> None:
        """Nothing is under way: `finish` has waited for all."""
        self._has_told, self._began = False, perf_counter()
        self._late.clear()
        self._squares[0] = self.update_s = 0.0

    def open(self, lo: int, hi: int) -> None:
        """Nobody else reads the gradients: `finish` has waited for all."""

    def ready(self, lo: int, hi: int) -> None:
        """Start to sum this bucket."""
        self._gradients.start(lo, hi)
        if self._progress is not None:
            self._progress.on()

    def poke(self) -> None:
        """Go on with what is under way."""
        self._gradients.poke()

    def tell(self, loss: float) -> None:
        """Start to sum the loss, the requests to stop and the bad samples."""
        self._told[:] = loss, self.stop, self.skipped
        self._has_told = True
        self._telling.start(0, self._told.size)

    def finish(self) -> None:
        """Wait for every sum, update the rest. NotFiniteError, on all ranks, where the loss isn't finite."""
        start, before = perf_counter(), self.update_s
        self._telling.finish()
        self._gradients.finish()
        self.loss, self.stop = float(self._told[0]), self._told[1] > 0
        self.bad_samples += int(self._told[2])
        if math.isfinite(self.loss):
            if self._node.undo is not None:
                self._node.undo.begin(self.steps)
            scale = self._clip_scale() if self._clips else 1.0
            for lo, hi in self._late:
                self._update(lo, hi, scale)
        self._gradients.settle()
        self.steps += 1
        end = perf_counter()
        if self._progress is not None:
            self._progress.off(end - self._began, self.samples)
        self.wait_s = end - start - (self.update_s - before)
        if not math.isfinite(self.loss):
            raise NotFiniteError(f"the loss is {self.loss}")

    def close(self) -> None:
        """End the thread that helps MPI to move."""
        if self._progress is not None:
            self._progress.close()

    def meet(self) -> None:
        """All replicas have the same parameters anyway."""

    def leave(self) -> None:
        """End the thread that helps MPI to move."""
        self.close()

    def held(self) -> tuple[int, int]:
        """Others of the node may have begun to take the last step back."""
        undo = self._node.undo
        return self.steps - int(undo is not None and undo.back(self.steps - 1)), 0

    def go_back(self, steps: int, averages: int) -> Since:
        """Take back what ranks of the node, dead ones too, have done in the step after these."""
        if self._node.undo is not None:
            self._node.undo.take_back(steps)
        return self.since

    def gather(self) -> None:
        """All replicas always have the same parameters, so one of each node brings them to the host."""
        if self._node.comm.rank == 0:
            self._flats.pull()

    def release(self) -> None:
        """Nothing was changed."""

    def _reducer(self, job: config.Job, limit_s: float) -> tuple[Reducer, str]:
        """What sums the gradients; and by which way, where they lie on devices. Collective over the replicas."""
        node, flats = self._node, self._flats
        told = (lambda lo, hi: None) if flats.lifted else self._arrived
        if job.train.reproducible:
            grains = GrainReducer(node, job.train.grains, told, limit_s)
            if not flats.lifted:
                return grains, ""
            return GrainsOverHost(grains, node, flats.memory, flats.grads, self._arrived, limit_s), "host"
        host = partial(GradientReducer, node, told, limit_s, rounds=job.parallel.wire == "bfloat16")
        return lifted(node, flats.memory, flats.grads, host, self._arrived, limit_s) if flats.lifted else (host(), "")

    def _arrived(self, lo: int, hi: int) -> None:
        """Update by the sums of [lo, hi), unless the loss may not be finite, or all sums have to be known."""
        known = self._has_told and self._telling.poke()
        if self._clips and not self._all:
            self._squares[0] += self._optimizer.sum_of_squares(lo, hi)
        if self._clips or not known or not math.isfinite(self._told[0]):
            self._late.append((lo, hi))
        else:
            self._update(lo, hi, 1.0)

    def _update(self, lo: int, hi: int, scale: float) -> None:
        begin = perf_counter()
        if self._node.undo is not None:
            self._node.undo.begin(self.steps)
        self._optimizer.apply(lo, hi, self.rate, scale)
        self.update_s += perf_counter() - begin

    def _clip_scale(self) -> float:
        """What brings the norm of the whole gradient, over the shares of a node and the parts, under the limit."""
        if self._all:
            self._gradients.settle()
            self._squares[0] = self._optimizer.sum_of_squares(0, self._n)
        for norms in self._norms[self._all :]:
            norms.start(0, 1)
            norms.finish()
        return self._optimizer.clip_scale(float(self._squares[0]))
