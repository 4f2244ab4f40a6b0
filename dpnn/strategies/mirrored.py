"""A strategy that works on the host's arrays, for a network that is computed elsewhere."""

from dpnn.memory import Wire
from dpnn.plan import Strategy


class Mirrored:
    """`strategy`, with its parameters brought to the backend before each step, and gradients from there after it."""

    def __init__(self, strategy: Strategy, params: Wire, grads: Wire) -> None:
        self._strategy, self._params, self._grads = strategy, params, grads

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
        self._grads.pull(lo, hi)

    def poke(self) -> None:
        """The strategy's."""
        self._strategy.poke()

    def tell(self, loss: float) -> None:
        """The strategy's."""
        self._strategy.tell(loss)

    def finish(self) -> None:
        """The strategy's, once all gradients are there, and the parameters may be written."""
        self._grads.wait()
        self._params.wait()
        self._strategy.finish()
