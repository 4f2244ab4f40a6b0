"""Reading what a rank needs of a checkpoint, straight from its places in the files; and verifying it together.

A rank sees only its slices of an array, but crc32 is linear: of two runs of bytes a and b behind one another it is
x^(8|b|)·crc32(a) + crc32(b), polynomials over GF(2) (`crc32_combine`). So each rank moves the crc32 of what it has
read to its place in the whole, and the exclusive or over all ranks has to be what was written. No byte is read twice.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32, crc32_combine
from numpy.typing import NDArray

from dpnn.checkpoint.contents import Array, Checkpoint, Contents, Slice
from dpnn.checkpoint.file import WAY_OUT, damaged, reason
from dpnn.checkpoint.finding import look
from dpnn.checkpoint.output import Note
from dpnn.errors import DataError

Crcs = NDArray[np.uint32]
"""A number for each extent of a checkpoint."""
_CHUNK = 1 << 20
"""Numbers that are read, and then summed up while they are in the cache."""


def fill(contents: Contents, slices: Mapping[str, Sequence[Slice]], note: Note = lambda whom: None) -> Crcs:
    """Read the arrays of `slices`, by name of the state ("": the parameters themselves), in place.

    Numbers of another type are converted. The result, one number for each extent, is what this rank has to add to its
    crc32 (see `verify`). `note` is called whenever the reading gets on, with what it waits for next. Whatever can't be
    read is a DataError.
    """
    crcs = np.zeros(len(contents.extents), np.uint32)
    runs = [run for state, pieces in slices.items() for piece in pieces for run in _runs(contents, state, piece)]
    runs.sort(key=lambda run: (run.file, run.offset))
    for path, group in groupby(runs, key=lambda run: run.file):
        note(f"{path} to be opened")
        try:
            with path.open("rb", buffering=0) as file:
                for run in group:
                    crcs[run.extent] ^= crc32_combine(_read(file.fileno(), run, note), 0, run.behind)
        except OSError as error:
            raise DataError(f"{path} can't be read ({reason(error)}); {WAY_OUT}") from error
    return crcs


def verify(contents: Contents, crcs: Crcs, states: Collection[str]) -> None:
    """DataError naming one of the arrays of some states ("": the parameters themselves) whose bytes are damaged.

    `crcs`: the exclusive or of what `fill` has returned to all who together have read each number of them once.
    """
    for (state, _), stored in contents.arrays.items():
        for index in stored.extents if state in states else ():
            extent = contents.extents[index]
            if crcs[index] != extent.crc32:
                raise damaged(extent.file, extent.dataset)


def read(path: Path) -> Checkpoint:
    """All of the checkpoint in a file or folder, verified; DataError naming the file and what is wrong with it."""
    found = look(path)
    arrays: dict[str, dict[str, Array]] = {"": {}}
    for (state, name), stored in found.arrays.items():
        arrays.setdefault(state, {})[name] = np.empty(stored.shape, stored.dtype)
    slices = {
        state: [Slice(name, 0, array.shape, array.reshape(-1)) for name, array in kept.items()]
        for state, kept in arrays.items()
    }
    verify(found, fill(found, slices), slices.keys())
    return Checkpoint(arrays.pop(""), arrays, found.epoch, found.step, found.steps, found.info)


class _Run(NamedTuple):
    """What a rank reads of an extent, the one of that number, into `target`; `behind` it are so many bytes."""

    file: Path
    offset: int
    dtype: np.dtype[Any]
    target: Array
    extent: int
    behind: int


def _runs(contents: Contents, state: str, piece: Slice) -> Iterator[_Run]:
    stored = contents.arrays[state, piece.name]
    for index in stored.extents:
        extent = contents.extents[index]
        lo, hi = max(extent.lo, piece.lo), min(extent.hi, piece.lo + piece.array.size)
        if lo < hi:
            offset, behind = ((n * stored.dtype.itemsize) for n in (lo - extent.lo, extent.hi - hi))
            target = piece.array[lo - piece.lo : hi - piece.lo]
            yield _Run(extent.file, extent.offset + offset, stored.dtype, target, index, behind)


def _read(file: int, run: _Run, note: Note) -> int:
    """Read a run from an open file; the crc32 of its bytes."""
    target, dtype, crc, at = run.target, run.dtype, 0, run.offset
    buffer = None if target.dtype == dtype else np.empty(min(target.size, _CHUNK), dtype)
    for lo in range(0, target.size, _CHUNK):
        chunk = target[lo : lo + _CHUNK]
        numbers = chunk if buffer is None else buffer[: chunk.size]
        left = numbers.view(np.uint8).data
        while left:
            note(f"{run.file} to be read")
            n = os.preadv(file, [left], at)
            if n == 0:
                raise OSError("it is cut short")
            left, at = left[n:], at + n
        crc = crc32(numbers.view(np.uint8), crc)
        if buffer is not None:
            chunk[...] = numbers
    return crc
