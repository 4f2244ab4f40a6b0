"""Datasets of any HDF5 files: samples in one, labels in another of the same length.

SOURCE is a file, a folder of files (.h5, .hdf5), whose samples follow one another in the order of the files' names, or
a pattern of such ("parts/*.h5"); SOURCE/train and SOURCE/test (or val, validation; also train.h5 and so on) are two
parts.

Packing reads samples in a random order. Where they lie one by one this is done in the file itself. Where HDF5 holds
several to a chunk, a chunk would be read and unpacked for each of its samples (at 64 to a chunk the data 64 times), so
all is unpacked first, once and in order, into a temporary file as large as the samples are then ($TMPDIR).
"""

import glob
import itertools
import math
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from dpnn.data.pack.arrays import Layout, Stored, as_source
from dpnn.data.pack.extents import Descriptor, read_exactly
from dpnn.data.pack.parts import find_parts, reading
from dpnn.data.pack.rows import runs
from dpnn.data.pack.source import Source
from dpnn.errors import DataError, JobError

Array = NDArray[Any]

_SUFFIXES = (".h5", ".hdf5")
_OPEN_FILES = 16
_MOST_SHOWN = 20


def holds_hdf5(path: Path) -> bool:
    """Whether there are HDF5 files at a path, or in a folder train in it."""
    return path.suffix in _SUFFIXES or any(
        any(path.glob(f"{folder}*{suffix}")) for folder in ("", "train/") for suffix in _SUFFIXES
    )


def read_hdf5(source: Path, x: str, y: str, layout: Layout = "NHWC", places: bool = False) -> Source:
    """The datasets `x` and `y` of the files. `places`: y is a place (row, column) on the plane of each sample.

    JobError where x or y isn't named; DataError naming file and dataset of what is wrong.
    """
    with reading(source):
        found = find_parts(source, *_SUFFIXES) if source.is_dir() else {"train": source}
        parts = {name: _files(path) for name, path in found.items()}
        if not x or not y:
            first = parts["train"][0]
            raise JobError(
                f"{first} needs --x DATASET for the samples, and --y for the labels; it holds {_held(first)}"
            )
        stored = {name: (_stored(paths, x), _stored(paths, y)) for name, paths in parts.items()}
        return as_source(stored, layout, places)


def _files(path: Path) -> list[Path]:
    """The files that a path or a pattern stands for, in the order of their names."""
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith("."))
    else:
        paths = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
    if not paths:
        raise DataError(f"{path} holds no files named {' or '.join('*' + suffix for suffix in _SUFFIXES)}")
    return paths


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    file = _open(path)
    try:
        yield file
    finally:
        file.close()


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise DataError(f"{path} is no HDF5 file, or is damaged ({error}); copy it again") from error


def _held(path: Path) -> str:
    """The datasets of a file, for a person."""
    with _opened(path) as file:
        found: list[str] = []
        file.visititems(
            lambda name, held: found.append(f"{name} {held.shape}") if isinstance(held, h5py.Dataset) else None
        )
    return ", ".join(found[:_MOST_SHOWN]) + (", ..." if len(found) > _MOST_SHOWN else "") or "no datasets"


def _stored(paths: Sequence[Path], name: str) -> Stored:
    """A dataset of that name in each of the files, one after the other."""
    kinds, counts, chunk = [], [], 1
    for path in paths:
        with _opened(path) as file:
            dataset = file.get(name)
            if not isinstance(dataset, h5py.Dataset) or not dataset.shape:
                raise DataError(f"{path} has no dataset {name!r} of one or more samples; it holds {_held(path)}")
            if dataset.is_virtual:
                # HDF5 gives zeros, and no error, where a file that it takes data from is missing.
                raise DataError(f"{path}, {name} takes its data from other files; name those instead")
            kinds.append((dataset.shape[1:], dataset.dtype))
            counts.append(dataset.shape[0])
            chunk = max(chunk, dataset.chunks[0] if dataset.chunks else 1)
    for path, kind in zip(paths, kinds, strict=True):
        if kind != kinds[0]:
            (shape, dtype), (wanted, of) = kind, kinds[0]
            raise DataError(f"{path}, {name} holds {shape} {dtype}, but {paths[0]} {wanted} {of}; they must be alike")
    shape, dtype = kinds[0]
    where = f"{paths[0]}, {name}" if len(paths) == 1 else f"{paths[0].parent}, {name}"
    return Stored(_Datasets(paths, name, counts, chunk, shape, dtype), sum(counts), where)


