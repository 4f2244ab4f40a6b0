"""Samples of one size at equal distances in files, read where they lie: .npy files, CIFAR's."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.pack.extents import OpenFiles

Array = NDArray[Any]

_MOST_NBYTES = 16 << 20
"""Of one read."""


class Rows(OpenFiles):
    """File after file: row i of paths[k], of counts[k] rows, is at the byte first + i * stride."""

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], first: int, stride: int, shape: tuple[int, ...], dtype: Any
    ) -> None:
        super().__init__(paths)
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._cuts = np.cumsum([0, *counts])
        self._first, self._stride = first, stride
        self._nbytes = math.prod(shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return int(self._cuts[-1])

    def read(self, numbers: Array) -> Array:
        """Some rows, in any order; those that follow one another in a file by one read."""
        out = np.empty((len(numbers), *self.shape), self.dtype)
        files = np.searchsorted(self._cuts, numbers, side="right") - 1
        for lo, hi in runs(numbers, files, max(_MOST_NBYTES // self._stride, 1)):
            file, n = int(files[lo]), hi - lo
            at = self._first + int(numbers[lo] - self._cuts[file]) * self._stride
            data = self.read_bytes(file, at, (n - 1) * self._stride + self._nbytes)
            out[lo:hi] = np.ndarray((n, *self.shape), self.dtype, data, strides=(self._stride, *out.strides[1:]))
        return out

    def name(self, number: int) -> str:
        """The file and the row in it."""
        file = int(np.searchsorted(self._cuts, number, side="right")) - 1
        return f"{self.paths[file]}[{number - self._cuts[file]}]"


def runs(numbers: Array, files: Array, most: int) -> Iterator[tuple[int, int]]:
    """The slices of `numbers` that are of one file, follow one another, and are not more than `most`."""
    far = (np.diff(numbers, prepend=-2) != 1) | (np.diff(files, prepend=-1) != 0)
    cuts = np.flatnonzero(far | (np.arange(len(numbers)) % most == 0)).tolist()
    return itertools.pairwise([*cuts, len(numbers)])
