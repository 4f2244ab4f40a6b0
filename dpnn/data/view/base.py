"""What a view is, and what all views share."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpnn.errors import DataError

Array = NDArray[Any]


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
    """(x - mean) / std, channel by channel; a constant channel is only centred."""

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

    def __call__(self, x: Array, out: Array) -> None:
        """Of samples as stored, (n, ...)."""
        np.subtract(x, self.mean, out=out)
        np.multiply(out, self.scale, out=out)
