"""What the loader brings."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpnn.errors import DataError

Array = NDArray[Any]


class Bad(NamedTuple):
    """A sample that can't be used."""

    file: str
    sample: int
    """Its number in the file."""
    id: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, sample {self.sample} (id {self.id}): {self.reason}"


class Batch(NamedTuple):
    """This replica's samples of a step. The arrays are valid until the batch is released."""

    x: Array
    """(rows, C, H, W) for images, (rows, *shape) for any other shape; normalised."""
    labels: Array
    """int32 (rows,), or uint8 (rows, K) of 0 and 1 where a sample has any number of classes."""
    ids: Array
    """uint64 (rows,)"""
    rows: int
    epoch: int
    step: int
    buffer: int | None
    """The loader's buffer that is free once this batch is released; None: another batch still lies in it."""
    lanes: range = range(0)
    """Where the samples come from; empty: not from a sampler's lanes."""
    bad: tuple[Bad, ...] = ()
    """Samples whose places others have taken."""


class Skipped:
    """The bad samples that this rank has met, and whether those of all ranks are too many."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._last: Bad | None = None

    def note(self, bad: Sequence[Bad]) -> None:
        """This rank has met some more."""
        self._last = bad[-1] if bad else self._last

    def check(self, total: int, epochs: int = 1) -> None:
        """DataError, on each rank that has met one, where all ranks together have skipped more than the limit.

        `epochs`: that were begun since `total` was 0; a bad sample is met again in each.
        """
        if total > self._limit * epochs and self._last is not None:
            during = f" in {epochs} epochs" if epochs > 1 else ""
            raise DataError(
                f"{total} bad samples were skipped{during}, and data.bad_limit = {self._limit}; the last one: "
                f"{self._last}; look for all with `dpnn data check`, and pack the data again, or set the limit higher"
            )


_NOTHING = np.empty(0)


def no_samples(epoch: int, step: int) -> Batch:
    """What a rank that computes, but doesn't read, has of a step."""
    return Batch(_NOTHING, _NOTHING, _NOTHING, 0, epoch, step, None)
