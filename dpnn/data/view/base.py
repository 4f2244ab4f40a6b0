"""What a view is, and what all views share."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpnn import native
from dpnn.errors import DataError

Array = NDArray[Any]

TYPES = {"uint8": 0, "float16": 1, "float32": 2}
"""What kernels/pixels.c calls them."""
_MARGIN, _FEW = 16, 256
"""The longest vector; how many channels are few, so that vectors begin at few of them."""


class Records(Protocol):
    """Encoded samples, by their slots."""

    def __getitem__(self, slot: int, /) -> memoryview: ...


class BadSample(Exception):
    """A sample can't be used. `index`: its place in the slots that were asked for; those before it are done."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason


class View(Protocol):
    """How stored samples become what the network sees. Made once; several threads may use it at a time."""

    shape: tuple[int, ...]
    """Of one sample as it lies in memory: (H, W, C) for images, (T, 1, C) for frames, any other shape as stored."""

    def draw(self, ids: Array, epoch: int) -> Array:
        """What is done to each sample, (N, any number), by its id alone. For many at once: a draw costs by the call."""
        ...

    def put(self, source: Array | Records, slots: Array, choices: Array, out: Array) -> None:
        """Sample slots[i] of `source`, changed by choices[i] and normalised, into out[i].

        `source`: raw samples (any number, *stored shape), or records. `choices`: rows of `draw`. `out`: (n, *shape),
        float32 or float64 as the view was made for, without gaps. BadSample where one can't be made.
        """
        ...


class Normalisation:
    """(x - mean) / std, channel by channel; a constant channel is only centred.

    In float32 by our kernels, where they were built, and else by NumPy: the same numbers.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], shape: tuple[int, ...], dtype: Any) -> None:
        """DataError where there isn't one number for each channel, the last dimension of `shape`."""
        means, stds = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        for array in (means, stds):
            if array.shape != shape[-1:]:
                raise DataError(
                    f"mean and std are of {array.size} channels, and the samples have the shape {shape}; "
                    "pack both parts of the data in one way"
                )
        self.mean = means.astype(dtype)
        self.scale = (1 / np.where(stds > 0, stds, 1.0)).astype(dtype)
        channels = shape[-1]
        self.period = math.lcm(channels, _MARGIN) if channels <= _FEW else channels
        tables = [np.resize(table, self.period + _MARGIN) for table in (self.mean, self.scale)]
        self._tables, self.addresses = tables, tuple(map(native.address, tables))
        """Of mean and scale, as kernels/pixels.c wants them."""

    def kernel(self, name: str) -> Callable[..., None] | None:
        """One of kernels/pixels.c; None where NumPy computes."""
        return _kernel(name) if self.mean.dtype == np.float32 else None

    def checked(self, source: Array, slots: Array, out: Array) -> Array:
        """The slots as kernels take them. IndexError or ValueError where they would read or write elsewhere."""
        slots = np.ascontiguousarray(slots, np.int64)
        if len(slots) and not 0 <= slots.min() <= slots.max() < len(source):
            raise IndexError(f"slots {slots.min()} to {slots.max()} of {len(source)}")
        if not (source.flags.c_contiguous and out.flags.c_contiguous and out.dtype == self.mean.dtype):
            raise ValueError(f"samples and batches lie in memory without gaps, batches as {self.mean.dtype}")
        return slots

    def __call__(self, x: Array, out: Array) -> None:
        """Of samples as stored, (n, ...), by NumPy."""
        np.subtract(x, self.mean, out=out)
        np.multiply(out, self.scale, out=out)

    def gather(self, source: Array, slots: Array, out: Array) -> None:
        """Of source[slots]."""
        self.take(source, self.checked(source, slots, out), out)

    def take(self, source: Array, slots: Array, out: Array) -> None:
        """Of source[slots], which were checked."""
        kernel = self.kernel("normalise")
        if kernel is None:
            self(source[slots], out)
            return
        kernel(
            len(slots), math.prod(source.shape[1:]), TYPES[source.dtype.name], native.address(source),
            native.address(slots), self.period, *self.addresses, native.address(out),
        )  # fmt: skip


@cache
def _kernel(name: str) -> Callable[..., None] | None:
    try:
        return native.alone(name)
    except native.Unavailable:
        return None
