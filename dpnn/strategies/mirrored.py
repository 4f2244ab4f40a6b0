"""A strategy that works on the host's arrays, for a network that is computed elsewhere."""

from collections import deque

from dpnn.comm.faults import wait
from dpnn.memory import Test, Wire
from dpnn.plan import Strategy


class Mirrored:
    """`strategy`, with its parameters brought to the backend before each step, and gradients from there after it."""

    def __init__(self, strategy: Strategy, params: Wire, grads: Wire, limit_s: float) -> None:
        self._strategy, self._params, self._grads, self._limit_s = strategy, params, grads, limit_s
        self._coming: deque[Test] = deque()
        """Whether gradients are on the host, bucket by bucket."""

    def begin(self) -> None:
        """The strategy's, which may write the parameters, and then these to the backend."""
        self._params.wait()  # an evaluation may have brought them there since
        self._strategy.begin()
        self._params.push()

    def open(self, lo: int, hi: int) -> None:
        """The strategy's."""
        self._strategy.open(lo, hi)

    def ready(self, lo: int, hi: int) -> None:
        """Start to bring them to the host."""
        self._coming.append(self._grads.pull(lo, hi))

    def poke(self) -> None:
        """The strategy's."""
        self._strategy.poke()

    def tell(self, loss: float) -> None:
        """The strategy's."""
        self._strategy.tell(loss)

    def finish(self) -> None:
        """The strategy's, once all gradients are there, and the parameters may be written."""
        wait(self._there, "this rank's device to compute its gradients", self._limit_s)
        self._params.wait()
        self._strategy.finish()

    def _there(self) -> bool:
        """Whether all gradients are on the host; what the strategy has under way goes on meanwhile."""
        self._strategy.poke()
        while self._coming and self._coming[0]():
            self._coming.popleft()
        return not self._coming
