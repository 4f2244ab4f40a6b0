"""One file of a checkpoint on its way to the disk, written in a thread while training goes on.

HDF5 makes, in memory, only what lies around the arrays' bytes; these go straight from the arrays to the file, piece by
piece. So no call that may wait for a disk keeps other threads from running, and each number is read from memory once.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import h5py
import msgspec
import numpy as np
from isal.isal_zlib import crc32

from dpnn.checkpoint.contents import Array
from dpnn.checkpoint.file import FORMAT, VERSION, tail
from dpnn.checkpoint.sparse import Sparse
from dpnn.data.durable import replacing
from dpnn.errors import DataError

Note = Callable[[str], object]
"""Called whenever the writing gets on, with what it waits for next."""
PIECE = 1 << 20
"""Bytes of one read or write: they stay in a core's cache from one use to the next."""
_FLUSH = 1 << 28
"""Bytes after which the disk must have what was written: memory isn't filled by what a slow disk hasn't taken, and it
shows whether that gets on."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """What is written as one: an array by its path in the file; `shape`: of the whole, where it is a slice of one."""

    name: str
    array: Array
    shape: tuple[int, ...] | None = None


class _Run(NamedTuple):
    """Bytes of the file from `at` on, and the crc32 that they were written with."""

    at: int
    nbytes: int
    crc32: int


def encoded(info: dict[str, Any]) -> Dataset:
    """What JSON can hold, as a dataset."""
    return Dataset("info", np.frombuffer(msgspec.json.encode(info), np.uint8))


def write_file(path: Path, datasets: Sequence[Dataset], note: Note, **attributes: int) -> None:
    """Write a file, read it again, and give it its name; OSError or DataError where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        with FileIO(temporary, "x+") as file, _Frame(attributes) as frame:
            output = _Output(file.fileno(), f"the file system of {path} to take its bytes", note)
            for dataset in datasets:
                frame.add(dataset)
            payloads = []
            for dataset in datasets:
                array = np.ascontiguousarray(dataset.array)
                crc = 0
                if array.nbytes:
                    run = output.put(frame.offset(dataset), array.reshape(-1).view(np.uint8).data)
                    payloads.append((run.at, run.nbytes))
                    crc = run.crc32
                frame.seal(dataset, crc)
            payloads.sort()
            output.put_around(frame.close(), payloads)
            output.sync()
            output.verify(path)
        note(f"the file system of {path} to give it its name")


class _Frame:
    """The HDF5 file without its arrays' bytes."""

    def __init__(self, attributes: Mapping[str, int]) -> None:
        self._memory = Sparse()
        self._file = h5py.File(self._memory, "w", libver=("v110", "v110"))
        self._file.attrs.update(format=np.bytes_(FORMAT), version=VERSION, **attributes)
        # Places are given at once, and never filled.
        self._creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        self._creation.set_layout(h5py.h5d.CONTIGUOUS)
        self._creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        self._links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, dataset: Dataset) -> None:
        """A place for its bytes."""
        array = np.asarray(dataset.array)
        kind = h5py.h5t.py_create(array.dtype, logical=True)
        space = h5py.h5s.create_simple(array.shape) if array.ndim else h5py.h5s.create(h5py.h5s.SCALAR)
        h5py.h5d.create(self._file.id, dataset.name.encode(), kind, space, self._creation, self._links)

    def offset(self, dataset: Dataset) -> int:
        """Where they lie in the file."""
        return int(self._file[dataset.name].id.get_offset())

    def seal(self, dataset: Dataset, crc: int) -> None:
        """The attributes of one whose bytes are written."""
        attributes = self._file[dataset.name].attrs
        attributes["crc32"] = np.uint32(crc)
        if dataset.shape is not None:
            attributes["shape"] = np.array(dataset.shape, np.int64)

    def close(self) -> Sparse:
        """The whole HDF5 file, with holes where the arrays' bytes lie."""
        self._file.attrs["complete"] = 1
        self._file.close()
        return self._memory


class _Output:
    """A file being written, in any order, and then verified."""

    def __init__(self, descriptor: int, whom: str, note: Note) -> None:
        self._descriptor, self._whom, self._note = descriptor, whom, note
        self._runs: list[_Run] = []
        self._unsynced = 0

    def put(self, at: int, data: memoryview) -> _Run:
        """Write bytes from `at` on."""
        crc = 0
        for lo in range(0, len(data), PIECE):
            piece = data[lo : lo + PIECE]
            crc = crc32(piece, crc)
            self._write(at + lo, piece)
        self._runs.append(_Run(at, len(data), crc))
        return self._runs[-1]

    def put_around(self, frame: Sparse, payloads: list[tuple[int, int]]) -> None:
        """Write the bytes of a file in memory save those of `payloads`, which are in order; then the tail."""
        end = frame.seek(0, os.SEEK_END)
        crc = at = 0
        for offset, length in [*payloads, (end, 0)]:
            frame.seek(at)
            around = frame.read(offset - at)
            crc = crc32(around, crc)
            self.put(at, memoryview(around))
            at = offset + length
        self.put(end, memoryview(tail(payloads, end, crc)))

    def sync(self) -> None:
        """Return when all is on the disk."""
        self._note(self._whom)
        os.fsync(self._descriptor)
        # So that it is read again from there, not from memory.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def verify(self, path: Path) -> None:
        """DataError where the file, read again, isn't what was written."""
        buffer = memoryview(bytearray(PIECE))
        whom = f"the file system of {path} to give back its bytes"
        for run in sorted(self._runs):
            crc, at, end = 0, run.at, run.at + run.nbytes
            while at < end:
                self._note(whom)
                n = os.preadv(self._descriptor, [buffer[: end - at]], at)
                if n == 0:
                    raise DataError(f"read again, it ends at byte {at}")
                crc = crc32(buffer[:n], crc)
                at += n
            if crc != run.crc32:
                raise DataError(f"read again, the bytes from {run.at} to {end} aren't those that were written")

    def _write(self, at: int, piece: memoryview) -> None:
        self._note(self._whom)
        while piece:
            n = os.pwrite(self._descriptor, piece, at)
            piece, at = piece[n:], at + n
            self._unsynced += n
        if self._unsynced >= _FLUSH:
            os.fdatasync(self._descriptor)
            self._unsynced = 0
