"""What a sample is: one class (all labels are an int32 array), or any number of classes (all labels are `Lists`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.problems import Problem, listed, refuse

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


def check_labels(labels: Labels, num_classes: int, file: str) -> None:
    """DataError naming the first sample whose label isn't one of 0..num_classes-1, or whose list is out of order."""
    refuse(label_problems(labels, num_classes, file))


def label_problems(labels: Labels, num_classes: int, file: str) -> Iterator[Problem]:
    """Lists out of order; where there are none, labels that are not one of 0..num_classes-1."""
    if isinstance(labels, Lists):
        classes, dataset = labels.indices, "y_indices"
        broken = list(offset_problems(labels.indptr, len(labels.indices), file, "y_indptr", may_be_empty=True))
        if broken:
            yield from broken
            return
    else:
        classes, dataset = labels, "y"

    def tell(place: int) -> Problem:
        sample = place
        if isinstance(labels, Lists):
            sample = int(np.searchsorted(labels.indptr, place, side="right")) - 1
        text = (
            f"{file}, {dataset}[{place}] = {classes[place]}: the label of sample {sample} is not in "
            f"0..{num_classes - 1}; correct the labels and pack the data again"
        )
        return Problem(text=text, file=file, dataset=dataset, index=place)

    yield from listed(np.flatnonzero((classes < 0) | (classes >= num_classes)), tell)


def offset_problems(offsets: Array, end: int, file: str, dataset: str, may_be_empty: bool) -> Iterator[Problem]:
    """Where `offsets` don't rise from 0 to `end`."""
    steps = offsets[1:] < offsets[:-1] if may_be_empty else offsets[1:] <= offsets[:-1]

    def tell(i: int) -> Problem:
        what = "is empty" if offsets[i] == offsets[i + 1] else "has a negative length"
        text = f"{file}, {dataset}[{i}:{i + 2}] = {offsets[i : i + 2].tolist()}: the record {what}; pack the data again"
        return Problem(text=text, file=file, dataset=dataset, index=i)

    yield from listed(np.flatnonzero(steps), tell)
    if offsets[0] != 0 or offsets[-1] != end:
        text = f"{file}, {dataset} runs from {offsets[0]} to {offsets[-1]} instead of 0 to {end}; pack the data again"
        yield Problem(text=text, file=file, dataset=dataset)


def histogram(labels: Labels, num_classes: int) -> list[int]:
    """How many samples are of each class."""
    classes = labels.indices if isinstance(labels, Lists) else labels
    return [int(count) for count in np.bincount(classes, minlength=num_classes)]
