"""What a source of data gives to the packer; a format is a function that returns a `Source`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dpnn.data.labels import Labels
from dpnn.errors import DataError

Array = NDArray[Any]

MOST_CLASSES = 1 << 24


class Samples(Protocol):
    """Samples of one shape and type, somewhere."""

    shape: tuple[int, ...]
    """Of one sample: (H, W, C) for images."""
    dtype: np.dtype[Any]

    def read(self, numbers: Array) -> Array:
        """Some samples, (len(numbers), *shape), in any order; one thread reads at a time.

        DataError saying what is wrong where they can't be had; packing then reads each alone, and rejects what is bad.
        """
        ...

    def name(self, number: int) -> str:
        """What a person calls a sample: its file, or its place in one."""
        ...


@runtime_checkable
class Records(Protocol):
    """Samples encoded as bytes, each of its own length, somewhere."""

    codec: Literal["image", "frames"]
    """"image": a JPEG, PNG or other picture; "frames": (T, *shape) uint8, T at least 1."""
    shape: tuple[int, ...]
    """Of one frame; empty for images."""
    nbytes: float
    """Of a sample, on average and about: what shards are cut by."""

    def read(self, number: int) -> bytes:
        """One record; several threads read at a time.

        DataError saying what is wrong where it can't be had; packing rejects it then.
        """
        ...

    def name(self, number: int) -> str:
        """What a person calls a sample: its file, or its place in one."""
        ...


@dataclass(frozen=True)
class Split:
    """A part of a source that becomes a folder of shards. `ids` uint64 are unique over all parts."""

    name: str
    samples: Samples | Records
    labels: Labels
    ids: Array
    groups: Array | None = None
    """A number from 0 on for each sample, int32 (n,), none left out: samples of the same one stay together when a part
    is held out, as the positions of a game do."""


@dataclass(frozen=True)
class Source:
    """All that is packed at a time. `held_out`: the share of a lone part that is held out by default.

    It is made on one rank and sent to the others, so it can be pickled: what it reads from is opened when it is read.
    """

    splits: Sequence[Split]
    num_classes: int
    held_out: float = 0.0
    class_names: tuple[str, ...] = ()
    """One for each class, where they have names."""
    left_out: Sequence[tuple[str, str]] = ()
    """What can't be packed, as listing the source showed: its name and the reason."""


class InMemory:
    """Samples in an array (n, *shape)."""

    def __init__(self, array: Array, where: str) -> None:
        self._array, self._where = array, where
        self.shape = array.shape[1:]
        self.dtype = array.dtype

    def read(self, numbers: Array) -> Array:
        """Some of the samples."""
        return self._array[numbers]

    def name(self, number: int) -> str:
        """The array and the place in it."""
        return f"{self._where}[{number}]"


class Chosen:
    """Some of other samples, by their numbers."""

    def __init__(self, samples: Samples, numbers: Array) -> None:
        self._samples, self._numbers = samples, numbers
        self.shape, self.dtype = samples.shape, samples.dtype

    def read(self, numbers: Array) -> Array:
        """Some of the chosen samples."""
        return self._samples.read(self._numbers[numbers])

    def name(self, number: int) -> str:
        """What the whole calls it."""
        return self._samples.name(int(self._numbers[number]))


class ChosenRecords:
    """Some of other records, by their numbers."""

    def __init__(self, records: Records, numbers: Array) -> None:
        self._records, self._numbers = records, numbers
        self.codec, self.shape, self.nbytes = records.codec, records.shape, records.nbytes

    def read(self, number: int) -> bytes:
        """One of the chosen records."""
        return self._records.read(int(self._numbers[number]))

    def name(self, number: int) -> str:
        """What the whole calls it."""
        return self._records.name(int(self._numbers[number]))


def chosen(samples: Samples | Records, numbers: Array) -> Samples | Records:
    """Some of the samples, by their numbers."""
    return ChosenRecords(samples, numbers) if isinstance(samples, Records) else Chosen(samples, numbers)


def as_classes(array: Array, where: str) -> Array:
    """Class numbers, int32[n], from integers (n,) or (n, 1). DataError naming the first that can't be one."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise DataError(f"{where} is of type {array.dtype} and shape {array.shape}; it must be integers, (samples,)")
    wrong = np.flatnonzero((array < 0) | (array >= MOST_CLASSES))
    if len(wrong):
        raise DataError(f"{where}[{wrong[0]}] = {array[wrong[0]]}: a class is a number from 0 to {MOST_CLASSES - 1}")
    return array.astype(np.int32)


def plain(name: str) -> str:
    """A name that can be written anywhere: what isn't UTF-8 in the name of a file is spelled out."""
    return os.fsencode(name).decode(errors="backslashreplace")
