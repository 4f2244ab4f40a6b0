"""Batches, read ahead by two threads: one reads windows of blocks, one makes batches of them.

    reading thread    shards -> window (two pools in turn)            waits for a run of steps, then for a pool
    making thread     window -> gather, augment, normalise -> batch   waits for a window, then for one of 3 buffers
    the caller        next() -> batch -> release()                    waits for a batch

What a thread waits for is a queue, and a queue is bounded by what goes round in it: pools and buffers. No thread of the
loader calls MPI.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpnn.data.augment import AUGMENTATIONS
from dpnn.data.labels import Labels, Lists
from dpnn.data.manifest import Manifest
from dpnn.data.reader import ShardReader
from dpnn.data.runs import Leases, Run, epochs
from dpnn.data.sampler import POOLS, Sampler, Window, most_slots
from dpnn.errors import DataError, JobError

Array = NDArray[Any]

_NO_LABELS, _NO_LISTS = np.empty(0, np.int32), Lists(np.zeros(1, np.int64), np.empty(0, np.int32))
_BUFFERS = 3
_AT_ONCE_NBYTES = 1 << 20
"""Small batches are made several at a time, up to this size: threads that take turns for each cost more than it."""
_PATIENCE_S = 10.0
_READ_NBYTES = 16 << 20
"""What is read at a time, so that close() needn't wait for more."""


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


_NOTHING = np.empty(0)


def no_samples(epoch: int, step: int) -> Batch:
    """What a rank that computes, but doesn't read, has of a step."""
    return Batch(_NOTHING, _NOTHING, _NOTHING, 0, epoch, step, None)


@dataclass(frozen=True)
class _Loaded:
    """A window that was read: its order, and what its slots hold."""

    window: Window
    pool: int
    samples: Array | None
    """(slots, ...) as stored; None where samples are read one by one."""
    labels: Labels
    ids: Array
    choices: Array
    """What the augmentation does to them."""
    run: Run
    steps: range
    """Those of the run that lie in the window."""


