"""Writing checkpoints, whole or in parts."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpnn.checkpoint.contents import Array, Checkpoint, Slice
from dpnn.checkpoint.file import INFO, Dataset, encoded, reason, write_file
from dpnn.checkpoint.folder import delete, part_name, prune, stem
from dpnn.data.durable import sync
from dpnn.errors import DataError, NotFiniteError


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into `folder`, and only when it is safe there, delete all but the `keep` newest up to it.

    NotFiniteError, and nothing is written, where a number isn't finite; DataError where the folder or the disk doesn't
    take it, and the older checkpoints stay.
    """
    _check_finite(checkpoint.arrays(), checkpoint.steps)
    path = folder / f"{stem(checkpoint.steps)}.h5"
    datasets = [encoded(checkpoint.info), *(Dataset(name, array) for name, array in checkpoint.arrays())]
    with _explaining(path):
        write_file(path, datasets, epoch=checkpoint.epoch, step=checkpoint.step, steps=checkpoint.steps)
    prune(folder, path, keep)
    return path


def write_part(
    folder: Path, steps: int, part: int, parts: int, params: Sequence[Slice], optimizer: Mapping[str, Sequence[Slice]]
) -> None:
    """Write part `part` of `parts` of the checkpoint after `steps`: slices of the parameters and of each state.

    Every number of an array is in one slice of one part. It counts when `complete` has been called after all parts are
    written. NotFiniteError and DataError as `write`.
    """
    slices = [(f"params/{piece.name}", piece) for piece in params]
    slices += [(f"optimizer/{state}/{piece.name}", piece) for state, pieces in optimizer.items() for piece in pieces]
    _check_finite(((name, piece.array) for name, piece in slices), steps)
    path = folder / f".{stem(steps)}.tmp" / part_name(part, parts)
    datasets = [Dataset(f"{name}/{piece.lo}", piece.array, piece.shape) for name, piece in slices]
    with _explaining(path):
        write_file(path, datasets, steps=steps, part=part, parts=parts)


def complete(folder: Path, steps: int, parts: int, epoch: int, step: int, info: dict[str, Any], keep: int) -> Path:
    """Make a checkpoint of the parts, all of them written; then delete older ones as `write` does. On one rank.

    DataError where a part is missing, or the folder or the disk doesn't take it; the older checkpoints stay.
    """
    hidden, path = folder / f".{stem(steps)}.tmp", folder / stem(steps)
    names = [part_name(part, parts) for part in range(parts)]
    with _explaining(path):
        for name in names:
            if not (hidden / name).is_file():
                raise DataError(f"{hidden / name} is missing")
        write_file(hidden / INFO, [encoded(info)], epoch=epoch, step=step, steps=steps, parts=parts)
        # What an earlier try left, with another number of parts.
        for stray in hidden.iterdir():
            if stray.name not in (*names, INFO):
                delete(stray)
        if path.exists():
            # No folder can be replaced at once: in between the old one has another name that readers know.
            delete(path.with_suffix(".old"))
            path.rename(path.with_suffix(".old"))
        hidden.rename(path)
        sync(folder)
    prune(folder, path, keep)
    return path


def _check_finite(arrays: Iterable[tuple[str, Array]], steps: int) -> None:
    for name, array in arrays:
        if not (np.isfinite(array.min(initial=0.0)) and np.isfinite(array.max(initial=0.0))):
            raise NotFiniteError(
                f"{name} is no longer finite after step {steps}; no checkpoint is written: "
                "go on from an earlier one with a smaller optimizer.lr"
            )


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Whatever keeps `path` from being written becomes a DataError."""
    try:
        yield
    except (OSError, RuntimeError, DataError) as error:
        raise DataError(
            f"the checkpoint {path} can't be written ({reason(error)}); "
            "earlier ones are unharmed: make room there or set output.dir, then go on with --resume"
        ) from error
