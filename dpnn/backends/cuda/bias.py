"""The first pass of backward over dy: the ReLU behind a layer, and the gradient of its bias: kernels/conv_bias.cu."""

from dpnn.backends.base import Array
from dpnn.backends.cuda.device import Device, blocks

_BLOCKS = 8
"""Blocks that a multiprocessor holds."""


class BiasGradient:
    """dy = 0 where y <= 0, and d_bias = the sum of dy over rows (m, k); either may be left out."""

    def __init__(self, device: Device, k: int) -> None:
        self.k, self.processors = k, device.processors
        self._mask = device.kernel("conv_bias.cu", "mask_gradient_1" if k % 4 else "mask_gradient_4")
        self._sum = device.kernel("conv_bias.cu", "bias_gradient")

    @staticmethod
    def scratch(k: int, processors: int) -> int:
        """Numbers of `partial`."""
        return _chunks(k, processors) * k

    def __call__(self, m: int, y: Array | None, dy: Array, partial: Array, d_bias: Array | None, add: int) -> None:
        """`y`: where there was a ReLU; `d_bias`: where there is a bias."""
        rows = -(-m // _chunks(self.k, self.processors))
        chunks = -(-m // rows)
        sums = None if d_bias is None else partial
        self._mask((chunks, _across(self.k)), (256,), y, dy, sums, m, self.k, rows)
        if d_bias is not None:
            self._sum(blocks(self.k, 8), (256,), partial, chunks, self.k, d_bias, add)


def _across(k: int) -> int:
    """Blocks beside each other."""
    return -(-k // (32 if k % 4 else 64))


def _chunks(k: int, processors: int) -> int:
    """The most chunks of rows."""
    return max(1, _BLOCKS * processors // _across(k))
