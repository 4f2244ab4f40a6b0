"""Finding the newest checkpoint whose files are all there, and what lies where in them: no array is read."""

import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import msgspec
import numpy as np

from dpnn.checkpoint.contents import Contents, Extent, Stored
from dpnn.checkpoint.file import INFO, WAY_OUT, dataset_names, opened, verified
from dpnn.checkpoint.folder import listed, part_name
from dpnn.errors import DataError


class _Piece(NamedTuple):
    """A run of an array's numbers, and what its file says of the array."""

    state: str
    name: str
    extent: Extent
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def newest(folder: Path, known: Mapping[Path, str] | None = None) -> tuple[Contents, list[str]] | None:
    """The newest good checkpoint of a folder, and what is wrong with newer ones; None where there is no checkpoint.

    `known`: what reading has shown to be wrong with some, by their path. DataError where none is good.
    """
    damaged: list[str] = []
    for path in reversed(listed(folder)):
        try:
            return look(path, known), damaged
        except DataError as error:
            damaged.append(str(error))
    if damaged:
        raise DataError(f"no checkpoint in {folder} is good, start anew: {'; '.join(damaged)}")
    return None


def look(path: Path, known: Mapping[Path, str] | None = None) -> Contents:
    """What is in a checkpoint, a file or a folder. All is verified but the bytes of the arrays.

    DataError naming the file and what is wrong with it; `known` as in `newest`.
    """
    if known and path in known:
        raise DataError(known[path])
    whole = not path.is_dir()
    with opened(path if whole else path / INFO) as file:
        if whole and "parts" in file.attrs:
            raise DataError(f"{path} is only a part of a checkpoint; name its folder, {path.parent}")
        info = msgspec.json.decode(verified(file, "info").tobytes())
        epoch, step, steps = (int(file.attrs[key]) for key in ("epoch", "step", "steps"))
        pieces = list(_pieces(path, file, whole)) if whole else []
        parts = 0 if whole else int(file.attrs["parts"])
    for part_path in (path / part_name(part, parts) for part in range(parts)):
        with opened(part_path) as file:
            if file.attrs["steps"] != steps:
                raise DataError(f"{part_path} is of step {file.attrs['steps']}, not {steps}; {WAY_OUT}")
            pieces += _pieces(part_path, file, whole)
    pieces.sort(key=lambda piece: (piece.state, piece.name, piece.extent.lo, piece.extent.hi))
    arrays: dict[tuple[str, str], Stored] = {}
    at = 0
    for key, group in groupby(pieces, key=lambda piece: (piece.state, piece.name)):
        shape, dtype, n = _joined(list(group))
        arrays[key] = Stored(shape, dtype, range(at, at + n))
        at += n
    return Contents(path, arrays, [piece.extent for piece in pieces], epoch, step, steps, info)


def _pieces(path: Path, file: h5py.File, whole: bool) -> Iterator[_Piece]:
    """All that a file holds of the arrays; `whole`: it holds whole ones."""
    for place in dataset_names(file):
        if place == "info":
            continue
        dataset = file[place]
        kind, *state, name = place.split("/") if whole else place.rsplit("/", 1)[0].split("/")
        lo = 0 if whole else int(place.rsplit("/", 1)[1])
        shape = dataset.shape if whole else tuple(int(n) for n in dataset.attrs["shape"])
        # An empty dataset has no place in the file.
        offset = dataset.id.get_offset() or 0
        extent = Extent(path, place, lo, lo + dataset.size, offset, int(dataset.attrs["crc32"]))
        yield _Piece("" if kind == "params" else state[0], name, extent, shape, dataset.dtype)


def _joined(pieces: list[_Piece]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and type of the array that some pieces make up in their order, and how many they are.

    DataError where they don't make one.
    """
    first, end = pieces[0], 0
    for _, _, extent, shape, dtype in pieces:
        array = extent.dataset.rsplit("/", 1)[0]
        if (shape, dtype) != (first.shape, first.dtype):
            raise DataError(f"{extent.file}: {array} has another shape or type than in other parts; {WAY_OUT}")
        if extent.lo != end:
            what = "there is a gap" if extent.lo > end else "parts overlap"
            raise DataError(f"{extent.file}: {array} goes on at {extent.lo}, not at {end}: {what}; {WAY_OUT}")
        end = extent.hi
    if end != math.prod(first.shape):
        raise DataError(f"{extent.file}: {array} ends at {end}, not at {math.prod(first.shape)}; {WAY_OUT}")
    return first.shape, first.dtype, len(pieces)
