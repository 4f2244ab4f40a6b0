"""Reading checkpoints, and finding the newest good one."""

import math
from pathlib import Path

import msgspec
import numpy as np

from dpnn.checkpoint.contents import Array, Checkpoint, Slice
from dpnn.checkpoint.file import INFO, WAY_OUT, opened, verified_arrays
from dpnn.checkpoint.folder import listed, part_name
from dpnn.errors import DataError


def read(path: Path) -> Checkpoint:
    """The checkpoint in a file or folder, all of it verified; DataError naming the file and what is wrong with it."""
    whole = not path.is_dir()
    with opened(path if whole else path / INFO) as file:
        if whole and "parts" in file.attrs:
            raise DataError(f"{path} is only a part of a checkpoint; name its folder, {path.parent}")
        arrays = dict(verified_arrays(file))
        epoch, step, steps = (int(file.attrs[key]) for key in ("epoch", "step", "steps"))
        parts = 0 if whole else int(file.attrs["parts"])
    info = msgspec.json.decode(arrays.pop("info").tobytes())
    params: dict[str, Array] = {}
    optimizer: dict[str, dict[str, Array]] = {}
    for place, array in (arrays if whole else _joined(path, steps, parts)).items():
        kind, *state, name = place.split("/")
        into = params if kind == "params" else optimizer.setdefault(state[0], {})
        into[name] = array
    return Checkpoint(params, optimizer, epoch, step, steps, info)


def newest(folder: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest good checkpoint of a folder, and what is wrong with newer ones; None where there is no checkpoint.

    DataError where none of them is good.
    """
    damaged: list[str] = []
    for path in reversed(listed(folder)):
        try:
            return path, read(path), damaged
        except DataError as error:
            damaged.append(str(error))
    if damaged:
        raise DataError(f"no checkpoint in {folder} is good, start anew: {'; '.join(damaged)}")
    return None


def _joined(folder: Path, steps: int, parts: int) -> dict[str, Array]:
    """The whole arrays by their path, of the slices in all parts; DataError naming a part that doesn't fit."""
    found: dict[str, list[tuple[Slice, Path]]] = {}
    for path in (folder / part_name(part, parts) for part in range(parts)):
        with opened(path) as file:
            if file.attrs["steps"] != steps:
                raise DataError(f"{path} is of step {file.attrs['steps']}, not {steps}; {WAY_OUT}")
            for place, array in verified_arrays(file):
                name, lo = place.rsplit("/", 1)
                shape = tuple(int(n) for n in file[place].attrs["shape"])
                found.setdefault(name, []).append((Slice(name, int(lo), shape, array), path))
    # Slices are dropped as soon as they are joined, so that the memory isn't needed twice.
    return {name: _join(found.pop(name)) for name in list(found)}


def _join(slices: list[tuple[Slice, Path]]) -> Array:
    """A whole array of its slices, and of the files that they come from; DataError where they don't make one."""
    slices.sort(key=lambda item: (item[0].lo, item[0].array.size))
    first, end = slices[0][0], 0
    for piece, path in slices:
        if (piece.shape, piece.array.dtype) != (first.shape, first.array.dtype):
            raise DataError(f"{path}: {piece.name} has another shape or type than in other parts; {WAY_OUT}")
        if piece.lo != end:
            what = "there is a gap" if piece.lo > end else "parts overlap"
            raise DataError(f"{path}: {piece.name} goes on at {piece.lo}, not at {end}: {what}; {WAY_OUT}")
        end += piece.array.size
    if end != math.prod(first.shape):
        raise DataError(f"{path}: {first.name} ends at {end}, not at {math.prod(first.shape)}; {WAY_OUT}")
    return np.concatenate([piece.array for piece, _ in slices]).reshape(first.shape)