class Loader:
    """Brings this replica's batches, epoch after epoch, from step `start` to step `last` (inclusive; None: for ever).

    `runs`: in place of those, what to read, from a source that may still grow (`Leases`; `close` closes it). Each is of
    as many lanes as the replica owns: for single lanes, any of them, the loader is replica 0 of `sampler.lanes`.
    `mean` and `std`: for each channel (the last dimension as stored); by default those of `manifest`, for evaluation
    those of the training data. `window_mb`: where a window would take more, single samples are read instead: slower,
    and without their CRC, in the same order. DataError for data it can't load, JobError for an impossible augmentation.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        sampler: Sampler,
        replica: int = 0,
        replicas: int = 1,
        *,
        augment: str = "none",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: Any = np.float32,
        window_mb: float = 2048,
        start: tuple[int, int] = (0, 0),
        last: tuple[int, int] | None = None,
        runs: Iterable[Run] | None = None,
        limit_s: float | None = None,
    ) -> None:
        if manifest.kind != "raw":
            raise DataError(
                f"{folder} holds samples encoded as {manifest.codec!r}, which this dpnn can't decode; pack them raw"
            )
        if start[1] > sampler.steps:
            raise DataError(f"step {start[1]} of an epoch of {sampler.steps} steps: these are not the data of that run")
        if augment not in AUGMENTATIONS:
            raise JobError(f"data.augment = {augment!r} is none of {', '.join(AUGMENTATIONS)}")
        self.sampler, self._manifest, self._lanes = sampler, manifest, sampler.owned(replica, replicas)
        if runs is None:
            start = start if start[1] < sampler.steps else (start[0] + 1, 0)
            runs = epochs(self._lanes, sampler.steps, start, last or (math.inf, 0))
        self._runs = runs
        self._folder, self._limit_s = folder, limit_s
        rows = sampler.max_rows(replicas)
        stored = np.dtype(manifest.dtype)
        self._channels_first = len(manifest.shape) == 3
        self._mean, self._std = self._normalisation(mean, std, np.dtype(dtype))
        sample_nbytes = math.prod(manifest.network_shape) * np.dtype(dtype).itemsize
        self._at_once = min(max(_AT_ONCE_NBYTES // (rows * sample_nbytes), 1), sampler.steps_per_window)
        rows *= self._at_once
        self._augment = AUGMENTATIONS[augment](sampler.seed, manifest.shape, stored, rows)
        self._staged = np.empty((rows, *manifest.shape), stored)
        self._multi = manifest.labels == "multi"
        label_shape = (rows, manifest.num_classes) if self._multi else (rows,)
        self._buffers = [
            (
                self._images(rows, dtype),
                np.empty(label_shape, np.uint8 if self._multi else np.int32),
                np.empty(rows, np.uint64),
            )
            for _ in range(_BUFFERS)
        ]
        slots = most_slots(sampler.samples, len(self._lanes), min(sampler.window, sampler.longest), sampler.block)
        self.window_mb = POOLS * slots * manifest.sample_nbytes / 2**20
        """MiB that whole windows take."""
        self.pooled = self.window_mb <= window_mb
        """Whether windows are read whole; else samples are read one by one."""
        self._pools = [np.empty((slots, *manifest.shape), stored) if self.pooled else None for _ in range(POOLS)]
        self._reader, self._sample_reader = ShardReader(folder, manifest), ShardReader(folder, manifest)

        self._closing = False
        self._failure: BaseException | None = None
        self._free_pools: SimpleQueue[int | None] = SimpleQueue()
        self._windows: SimpleQueue[_Loaded | BaseException | None] = SimpleQueue()
        self._free_buffers: SimpleQueue[int | None] = SimpleQueue()
        self._batches: SimpleQueue[Batch | BaseException] = SimpleQueue()
        for pool in range(len(self._pools)):
            self._free_pools.put(pool)
        for buffer in range(_BUFFERS):
            self._free_buffers.put(buffer)
        self._threads = [
            Thread(target=self._read, name="dpnn-read", daemon=True),
            Thread(target=self._make, name="dpnn-batch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def next(self) -> Batch:
        """The next batch, waiting for it. Raises what a thread of the loader raised."""
        if self._failure is None:
            try:
                batch = self._batches.get(timeout=self._limit_s)
            except Empty:
                batch = DataError(
                    f"no batch came from {self._folder} for {self._limit_s:g} s: its file system doesn't answer, or is "
                    "much too slow; try again, or raise parallel.timeout_s"
                )
            if isinstance(batch, Batch):
                return batch
            self._failure = batch
        raise self._failure

    def release(self, batch: Batch) -> None:
        """The batch isn't needed any more: its arrays will be written again. Batches are released in their order."""
        if batch.buffer is not None:
            self._free_buffers.put(batch.buffer)

    def close(self) -> None:
        """End both threads, whatever they wait for, and close all files."""
        self._closing = True
        if isinstance(self._runs, Leases):
            self._runs.close()
        self._free_pools.put(None)
        self._windows.put(None)
        self._free_buffers.put(None)
        for thread in self._threads:
            thread.join(_PATIENCE_S)
        # A thread that a dead file system holds dies with the process; its files can't be closed under it.
        if not any(thread.is_alive() for thread in self._threads):
            self._reader.close()
            self._sample_reader.close()
        self._failure = self._failure or RuntimeError("the loader is closed")

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _normalisation(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: np.dtype[Any]
    ) -> tuple[Array, Array]:
        """Mean and standard deviation in the network's type and shape; a constant channel is only centred."""
        values = []
        for value in (self._manifest.mean if mean is None else mean, self._manifest.std if std is None else std):
            array = np.asarray(value, np.float64)
            if array.shape != (self._manifest.shape[-1],):
                raise DataError(
                    f"mean and std are of {array.size} channels, and the samples have the shape "
                    f"{self._manifest.shape}; pack both parts of the data in one way"
                )
            values.append(array.astype(dtype).reshape((-1, 1, 1) if self._channels_first else -1))
        return values[0], np.where(values[1] > 0, values[1], np.ones((), dtype))

    # The reading thread.

    def _read(self) -> None:
        try:
            for loaded in self._read_windows():
                self._windows.put(loaded)
        except BaseException as error:
            self._windows.put(error)
        else:
            self._windows.put(RuntimeError("the loader has given its last batch"))

    def _read_windows(self) -> Iterator[_Loaded]:
        width = self.sampler.steps_per_window
        epoch = lru_cache(maxsize=2)(self.sampler.epoch)  # leased runs of two epochs alternate where one ends
        for run in self._runs:
            if len(run.lanes) != len(self._lanes):
                raise ValueError(f"{run} for a loader of {len(self._lanes)} lanes at a time; give it as many")
            for number in range(run.first // width, run.last // width + 1):
                steps = range(max(run.first, number * width), min(run.last + 1, (number + 1) * width))
                pool = self._free_pools.get()
                if pool is None or self._closing:
                    return
                yield self._read_window(epoch(run.epoch).window(number, run.lanes), pool, run, steps)

    def _read_window(self, window: Window, pool: int, run: Run, steps: range) -> _Loaded:
        samples = self._pools[pool]
        parts: list[Any] = []
        ids = np.empty(window.slots[-1], np.uint64)
        for shard, first, lo, hi in zip(window.shards, window.firsts, window.slots[:-1], window.slots[1:], strict=True):
            if self._closing:
                break
            index = self._reader.index(shard)
            end = first + hi - lo
            parts.append(index.labels.part(first, end) if isinstance(index.labels, Lists) else index.labels[first:end])
            ids[lo:hi] = index.ids[first:end]
            if samples is not None:
                self._read_run(shard, first, samples[lo:hi])
        labels: Labels = Lists.join([_NO_LISTS, *parts]) if self._multi else np.concatenate([_NO_LABELS, *parts])
        return _Loaded(window, pool, samples, labels, ids, self._augment.draw(ids, run.epoch), run, steps)

    def _read_run(self, shard: int, first: int, out: Array) -> None:
        """Some whole blocks of a shard, piece by piece."""
        block = self.sampler.block
        piece = max(_READ_NBYTES // (block * self._manifest.sample_nbytes), 1) * block
        for lo in range(0, len(out), piece):
            if self._closing:
                return
            self._reader.read_blocks(shard, first + lo, out[lo : lo + piece])

    # The making thread.

    def _make(self) -> None:
        try:
            while not self._closing:
                loaded = self._windows.get()
                if isinstance(loaded, BaseException):
                    raise loaded
                if loaded is None:
                    return
                for at in range(0, len(loaded.steps), self._at_once):
                    buffer = self._free_buffers.get()
                    if buffer is None or self._closing:
                        return
                    for batch in self._make_batches(loaded, loaded.steps[at : at + self._at_once], buffer):
                        self._batches.put(batch)
                self._free_pools.put(loaded.pool)
        except BaseException as error:
            self._batches.put(error)

    def _make_batches(self, loaded: _Loaded, steps: range, buffer: int) -> Iterator[Batch]:
        first = steps[0] % self.sampler.steps_per_window
        order = loaded.window.order[first : first + len(steps)]
        cuts = [0, *np.cumsum(np.count_nonzero(order >= 0, axis=1)).tolist()]
        slots = order.ravel()
        if steps[-1] >= self.sampler.full:
            slots = slots[slots >= 0]
        x, labels, ids = (array[: len(slots)] for array in self._buffers[buffer])
        ids[...] = loaded.ids[slots]
        if isinstance(loaded.labels, Lists):
            loaded.labels.put_dense(slots, labels)
        else:
            labels[...] = loaded.labels[slots]
        staged = self._staged[: len(slots)]
        if loaded.samples is None:
            self._read_samples(loaded.window, slots, staged)
        else:
            # mode="clip" because "raise" would write into a copy of `out` first; slots are in range.
            loaded.samples.take(slots, axis=0, out=staged, mode="clip")
        images = self._augment.apply(staged, loaded.choices[slots])
        # As they are stored: images are channels-last in memory, in whichever order their dimensions are named.
        np.subtract(images.transpose(0, 3, 1, 2) if self._channels_first else images, self._mean, out=x)
        np.divide(x, self._std, out=x)
        epoch, lanes, *_ = loaded.run
        for step, lo, hi in zip(steps, cuts[:-1], cuts[1:], strict=True):
            frees = buffer if step == steps[-1] else None
            yield Batch(x[lo:hi], labels[lo:hi], ids[lo:hi], hi - lo, epoch, step, frees, lanes)

    def _images(self, rows: int, dtype: Any) -> Array:
        """Room for samples as the network sees them, (rows, C, H, W) or (rows, ...), in memory as they are stored."""
        room = np.empty((rows, *self._manifest.shape), dtype)
        return room.transpose(0, 3, 1, 2) if self._channels_first else room

    def _read_samples(self, window: Window, slots: Array, out: Array) -> None:
        """Samples that don't fit into a pool, one by one."""
        shards, samples = window.locate(slots)
        for row, (shard, sample) in enumerate(zip(shards.tolist(), samples.tolist(), strict=True)):
            self._sample_reader.read_sample(shard, sample, out[row])
