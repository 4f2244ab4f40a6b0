"""ParallelSGD (Zinkevich, Weimer, Smola and Li 2010): every replica takes its own steps, parameters are averaged.

Algorithm 1 of the paper averages once, at the end (`parallel.every` = 0); else they are averaged after every so many
steps. Replicas weigh as much as the samples that they took since the last time. What the optimizer keeps is averaged
too, or kept by each replica, or set to 0 (`parallel.state`).

Between two averages no replica waits for another, save that requests to stop, losses that aren't finite and bad samples
are told every few steps, and heard the next time: replicas are never further apart than that.
"""

import math
from time import perf_counter

import numpy as np

from dpnn import config
from dpnn.comm.losses import survives
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.reduce import BucketReducer, GradientReducer
from dpnn.errors import NotFiniteError
from dpnn.memory import Array, Wire
from dpnn.optim import Optimizer
from dpnn.strategies.base import NEVER, Since
from dpnn.strategies.flats import Flats

_TELL_STEPS = 8
"""Steps from one telling to the next."""


class Average:
    """Each replica's own SGD; `gather` makes the mean of all, for who wants to read the parameters."""

    together = False
    sums_by = ""

    def __init__(self, mesh: Mesh, node: Node, flats: Flats, optimizer: Optimizer, job: config.Job) -> None:
        limit_s = job.parallel.stall_abort_s
        self.rate, self.stop, self.loss, self.samples = 0.0, False, 0.0, 0
        self.skipped = self.bad_samples = 0
        self.wait_s = self.update_s = 0.0
        self._every, self._state = job.parallel.every, job.parallel.state
        self._node, self._flats, self._optimizer, self._clips = node, flats, optimizer, job.optimizer.clip > 0
        self.steps, self.since, self.alone = 0, NEVER, False
        self._together = 0
        """Steps that all have taken together."""
        self._before = self._averaged = self.since
        """What `since` was before the last step, and before the last average."""
        self._undo = node.undo
        """For a step that not all parts of this replica could end."""
        self._bad = False
        """Whether a loss of this replica wasn't finite since it last told."""
        self._untold = 0
        """Bad samples of this rank since it last told."""
        self._told = np.zeros(3)  # losses that aren't finite, requests to stop, bad samples
        self._telling = BucketReducer(mesh.crew.comm, self._told, limit_s, "requests to stop")
        self._first = mesh.part == 0
        self._loss = np.zeros(1)  # of this replica: the sum over its parts
        self._losses = BucketReducer(mesh.model, self._loss, limit_s, "losses")
        self._norm = np.zeros(1)  # sum of squares of the gradient, over the parts of a replica
        self._norms = BucketReducer(mesh.model, self._norm, limit_s, "norms")
        self._samples = np.zeros(1)
        self._weighing = BucketReducer(mesh.data, self._samples, limit_s, "samples taken")
        self._sum = GradientReducer(node, lambda lo, hi: None, limit_s)
        self._own: list[Array] = []
        """What this replica has where the mean is read meanwhile; made for the first time, and kept."""
        self._away = False
        """Whether it stands on that."""

    def begin(self) -> None:
        """Nothing is under way that the step could disturb."""

    def open(self, lo: int, hi: int) -> None:
        """Nobody else reads the gradients."""

    def ready(self, lo: int, hi: int) -> None:
        """They stay on this replica."""

    def poke(self) -> None:
        """Let MPI move."""
        self._telling.poke()
        self._losses.poke()

    def tell(self, loss: float) -> None:
        """Start to sum the loss of this replica over its parts."""
        self._loss[0] = loss
        self._losses.start(0, 1)

    def finish(self) -> None:
        """Update by this replica's own gradient; now and then tell the others, and average.

        NotFiniteError, on all replicas after the same step, where the loss of one isn't finite.
        """
        start = perf_counter()
        self._losses.finish()
        self.loss = float(self._loss[0])
        if self.samples and math.isfinite(self.loss):
            self._update(self._clip_scale())
        updated = perf_counter()
        self.steps += 1
        self._before = since = self.since
        self.since = Since(since.steps + 1, since.samples + self.samples, since.averages)
        if not math.isfinite(self.loss):
            self._bad = True
        self._untold += self.skipped
        asked, self.stop = self.stop, False
        if not self.alone:
            self._together += 1
            if self._together % _TELL_STEPS == 0:
                self._hear(asked)
            self.meet()
        self.wait_s, self.update_s = perf_counter() - updated, updated - start

    def close(self) -> None:
        """All have told one another what they have skipped, and nothing is under way."""
        self._heard()
        self._tell(0.0, 0.0)
        self._heard()

    def leave(self) -> None:
        """Nothing of it goes on by itself."""

    def held(self) -> tuple[int, int]:
        """What is done in a step is done once it has ended; an average, once all is averaged."""
        return self.steps, self.since.averages

    def go_back(self, steps: int, averages: int) -> Since:
        """A part of this replica may be behind this one by a step, an average, or both."""
        since = self.since
        if self._away or averages < since.averages:
            self.release()
            since = since if averages == since.averages else self._averaged
        if steps < self.steps and self._undo is not None:
            self._undo.take_back(steps)
            since = self._before
        return since

    def meet(self) -> None:
        """Average, if it is time to. Collective over the replicas."""
        if self._every and self.since.steps == self._every:
            self._average()

    def gather(self) -> None:
        """Until `release` the parameters, and what the optimizer keeps, are the mean over all replicas. Collective."""
        self._telling.finish()
        self._flats.pull()
        self._keep_own()
        self._to_mean(self._flats.kept)

    def release(self) -> None:
        """Back to this replica's own."""
        for wire, own in zip(self._flats.kept, self._own, strict=True):
            wire.wait()
            np.copyto(wire.buf, own)
            wire.push()
        self._away = False

    def _keep_own(self) -> None:
        """A copy of what this replica has, on the host."""
        self._own = self._own or [np.empty_like(wire.buf) for wire in self._flats.kept]
        for wire, own in zip(self._flats.kept, self._own, strict=True):
            np.copyto(own, wire.buf)
        self._away = True

    def _update(self, scale: float) -> None:
        if self._undo is not None:
            self._undo.begin(self.steps)
        self._optimizer.apply(0, self._node.grads.size, self.rate, scale)

    def _hear(self, asked: bool) -> None:
        """What was told the last time; then tell anew."""
        bad, stop = self._heard()
        if bad:
            raise NotFiniteError(f"the loss of {bad:.0f} replicas wasn't finite in the last {2 * _TELL_STEPS} steps")
        self.stop = bool(stop)
        self._tell(self._bad and self._first, asked)

    def _tell(self, bad: float, asked: float) -> None:
        self._told[:] = bad, asked, self._untold
        self._untold = 0
        self._telling.start(0, self._told.size)

    def _heard(self) -> tuple[float, float]:
        """Losses that aren't finite, and requests to stop, that were told the last time."""
        self._telling.finish()
        bad, asked, skipped = self._told.tolist()
        self._told[2] = 0.0  # counted once
        self.bad_samples += int(skipped)
        return bad, asked

    def _clip_scale(self) -> float:
        if not self._clips:
            return 1.0
        self._norm[0] = self._optimizer.sum_of_squares(0, self._node.grads.size)
        self._norms.start(0, 1)
        self._norms.finish()
        return self._optimizer.clip_scale(float(self._norm[0]))

    def _average(self) -> None:
        if survives():
            self._keep_own()  # a rank may die in the middle of it
        params, state = self._flats.params, list(self._flats.state.values())
        averaged = [params, *(state if self._state == "average" else ())]
        for wire in averaged:
            wire.pull()
        self._to_mean(averaged)
        for wire in state if self._state == "reset" else ():
            wire.wait()
            wire.buf.fill(0.0)
            wire.push()
        self._away, self._averaged = False, self.since
        self.since = Since(averages=self.since.averages + 1)
        if self._undo is not None:  # a part goes on only when no other can be left without the average
            self._norms.start(0, 1)
            self._norms.finish()

    def _to_mean(self, wires: list[Wire]) -> None:
        """What is on the host of this replica's arrays becomes the mean of all, there and where it is computed with.

        Replicas are weighted by the samples that each took since the last average; the gradients' memory is where they
        meet.
        """
        node = self._node
        self._samples[0] = self.since.samples
        self._weighing.start(0, 1)
        self._weighing.finish()
        total = float(self._samples[0])
        if not total:
            return  # nothing has changed since
        for wire in wires:
            wire.wait()
            np.multiply(wire.buf, wire.buf.dtype.type(self.since.samples / total), out=node.grads)
            self._sum.start(0, wire.buf.size)
            self._sum.finish()
            self._sum.settle()  # all shares are summed
            np.copyto(wire.buf, node.sums)
            wire.push()
            self._sum.settle()  # all have read them