class _Datasets:
    """Samples in datasets of the same name, file after file. `chunk`: how many of them HDF5 unpacks at a time."""

    def __init__(
        self, paths: Sequence[Path], dataset: str, counts: Sequence[int], chunk: int, shape: tuple[int, ...], dtype: Any
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._paths, self._dataset, self._chunk = paths, dataset, chunk
        self._cuts = np.cumsum([0, *counts])
        self._open: OrderedDict[int, h5py.File] = OrderedDict()
        self._unpacked: _Unpacked | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_unpacked": None}

    def read(self, numbers: Array) -> Array:
        """Some samples: from the files where each lies by itself, or whole chunks are asked for, else unpacked."""
        if self._chunk > 1 and not self._is_through(numbers):
            if self._unpacked is None:
                self._unpacked = self._unpack()
            return self._unpacked.read(numbers)
        return self._read_packed(numbers)

    def name(self, number: int) -> str:
        """The file, the dataset, and the place in it."""
        file = int(np.searchsorted(self._cuts, number, side="right")) - 1
        return f"{self._paths[file]}, {self._dataset}[{number - self._cuts[file]}]"

    def _is_through(self, numbers: Array) -> bool:
        """Whether this is part of reading all in order: a chunk's worth and more, or the end."""
        return bool((np.diff(numbers) == 1).all()) and (
            len(numbers) >= self._chunk or int(numbers[-1]) == self._cuts[-1] - 1
        )

    def _read_packed(self, numbers: Array) -> Array:
        """Some samples by HDF5, in slices: by a list of places it would take 1,000 times as long."""
        out = np.empty((len(numbers), *self.shape), self.dtype)
        files = np.searchsorted(self._cuts, numbers, side="right") - 1
        for lo, hi in runs(numbers, files, max(len(numbers), 1)):
            file = int(files[lo])
            first = int(numbers[lo] - self._cuts[file])
            try:
                out[lo:hi] = self._file(file)[self._dataset][first : first + hi - lo]
            except OSError as error:
                raise DataError(
                    f"{self.name(int(numbers[lo]))} can't be read ({error}); copy the file again"
                ) from error
        return out

    def _file(self, number: int) -> h5py.File:
        file = self._open.get(number)
        if file is None:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            file = self._open[number] = _open(self._paths[number])
        self._open.move_to_end(number)
        return file

    def _unpack(self) -> "_Unpacked":
        """All samples in order into a temporary file, chunk by chunk. A chunk that is damaged is remembered."""
        unpacked = _Unpacked(int(self._cuts[-1]), self.shape, self.dtype, self._dataset)
        for lo, hi in itertools.pairwise(self._cuts.tolist()):
            for first in range(lo, hi, self._chunk):
                numbers = np.arange(first, min(first + self._chunk, hi))
                try:
                    unpacked.append(self._read_packed(numbers))
                except DataError as error:
                    unpacked.append_damaged(len(numbers), str(error))
        return unpacked


class _Unpacked:
    """Samples one after the other in a temporary file that has no name: it is gone with this process."""

    def __init__(self, n: int, shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> None:
        self._shape, self._dtype = shape, dtype
        self._nbytes = math.prod(shape) * dtype.itemsize
        self._folder, self._what = Path(tempfile.gettempdir()), what
        self._damaged: list[tuple[int, int, str]] = []
        self._n = 0
        free = shutil.disk_usage(self._folder).free
        if n * self._nbytes > free:
            raise JobError(
                f"to unpack {what} takes {n * self._nbytes / 1e6:,.1f} MB, and {self._folder} has room for "
                f"{free / 1e6:,.1f}; let TMPDIR name a folder on another disk"
            )
        number, name = tempfile.mkstemp(dir=self._folder)
        self._file = Descriptor(number)
        os.unlink(name)

    def append(self, samples: Array) -> None:
        """Samples that follow those that are there."""
        try:
            data = samples.reshape(-1).view(np.uint8).data
            while data:
                data = data[os.write(self._file.number, data) :]
        except OSError as error:
            raise JobError(
                f"{self._what} can't be unpacked into {self._folder} ({error.strerror}); let TMPDIR name a folder on "
                "another disk"
            ) from error
        self._n += len(samples)

    def append_damaged(self, n: int, reason: str) -> None:
        """So many that can't be had."""
        self._damaged.append((self._n, self._n + n, reason))
        self.append(np.zeros((n, *self._shape), self._dtype))

    def read(self, numbers: Array) -> Array:
        """Some samples, in any order; DataError where one of them was damaged."""
        for lo, hi, reason in self._damaged:
            if ((numbers >= lo) & (numbers < hi)).any():
                raise DataError(reason)
        out = np.empty((len(numbers), *self._shape), self._dtype)
        for i, number in enumerate(numbers.tolist()):
            data = read_exactly(self._file.number, number * self._nbytes, self._nbytes, self._folder)
            out[i] = np.frombuffer(data, self._dtype).reshape(self._shape)
        return out
