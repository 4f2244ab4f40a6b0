"""From samples as stored to batches as the network sees them: what the decode threads do."""

import math
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.batch import Bad, Batch
from dpnn.data.labels import Lists
from dpnn.data.manifest import Manifest
from dpnn.data.reader import ShardReader
from dpnn.data.view import BadSample, View
from dpnn.data.window import Loaded, Pool
from dpnn.errors import DataError

Array = NDArray[Any]
Block = Callable[[int], Array]
"""Gives a block of so many bytes, uint8."""


class Room:
    """Memory for some batches that are made at once; their x as `shape` says, contiguous."""

    def __init__(
        self, rows: int, shape: tuple[int, ...], dtype: Any, label_shape: tuple[int, ...], empty: Block
    ) -> None:
        self.x = empty(rows * math.prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(rows, *shape)
        self.labels = np.empty((rows, *label_shape), np.uint8 if label_shape else np.int32)
        self.ids = np.empty(rows, np.uint64)


class Countdown:
    """Counts what is left to do, by any threads."""

    def __init__(self, left: int) -> None:
        self._left, self._lock = left, threading.Lock()

    def down(self) -> bool:
        """One less; whether it was the last."""
        with self._lock:
            self._left -= 1
            return self._left == 0


class Job:
    """Some steps' batches, that are made at once, in pieces, by any threads."""

    def __init__(self, loaded: Loaded, left: Countdown, steps: range, room: Room, buffer: int, piece: int) -> None:
        """`left`: jobs with samples of `loaded`. `piece`: the most rows of one."""
        order = loaded.order[steps.start - loaded.steps.start :][: len(steps)]
        self.slots = slots = order[order >= 0]
        n = len(slots)
        self.loaded, self.buffer, self._steps = loaded, buffer, steps
        self.cuts = [0, *np.cumsum(np.count_nonzero(order >= 0, axis=1)).tolist()]
        self.x, self.labels, self.ids = room.x[:n], room.labels[:n], room.ids[:n]
        self.ids[...] = loaded.ids[slots]
        if isinstance(loaded.labels, Lists):
            loaded.labels.put_dense(slots, self.labels)
        else:
            self.labels[...] = loaded.labels[slots]
        self.choices = loaded.choices[slots]
        self.bad: dict[int, Bad] = {}
        """Rows whose samples others have taken the place of."""
        self.failure: BaseException | None = None
        self.pieces = list(pairwise([*range(0, max(n, 1), piece), n]))
        self.done = threading.Event()
        """All pieces are made, or one has failed."""
        self._left, self._left_of_loaded = Countdown(len(self.pieces)), left

    def finish_piece(self, failure: BaseException | None) -> bool:
        """A piece is done; whether it was the last that needs what was loaded."""
        self.failure = self.failure or failure
        last = self._left.down()
        if last or failure is not None:
            self.done.set()
        return last and self._left_of_loaded.down()

    def batches(self) -> Iterator[Batch]:
        """What was made."""
        epoch, lanes, *_ = self.loaded.run
        x = self.x.transpose(0, 3, 1, 2) if self.x.ndim == 4 else self.x
        for step, lo, hi in zip(self._steps, self.cuts[:-1], self.cuts[1:], strict=True):
            frees = self.buffer if step == self._steps[-1] else None
            bad = tuple(self.bad[row] for row in range(lo, hi) if row in self.bad) if self.bad else ()
            yield Batch(x[lo:hi], self.labels[lo:hi], self.ids[lo:hi], hi - lo, epoch, step, frees, lanes, bad)


class Maker:
    """Makes pieces of jobs; any number of threads at a time. `skips`: whether bad samples are replaced.

    A bad sample's place is taken by the next good one of its block, or where there is none, of its shard: which one it
    is depends on nothing but the data.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, view: View, skips: bool) -> None:
        self._manifest, self._view, self._skips = manifest, view, skips
        self._reader, self._lock = ShardReader(folder, manifest), threading.Lock()

    def make(self, job: Job, lo: int, hi: int) -> None:
        """Rows [lo, hi) of a job. DataError for a bad sample, unless these are replaced; else where none can be."""
        damaged = job.loaded.damaged
        rows = [row for row in range(lo, hi) if int(job.slots[row]) in damaged] if damaged else []
        for row in [*rows, hi]:
            while lo < row:
                try:
                    self._view.put(job.loaded.source, job.slots[lo:row], job.choices[lo:row], job.x[lo:row])
                    break
                except BadSample as error:
                    lo += error.index
                    self._replace(job, lo, error.reason)
                    lo += 1
            if row < hi:
                self._replace(job, row, damaged[int(job.slots[row])])
            lo = row + 1

    def close(self) -> None:
        """Close all files."""
        self._reader.close()

    def _replace(self, job: Job, row: int, reason: str) -> None:
        """Put another sample into a row, and note the bad one."""
        shard, sample = (int(found[0]) for found in job.loaded.locate(job.slots[row : row + 1]))
        with self._lock:
            index = self._reader.index(shard)
            bad = Bad(str(self._reader.path(shard)), sample, int(index.ids[sample]), reason)
            if not self._skips:
                raise DataError(f'{bad}; pack the data again, or set data.on_bad = "skip"')
            other = self._put_other(shard, sample, job.loaded.run.epoch, job.x[row : row + 1])
            if other is None:
                raise DataError(f"{bad}; and its shard has no good sample to take its place; pack the data again")
            job.ids[row] = index.ids[other]
            if isinstance(index.labels, Lists):
                index.labels.put_dense(np.array([other]), job.labels[row : row + 1])
            else:
                job.labels[row] = index.labels[other]
        job.bad[row] = bad

    def _put_other(self, shard: int, sample: int, epoch: int, out: Array) -> int | None:
        """The number of the sample that takes another's place, which is then in `out`."""
        n, block = self._manifest.shards[shard].samples, self._manifest.block
        blocks, own = -(-n // block), sample // block
        for turn in range(blocks):
            lo = (own + turn) % blocks * block
            hi = min(lo + block, n)
            source = self._good_block(shard, lo, hi)
            if source is None:
                continue
            numbers = [*range(sample + 1, hi), *range(lo, sample)] if turn == 0 else range(lo, hi)
            for number in numbers:
                choices = self._view.draw(self._reader.index(shard).ids[number : number + 1], epoch)
                try:
                    self._view.put(source, np.array([number - lo]), choices, out)
                except BadSample:
                    continue
                return number
        return None

    def _good_block(self, shard: int, lo: int, hi: int) -> Any:
        """The samples of a block, or None where it is damaged."""
        pool, starts = Pool(self._manifest), self._reader.starts(shard, lo, hi)
        damaged = self._reader.read_blocks(shard, lo, hi, pool.room(0, int(starts[-1])))
        return None if damaged else pool.samples(starts)
