"""Views of raw samples, as large as they are stored."""

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dpnn import philox
from dpnn.data.decode import Room
from dpnn.data.view.base import TYPES, Normalisation
from dpnn.native import address

Array = NDArray[Any]


class Stored:
    """The samples themselves."""

    def __init__(self, shape: tuple[int, ...], normalise: Normalisation) -> None:
        self.shape, self._normalise = shape, normalise

    def draw(self, ids: Array, epoch: int) -> Array:
        """Nothing."""
        return np.empty((len(ids), 0), np.int8)

    def put(self, source: Any, slots: Array, choices: Array, out: Array) -> None:
        """Gather and normalise."""
        self._normalise.gather(source, slots, out)


class CropFlip:
    """Four zero pixels on each side, a random crop of the old size, and every other image mirrored.

    He et al., "Deep residual learning for image recognition", 2015, section 4.2 (CIFAR-10).
    """

    PADDING = 4
    CHOICES = np.array([2 * PADDING + 1, 2 * PADDING + 1, 2], np.uint64)

    def __init__(self, shape: tuple[int, ...], normalise: Normalisation, seed: int) -> None:
        self.shape, self._normalise, self._seed = shape, normalise, seed
        self._room = Room()

    def draw(self, ids: Array, epoch: int) -> Array:
        """First row (0 to 8), first column, and whether to mirror: int8 (N, 3)."""
        words = philox.by_sample(self._seed, epoch, "augment", ids, 3).astype(np.uint64)
        return (words * self.CHOICES >> 32).astype(np.int8)

    def put(self, source: Any, slots: Array, choices: Array, out: Array) -> None:
        """Gather, cut, mirror and normalise."""
        slots, choices = self._normalise.checked(source, slots, out), np.ascontiguousarray(choices)
        kernel = self._normalise.kernel("crop")
        if kernel is None:
            self._put_by_numpy(source, slots, choices, out)
            return
        room = self._room.take(math.prod(self.shape) * source.itemsize)
        kernel(
            len(slots), *self.shape, self.PADDING, TYPES[source.dtype.name], address(source), address(slots),
            address(choices), self._normalise.period, *self._normalise.addresses, address(room), address(out),
        )  # fmt: skip

    def _put_by_numpy(self, source: Any, slots: Array, choices: Array, out: Array) -> None:
        height, width, _ = self.shape
        p = self.PADDING
        padded = np.pad(source[slots], ((0, 0), (p, p), (p, p), (0, 0)))
        row, column, mirrored = choices.T
        crops = sliding_window_view(padded, (height, width), axis=(1, 2))[np.arange(len(slots)), row, column]
        (mirrored,) = np.nonzero(mirrored)
        crops[mirrored] = crops[mirrored, ..., ::-1]
        self._normalise(crops.transpose(0, 2, 3, 1), out)
