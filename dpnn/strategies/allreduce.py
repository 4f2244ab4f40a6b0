"""Synchronous training: one gradient, summed over all replicas while backward goes on.

Every loss is divided by the number of samples of the whole step, so the plain sum over the replicas is the mean over
all samples, also when they hold different numbers of them. The loss and the requests to stop travel with it as a few
numbers of their own, from the last forward to `finish`.
"""

import math
from time import perf_counter

import numpy as np

from dpnn.comm.mesh import Mesh
from dpnn.comm.reduce import BucketReducer
from dpnn.errors import NotFiniteError
from dpnn.optim import Optimizer
from dpnn.plan import Store


class Allreduce:
    """One update a step, the same on every replica. `clip`: the largest norm of the gradient; 0: any."""

    def __init__(self, mesh: Mesh, store: Store, optimizer: Optimizer, clip: float, limit_s: float) -> None:
        self.rate, self.stop, self.loss = 0.0, False, 0.0
        self.wait_s = self.update_s = 0.0
        self._clip = clip
        self._n, self._n_trained = store.params.size, store.n_trained
        self._optimizer = optimizer
        self._told = np.zeros(2)  # loss, requests to stop
        self._norm = np.zeros(1)  # sum of squares of the gradient, over the parts of a replica
        self._gradients = BucketReducer(mesh.data, store.grads, limit_s)
        self._telling = BucketReducer(mesh.data, self._told, limit_s, "losses")
        self._norms = BucketReducer(mesh.model, self._norm, limit_s, "norms")

    def begin(self) -> None:
        """Nothing is under way: `finish` has waited for all."""

    def open(self, lo: int, hi: int) -> None:
        """Nobody else reads the gradients: `finish` has waited for all."""

    def ready(self, lo: int, hi: int) -> None:
        """Start to sum this bucket."""
        self._gradients.start(lo, hi)

    def poke(self) -> None:
        """Let MPI move."""
        self._gradients.poke()

    def tell(self, loss: float) -> None:
        """Start to sum the loss and the requests to stop."""
        self._told[0], self._told[1] = loss, self.stop
        self._telling.start(0, 2)

    def finish(self) -> None:
        """Wait for every sum, then update. NotFiniteError, on all ranks, where the loss isn't finite."""
        start = perf_counter()
        self._telling.finish()
        self._gradients.finish()
        self.loss, self.stop = float(self._told[0]), self._told[1] > 0
        if not math.isfinite(self.loss):
            raise NotFiniteError(f"the loss is {self.loss}")
        scale = 1.0
        if self._clip:
            self._norm[0] = self._optimizer.sum_of_squares(0, self._n_trained)
            self._norms.start(0, 1)
            self._norms.finish()
            scale = self._optimizer.clip_scale(float(self._norm[0]))
        reduced = perf_counter()
        self._optimizer.apply(0, self._n, self.rate, scale)
        self.wait_s, self.update_s = reduced - start, perf_counter() - reduced
