"""Arrays made into samples and labels as a shard holds them, a few at a time, wherever they lie."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dpnn.data.labels import Labels, Lists
from dpnn.data.manifest import DTYPES
from dpnn.data.pack.source import InMemory, Samples, Source, Split, as_classes
from dpnn.errors import DataError

Array = NDArray[Any]

Layout = Literal["NHWC", "NCHW"]
"""Of images: channels last, or first."""

_SLAB_NBYTES = 16 << 20


@dataclass(frozen=True)
class Stored:
    """An array (n, *rows.shape) of any type, somewhere, and what a person calls it."""

    rows: Samples
    n: int
    where: str

    @classmethod
    def of(cls, array: Array, where: str) -> "Stored":
        """An array in memory."""
        return cls(InMemory(array, where), len(array), where)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""
        return (self.n, *self.rows.shape)

    def slabs(self) -> Iterator[Array]:
        """All of it in order, some MiB at a time; none where there is nothing."""
        nbytes = math.prod(self.rows.shape) * self.rows.dtype.itemsize
        step = max(_SLAB_NBYTES // max(nbytes, 1), 1)
        for lo in range(0, self.n, step):
            yield self.rows.read(np.arange(lo, min(lo + step, self.n)))


def as_source(parts: Mapping[str, tuple[Stored, Stored]], layout: Layout = "NHWC", places: bool = False) -> Source:
    """From the samples and the labels of each part. `places`: the labels are places on the samples' own plane.

    DataError naming the array of what is wrong.
    """
    for x, y in parts.values():
        if x.n != y.n:
            raise DataError(f"{x.where} and {y.where}: {x.n} samples and {y.n} labels; each sample needs one label")
    samples = [_as_samples(x, layout) for x, _ in parts.values()]
    stored = [y for _, y in parts.values()]
    labels, num_classes = _places(stored, samples) if places else _labels(stored)
    first = np.cumsum([0, *(y.n for y in stored)])
    ids = np.arange(first[-1], dtype=np.uint64)
    splits = [Split(name, samples[i], labels[i], ids[first[i] : first[i + 1]]) for i, name in enumerate(parts)]
    return Source(splits, num_classes)


class _Converted:
    """Samples in another type and layout. A number that isn't finite is a DataError that names its sample."""

    def __init__(self, stored: Samples, dtype: np.dtype[Any], channels_first: bool) -> None:
        self._stored, self._channels_first = stored, channels_first
        shape = stored.shape
        if channels_first:
            shape = (*shape[1:], shape[0])
        self.shape = (*shape, 1) if len(shape) == 2 else shape
        self.dtype = dtype

    def read(self, numbers: Array) -> Array:
        """Some samples, in any order."""
        array = self._stored.read(numbers)
        if self._channels_first:
            array = np.moveaxis(array, 1, -1)
        with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is told below
            array = array.astype(self.dtype, order="C", copy=False).reshape(-1, *self.shape)
        if self.dtype.kind == "f":
            finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
            if not finite.all():
                name = self.name(int(numbers[np.argmin(finite)]))
                raise DataError(f"{name} holds a number that isn't finite; leave that sample out")
        return array

    def name(self, number: int) -> str:
        """What it is called where it is stored."""
        return self._stored.name(number)


def _as_samples(stored: Stored, layout: Layout) -> Samples:
    """Samples as a shard holds them: uint8, float16 or float32; grey images (H, W) become (H, W, 1).

    DataError for what can't be samples; for a number that isn't finite when its sample is read.
    """
    shape = stored.shape
    if len(shape) < 2 or 0 in shape:
        raise DataError(f"{stored.where} has the shape {shape}; it must hold one or more samples, (samples, ...)")
    if layout == "NCHW" and len(shape) != 4:
        raise DataError(f"{stored.where} has the shape {shape}, but the layout NCHW is one of (samples, C, H, W)")
    return _Converted(stored.rows, _shard_dtype(stored), layout == "NCHW")


def _shard_dtype(stored: Stored) -> np.dtype[Any]:
    """Integers become uint8 where they fit, otherwise float32 where it holds them exactly: so they are read through."""
    dtype = stored.rows.dtype
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind in "iu" and dtype != np.uint8:
        ends = [(int(slab.min()), int(slab.max())) for slab in stored.slabs()]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        if max(-low, high) > 1 << 24:
            raise DataError(
                f"{stored.where} holds integers from {low} to {high}, which float32 can't hold; scale them first"
            )
        return np.dtype(np.uint8 if low >= 0 and high <= 255 else np.float32)
    if dtype.kind == "f" and dtype.name not in DTYPES:
        return np.dtype(np.float32)
    if dtype.name not in DTYPES:
        raise DataError(f"{stored.where} is of type {dtype}; it must hold integers or floating-point numbers")
    return dtype.newbyteorder("=")


def _labels(parts: Sequence[Stored]) -> tuple[list[Labels], int]:
    """The labels of each part, and the number of classes.

    An array is of class numbers (n,) or (n, 1), or of 0 and 1 (n, classes). Where each sample of all parts is of one
    class, these are class numbers too ("one-hot"), otherwise lists of classes. DataError naming the first wrong one.
    """
    labels = [_dense(part) if _is_dense(part) else _numbers(part) for part in parts]
    num_classes = 0
    for part, each in zip(parts, labels, strict=True):
        classes = each.indices if isinstance(each, Lists) else each
        num_classes = max(num_classes, part.shape[1] if _is_dense(part) else 0, int(classes.max(initial=-1)) + 1)
    lists = [each for each in labels if isinstance(each, Lists)]
    if len(lists) == len(labels) and all((np.diff(each.indptr) == 1).all() for each in lists):
        labels = [each.indices for each in lists]
    return labels, num_classes


def _is_dense(labels: Stored) -> bool:
    return len(labels.shape) == 2 and labels.shape[1] > 1


def _numbers(part: Stored) -> Array:
    return as_classes(np.concatenate(list(part.slabs())), part.where)


def _dense(part: Stored) -> Lists:
    lists, first = [], 0
    for slab in part.slabs():
        wrong = np.argwhere((slab != 0) & (slab != 1))
        if len(wrong):
            sample, column = wrong[0]
            name = part.rows.name(first + int(sample))
            raise DataError(f"{name}[{column}] = {slab[sample, column]}: labels (samples, classes) are 0 or 1")
        lists.append(Lists.from_dense(slab))
        first += len(slab)
    return Lists.join(lists)


def _places(parts: Sequence[Stored], samples: Sequence[Samples]) -> tuple[list[Labels], int]:
    """A class for each place (row, column) of the samples' plane (H, W, C): row * W + column."""
    labels: list[Labels] = []
    height, width = 0, 0
    for part, of in zip(parts, samples, strict=True):
        if len(of.shape) != 3 or part.rows.shape != (2,) or part.rows.dtype.kind not in "iu":
            raise DataError(
                f"{part.where} is of type {part.rows.dtype} and shape {part.shape}; places are integers (samples, 2), "
                f"of samples (H, W, C), and these are {of.shape}"
            )
        height, width = of.shape[:2]
        places = np.concatenate(list(part.slabs()))
        wrong = np.flatnonzero(((places < 0) | (places >= (height, width))).any(axis=1))
        if len(wrong):
            first = int(wrong[0])
            raise DataError(f"{part.rows.name(first)}: {places[first].tolist()} is no place on {height} x {width}")
        labels.append(places.astype(np.int32) @ np.array([width, 1], np.int32))
    return labels, height * width
