"""Writing checkpoints, whole or in parts: in a thread, while training goes on."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from dpnn.checkpoint.contents import Array, Checkpoint, Slice
from dpnn.checkpoint.file import INFO, reason
from dpnn.checkpoint.folder import delete, part_name, prune, stem
from dpnn.checkpoint.output import PIECE, Dataset, Note, bytes_of, encoded, write_file
from dpnn.data.durable import sync
from dpnn.errors import DataError, NotFiniteError

_FIRST_NAP_S, _NAP_S = 0.02, 0.5
"""Pauses between two looks for the other parts: more and more, up to the last."""


def write(folder: Path, checkpoint: Checkpoint, keep: int, note: Note = lambda whom: None) -> Path:
    """Write a checkpoint into `folder`, and only when it is safe there, delete all but the `keep` newest up to it.

    NotFiniteError, and nothing is written, where a number isn't finite; DataError where the folder or the disk doesn't
    take it, and the older checkpoints stay.
    """
    steps = checkpoint.steps
    path = folder / f"{stem(steps)}.h5"
    datasets = [encoded(checkpoint.info)]
    datasets += [Dataset(name, array, _digest(name, array, steps)) for name, array in checkpoint.arrays()]
    with _explaining(path):
        write_file(path, datasets, note, epoch=checkpoint.epoch, step=checkpoint.step, steps=steps)
    prune(folder, path, keep)
    return path


class InParts:
    """Writes checkpoints of which each of `parts` ranks has a part; `mark`, the same on all, is of this start alone.

    What an earlier start of the run left of a checkpoint of the same step has another mark: it is none of this one's.
    """

    def __init__(self, folder: Path, parts: int, mark: str) -> None:
        self._folder, self._names, self._mark = folder, [part_name(part, parts) for part in range(parts)], mark
        self._given_up = False

    def give_up(self) -> None:
        """A part won't come: whoever waits for it raises DataError. Any thread may call it."""
        self._given_up = True

    def write(
        self, steps: int, part: int, params: Sequence[Slice], optimizer: Mapping[str, Sequence[Slice]], note: Note
    ) -> None:
        """Write a part of the checkpoint after `steps`: slices of the parameters and of each state.

        Every number of an array is in one slice of one part. It counts once `complete` has returned on one rank.
        NotFiniteError and DataError as `write`.
        """
        slices = [(f"params/{piece.name}", piece) for piece in params]
        for state, pieces in optimizer.items():
            slices += [(f"optimizer/{state}/{piece.name}", piece) for piece in pieces]
        path = self._hidden(steps) / self._names[part]
        datasets = [
            Dataset(f"{name}/{piece.lo}", piece.array, _digest(name, piece.array, steps), piece.shape)
            for name, piece in slices
        ]
        with _explaining(path):
            write_file(path, datasets, note, steps=steps, part=part, parts=len(self._names))

    def complete(self, steps: int, epoch: int, step: int, info: dict[str, Any], keep: int, note: Note) -> Path:
        """Make a checkpoint of the parts, once all are there; then delete older ones as `write` does. On one rank.

        DataError where the folder or the disk doesn't take it; the older checkpoints stay.
        """
        hidden, path = self._hidden(steps), self._folder / stem(steps)
        with _explaining(path):
            self._await(hidden, note)
            write_file(
                hidden / INFO, [encoded(info)], note, epoch=epoch, step=step, steps=steps, parts=len(self._names)
            )
            if path.exists():
                # No folder can be replaced at once: in between the old one has another name that readers know.
                delete(path.with_suffix(".old"))
                path.rename(path.with_suffix(".old"))
            hidden.rename(path)
            sync(self._folder)
        prune(self._folder, path, keep)
        return path

    def _hidden(self, steps: int) -> Path:
        return self._folder / f".{stem(steps)}.{self._mark}.tmp"

    def _await(self, hidden: Path, note: Note) -> None:
        """Return when all parts have their names, which they get when they are verified.

        Names are listed: looked for one by one, those that another node has made can be missed for long.
        """
        seen: dict[str, int] = {}
        nap_s = _FIRST_NAP_S
        while True:
            with os.scandir(hidden) as entries:
                found = {entry.name: _size(entry) for entry in entries}
            missing = [name for name in self._names if name not in found]
            if not missing:
                return
            if self._given_up:
                raise DataError(f"{missing[0]} won't come: its rank has died")
            if found != seen:
                seen = found
                note(f"the rank that writes {hidden / missing[0]}")
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _NAP_S)


def new_mark() -> str:
    """A mark that no other start of a run has."""
    return secrets.token_hex(4)


def _size(entry: "os.DirEntry[str]") -> int:
    """How much of a part is written; 0 of one that has just got its name."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0


def _digest(name: str, array: Array, steps: int) -> int:
    """The crc32 of an array's bytes; NotFiniteError where one of its numbers isn't finite."""
    data, crc = bytes_of(array), 0
    for lo in range(0, len(data), PIECE):
        piece = np.frombuffer(data[lo : lo + PIECE], array.dtype)
        if not (np.isfinite(piece.min()) and np.isfinite(piece.max())):
            raise NotFiniteError(
                f"{name} is no longer finite after step {steps}; no checkpoint is written: "
                "go on from an earlier one with a smaller optimizer.lr"
            )
        crc = crc32(data[lo : lo + PIECE], crc)
    return crc


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
