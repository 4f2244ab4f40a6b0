"""Random changes of the samples, drawn for each by (seed, epoch, sample id): the same on any number of ranks."""

from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dpnn import philox
from dpnn.errors import JobError

Array = NDArray[Any]


class Augmentation(Protocol):
    """Made once for samples of one shape (H, W, C), for at most `rows` at a time."""

    def __init__(self, seed: int, shape: tuple[int, ...], dtype: np.dtype[Any], rows: int) -> None: ...

    def draw(self, ids: Array, epoch: int) -> Array:
        """What is done to each sample, (N, any number). Drawn for many at once, since a draw costs by the call."""
        ...

    def apply(self, samples: Array, choices: Array) -> Array:
        """The changed samples (N, H, W, C), from `samples` as stored; their memory may be in any order."""
        ...


class Unchanged:
    """The samples as stored."""

    def __init__(self, seed: int, shape: tuple[int, ...], dtype: np.dtype[Any], rows: int) -> None:
        pass

    def draw(self, ids: Array, epoch: int) -> Array:
        """Nothing."""
        return np.empty((len(ids), 0), np.int8)

    def apply(self, samples: Array, choices: Array) -> Array:
        """The samples themselves."""
        return samples


class CropFlip:
    """Four zero pixels on each side, a random crop of the old size, and every other image mirrored.

    He et al., "Deep residual learning for image recognition", 2015, section 4.2 (CIFAR-10).
    """

    PADDING = 4
    CHOICES = np.array([2 * PADDING + 1, 2 * PADDING + 1, 2], np.uint64)

    def __init__(self, seed: int, shape: tuple[int, ...], dtype: np.dtype[Any], rows: int) -> None:
        if len(shape) != 3:
            raise JobError(
                f'data.augment = "crop-flip" needs images (H, W, C), and the samples have the shape {shape}; use "none"'
            )
        height, width, channels = shape
        self._seed = seed
        self._padded = np.zeros((rows, height + 2 * self.PADDING, width + 2 * self.PADDING, channels), dtype)
        self._interior = self._padded[:, self.PADDING : -self.PADDING, self.PADDING : -self.PADDING]
        self._crops = sliding_window_view(self._padded, (height, width), axis=(1, 2))
        """(rows, 9, 9, C, H, W): a view that has every crop."""

    def draw(self, ids: Array, epoch: int) -> Array:
        """First row (0 to 8), first column, and whether to mirror: int8 (N, 3)."""
        words = philox.by_sample(self._seed, epoch, "augment", ids, 3).astype(np.uint64)
        return (words * self.CHOICES >> 32).astype(np.int8)

    def apply(self, samples: Array, choices: Array) -> Array:
        """The changed images; in memory they are channels first."""
        n = len(samples)
        self._interior[:n] = samples
        row, column, mirrored = choices.T
        crops: Array = self._crops[np.arange(n), row, column]
        (mirrored,) = np.nonzero(mirrored)
        crops[mirrored] = crops[mirrored, ..., ::-1]
        return crops.transpose(0, 2, 3, 1)


AUGMENTATIONS: dict[str, type[Augmentation]] = {"none": Unchanged, "crop-flip": CropFlip}
