"""What a sample is: one class (all labels are an int32 array), or any number of classes (all labels are `Lists`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.errors import DataError

Array = NDArray[Any]


@dataclass(frozen=True)
class Lists:
    """A list of classes for each of n samples, end to end: sample i has indices[indptr[i]:indptr[i + 1]].

    `indptr` int64[n + 1], `indices` int32: the CSR form, as it stands in a shard.
    """

    indptr: Array
    indices: Array

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, samples: slice | Array) -> "Lists":
        """The lists of some samples, as an array would give them."""
        if isinstance(samples, slice):
            samples = np.arange(len(self))[samples]
        places, counts = self._places(samples)
        return Lists(np.concatenate(([0], np.cumsum(counts))), self.indices[places])

    def part(self, lo: int, hi: int) -> "Lists":
        """The lists of the samples [lo, hi), without copying the classes."""
        indptr = self.indptr[lo : hi + 1]
        return Lists(indptr - indptr[0], self.indices[indptr[0] : indptr[-1]])

    def put_dense(self, samples: Array, out: Array) -> None:
        """Write rows of 0 and 1: out (len(samples), K) uint8, 1 where a sample is of a class."""
        out[...] = 0
        places, counts = self._places(samples)
        out[np.repeat(np.arange(len(samples)), counts), self.indices[places]] = 1

    def _places(self, samples: Array) -> tuple[Array, Array]:
        """Where the classes of `samples` stand in `indices`, and how many each has."""
        first = self.indptr[samples]
        counts = self.indptr[samples + 1] - first
        ends = np.cumsum(counts)
        return np.repeat(first - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0), counts

    @classmethod
    def from_dense(cls, rows: Array) -> "Lists":
        """From (n, K) of 0 and 1."""
        indptr = np.concatenate(([0], np.cumsum(np.count_nonzero(rows, axis=1)))).astype(np.int64)
        return cls(indptr, np.nonzero(rows)[1].astype(np.int32))

    @classmethod
    def join(cls, parts: Sequence["Lists"]) -> "Lists":
        """The lists of all parts, one part after the other."""
        counts = [np.diff(part.indptr) for part in parts]
        indptr = np.concatenate(([0], np.cumsum(np.concatenate(counts))))
        return cls(indptr, np.concatenate([part.indices for part in parts]))


Labels = Array | Lists


def check_labels(labels: Labels, num_classes: int, where: str) -> None:
    """DataError naming the first sample whose label isn't one of 0..num_classes-1, or whose list is out of order."""
    if isinstance(labels, Lists):
        classes, dataset = labels.indices, "y_indices"
        check_offsets(labels.indptr, len(labels.indices), f"{where}, y_indptr", may_be_empty=True)
    else:
        classes, dataset = labels, "y"
    wrong = np.flatnonzero((classes < 0) | (classes >= num_classes))
    if len(wrong):
        place = int(wrong[0])
        sample = place
        if isinstance(labels, Lists):
            sample = int(np.searchsorted(labels.indptr, place, side="right")) - 1
        raise DataError(
            f"{where}, {dataset}[{place}] = {classes[place]}: the label of sample {sample} is not in "
            f"0..{num_classes - 1}; correct the labels and pack the data again"
        )


def check_offsets(offsets: Array, end: int, where: str, may_be_empty: bool) -> None:
    """DataError naming the first of `offsets` that doesn't rise from 0 to `end`."""
    steps = np.diff(offsets)
    wrong = np.flatnonzero(steps < 0 if may_be_empty else steps <= 0)
    if len(wrong):
        i = int(wrong[0])
        what = "is empty" if steps[i] == 0 else "has a negative length"
        raise DataError(f"{where}[{i}:{i + 2}] = {offsets[i : i + 2].tolist()}: the record {what}; pack the data again")
    if offsets[0] != 0 or offsets[-1] != end:
        raise DataError(f"{where} runs from {offsets[0]} to {offsets[-1]} instead of 0 to {end}; pack the data again")


def histogram(labels: Labels, num_classes: int) -> list[int]:
    """How many samples are of each class."""
    classes = labels.indices if isinstance(labels, Lists) else labels
    return [int(count) for count in np.bincount(classes, minlength=num_classes)]
