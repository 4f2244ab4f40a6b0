"""One file of a checkpoint on its way to the disk, written in a thread while training goes on.

HDF5 makes, in memory, only what lies around the arrays' bytes; these go straight from the arrays to the file, piece by
piece. So no call that may wait for a disk keeps other threads from running, and each number is read from memory once.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

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
    """What is written as one: an array by its path in the file, and the crc32 of its bytes.

    `shape`: of the whole, where it is a slice of one.
    """

    name: str
    array: Array
    crc32: int
    shape: tuple[int, ...] | None = None


class _Run(NamedTuple):
    """Bytes of the file from `at` on, and their crc32."""

    at: int
    data: memoryview
    crc32: int


def encoded(info: dict[str, Any]) -> Dataset:
    """What JSON can hold, as a dataset."""
    told = msgspec.json.encode(info)
    return Dataset("info", np.frombuffer(told, np.uint8), crc32(told))


def write_file(path: Path, datasets: Sequence[Dataset], note: Note, **attributes: int) -> None:
    """Write a file, read it again, and give it its name; OSError or DataError where that fails."""
    runs = _runs(datasets, attributes)
    note(f"the file system of {path} to make it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        with FileIO(temporary, "x+") as file:
            _write(file.fileno(), runs, path, note)
            _verify(file.fileno(), runs, path, note)
        note(f"the file system of {path} to give it its name")


def _runs(datasets: Sequence[Dataset], attributes: Mapping[str, int]) -> list[_Run]:
    """The whole file, from its beginning to its end."""
    frame, payloads = _frame(datasets, attributes)
    runs = []
    crc = at = 0
    end = frame.seek(0, os.SEEK_END)
    for offset, array, its_crc in [*payloads, (end, np.empty(0), 0)]:
        frame.seek(at)
        around = frame.read(offset - at)
        crc = crc32(around, crc)
        runs += [_Run(at, memoryview(around), crc32(around)), _Run(offset, bytes_of(array), its_crc)]
        at = offset + array.nbytes
    behind = tail([(offset, array.nbytes) for offset, array, _ in payloads], end, crc)
    return [*runs, _Run(end, memoryview(behind), crc32(behind))]


def bytes_of(array: Array) -> memoryview:
    """The bytes of an array, in its order; a copy only where they don't lie in that."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _frame(datasets: Sequence[Dataset], attributes: Mapping[str, int]) -> tuple[Sparse, list[tuple[int, Array, int]]]:
    """The HDF5 file with holes for the bytes of arrays; and in order where these lie, the arrays, their crc32."""
    frame = Sparse()
    # Places are given at once, and never filled.
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)  # equal checkpoints are equal files
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    payloads = []
    with h5py.File(frame, "w", libver=("v110", "v110")) as file:
        file.attrs.update(format=np.bytes_(FORMAT), version=VERSION, **attributes)
        for one in datasets:
            kind, shape = h5py.h5t.py_create(one.array.dtype, logical=True), one.array.shape
            space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
            made = h5py.h5d.create(file.id, one.name.encode(), kind, space, creation, links)
            attrs = h5py.Dataset(made).attrs
            attrs["crc32"] = np.uint32(one.crc32)
            if one.shape is not None:
                attrs["shape"] = np.array(one.shape, np.int64)
            if one.array.nbytes:
                payloads.append((int(made.get_offset()), one.array, one.crc32))
        file.attrs["complete"] = 1
    return frame, sorted(payloads, key=lambda payload: payload[0])


def _write(descriptor: int, runs: Sequence[_Run], path: Path, note: Note) -> None:
    """Write all, to the disk."""
    whom, unsynced = f"the file system of {path} to take its bytes", 0
    for run in runs:
        for lo in range(0, len(run.data), PIECE):
            note(whom)
            piece, at = run.data[lo : lo + PIECE], run.at + lo
            while piece:
                n = os.pwrite(descriptor, piece, at)
                piece, at, unsynced = piece[n:], at + n, unsynced + n
            if unsynced >= _FLUSH:
                os.fdatasync(descriptor)
                unsynced = 0
    note(whom)
    os.fsync(descriptor)
    # So that it is read again from there, not from memory.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _verify(descriptor: int, runs: Sequence[_Run], path: Path, note: Note) -> None:
    """DataError where the file, read again, isn't what was written."""
    whom, buffer = f"the file system of {path} to give back its bytes", memoryview(bytearray(PIECE))
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    for run in runs:
        crc, at, end = 0, run.at, run.at + len(run.data)
        while at < end:
            note(whom)
            n = os.preadv(descriptor, [buffer[: end - at]], at)
            if n == 0:
                raise DataError(f"read again, it ends at byte {at}")
            crc = crc32(buffer[:n], crc)
            at += n
        if crc != run.crc32:
            raise DataError(f"read again, the bytes from {run.at} to {end} aren't those that were written")
