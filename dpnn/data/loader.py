"""Batches, read and made ahead.

    reading thread    shards -> window (two pools in turn)      waits for a run of steps, then for a pool
    making thread     window -> jobs of a few pieces            waits for a window, then for one of 3 buffers
    decode threads    piece -> rows of x                        wait for a piece
    the caller        next() -> batch -> release()              waits for a job to be done

What a thread waits for is a queue, and a queue is bounded by what goes round in it: pools and buffers. So one batch is
used while two are made. No thread of the loader calls MPI.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any

import numpy as np

from dpnn.data.batch import Batch
from dpnn.data.making import Block, Countdown, Job, Maker, Room
from dpnn.data.manifest import Manifest
from dpnn.data.runs import Leases, Run, epochs
from dpnn.data.sampler import POOLS, Sampler
from dpnn.data.view import View, view_of
from dpnn.data.window import Loaded, WindowReader
from dpnn.errors import DataError
from dpnn.memory import HOST

_BUFFERS = 3
_AT_ONCE_NBYTES = 1 << 20
"""Small batches are made several at a time, up to this size: threads that take turns for each cost more than it. Of raw
samples a piece is of about this size, too."""
_PIECES = {"raw": 2, "encoded": 4}
"""For each thread, of a batch: of encoded samples some take longer than others."""
_PATIENCE_S = 10.0
_TICK_S = 1.0


class Loader:
    """Brings this replica's batches, epoch after epoch, from step `start` to step `last` (inclusive; None: for ever).

    `view`: what the network sees; by default the samples as stored, normalised. `dtype`: what the view was made for.
    `runs`: in place of steps, what to read, from a source that may still grow (`Leases`; `close` closes it). Each is of
    as many lanes as the replica owns: for single lanes, any of them, the loader is replica 0 of `sampler.lanes`.
    `window_mb`: where a window would take more, single samples are read instead: slower, and without their CRC, in the
    same order. `threads`: how many make batches. `skips`: bad samples are replaced, and named in `Batch.bad`; else they
    are an error. `empty`: gives the memory that x lies in. DataError for data it can't load.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        sampler: Sampler,
        replica: int = 0,
        replicas: int = 1,
        *,
        view: View | None = None,
        dtype: Any = np.float32,
        window_mb: float = 2048,
        threads: int = 1,
        skips: bool = False,
        start: tuple[int, int] = (0, 0),
        last: tuple[int, int] | None = None,
        runs: Iterable[Run] | None = None,
        limit_s: float | None = None,
        empty: Block = HOST.host,
    ) -> None:
        if start[1] > sampler.steps:
            raise DataError(f"step {start[1]} of an epoch of {sampler.steps} steps: these are not the data of that run")
        view = view or view_of(manifest, mean=manifest.mean, std=manifest.std, dtype=dtype)
        lanes = sampler.owned(replica, replicas)
        if runs is None:
            start = start if start[1] < sampler.steps else (start[0] + 1, 0)
            runs = epochs(lanes, sampler.steps, start, last or (math.inf, 0))
        self._runs, self.sampler = runs, sampler
        self._folder, self._limit_s = folder, limit_s
        rows = sampler.max_rows(replicas)
        sample_nbytes = math.prod(view.shape) * np.dtype(dtype).itemsize
        self._at_once = min(max(_AT_ONCE_NBYTES // (rows * sample_nbytes), 1), sampler.steps_per_window)
        rows *= self._at_once
        pieces = _PIECES[manifest.kind] * threads
        self._piece = max(rows // pieces, 1 if manifest.kind == "encoded" else _AT_ONCE_NBYTES // sample_nbytes, 1)
        label_shape = (manifest.num_classes,) if manifest.labels == "multi" else ()
        self._rooms = [Room(rows, view.shape, dtype, label_shape, empty) for _ in range(_BUFFERS)]
        self._reader = WindowReader(folder, manifest, sampler, view, len(lanes), window_mb, self._at_once, skips)
        self._maker = Maker(folder, manifest, view, skips)
        self.window_mb, self.pooled = self._reader.window_mb, self._reader.pooled

        self._closing, self._patience_s = False, _PATIENCE_S
        self._failure: BaseException | None = None
        self._ready: deque[Batch] = deque()
        self._free_pools: SimpleQueue[int | None] = SimpleQueue()
        self._windows: SimpleQueue[Loaded | BaseException | None] = SimpleQueue()
        self._free_buffers: SimpleQueue[int | None] = SimpleQueue()
        self._pieces: SimpleQueue[tuple[Job, int, int] | None] = SimpleQueue()
        self._jobs: SimpleQueue[Job | BaseException] = SimpleQueue()
        for pool in range(POOLS):
            self._free_pools.put(pool)
        for buffer in range(_BUFFERS):
            self._free_buffers.put(buffer)
        self._threads = [
            Thread(target=self._read, name="dpnn-read", daemon=True),
            Thread(target=self._cut, name="dpnn-batch", daemon=True),
            *(Thread(target=self._make, name=f"dpnn-decode-{i}", daemon=True) for i in range(threads)),
        ]
        for thread in self._threads:
            thread.start()

    def next(self, tick: Callable[[], object] = lambda: None) -> Batch:
        """The next batch, waiting for it; meanwhile `tick` is called about once a second.

        Raises what a thread of the loader raised, and what `tick` does.
        """
        if self._failure is None and not self._ready:
            try:
                self._ready.extend(self._next_job(tick).batches())
            except BaseException as failure:
                self._failure = failure
        if self._failure is not None:
            raise self._failure
        return self._ready.popleft()

    def release(self, batch: Batch) -> None:
        """The batch isn't needed any more: its arrays will be written again. Batches are released in their order."""
        if batch.buffer is not None:
            self._free_buffers.put(batch.buffer)

    def close(self) -> None:
        """End all threads, whatever they wait for, and close all files."""
        self._closing = self._reader.closing = True
        if isinstance(self._runs, Leases):
            self._runs.close()
        self._free_pools.put(None)
        self._windows.put(None)
        self._free_buffers.put(None)
        until = monotonic() + self._patience_s
        for thread in self._threads:
            thread.join(max(until - monotonic(), 0.0))
        # A thread that a dead file system holds dies with the process; its files can't be closed under it.
        if not any(thread.is_alive() for thread in self._threads):
            self._reader.close()
            self._maker.close()
        self._failure = self._failure or RuntimeError("the loader is closed")

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_job(self, tick: Callable[[], object]) -> Job:
        """The next one, once it is done."""
        until = math.inf if self._limit_s is None else monotonic() + self._limit_s
        job: Job | None = None
        while job is None or not job.done.wait(_TICK_S):
            if job is None:
                with suppress(Empty):
                    came = self._jobs.get(timeout=_TICK_S)
                    if isinstance(came, BaseException):
                        raise came
                    job = came
                    continue
            tick()
            if monotonic() > until:
                self._patience_s = 0.0  # `close` needn't wait for the file system once more
                raise DataError(
                    f"no batch came from {self._folder} for {self._limit_s:g} s: its file system doesn't answer, or is "
                    "much too slow; try again, or raise parallel.stall_abort_s"
                )
        if job.failure is not None:
            raise job.failure
        return job

    def _read(self) -> None:
        """The reading thread."""
        try:
            for loaded in self._reader.read(self._runs, self._free_pools.get):
                self._windows.put(loaded)
        except BaseException as error:
            self._windows.put(error)
        else:
            self._windows.put(RuntimeError("the loader has given its last batch"))

    def _cut(self) -> None:
        """The making thread: jobs, and their pieces."""
        try:
            while not self._closing:
                loaded = self._windows.get()
                if isinstance(loaded, BaseException):
                    raise loaded
                if loaded is None:
                    return
                starts = range(0, len(loaded.steps), self._at_once)
                left = Countdown(len(starts))
                for at in starts:
                    buffer = self._free_buffers.get()
                    if buffer is None or self._closing:
                        return
                    steps = loaded.steps[at : at + self._at_once]
                    job = Job(loaded, left, steps, self._rooms[buffer], buffer, self._piece)
                    self._jobs.put(job)
                    for lo, hi in job.pieces:
                        self._pieces.put((job, lo, hi))
        except BaseException as error:
            self._jobs.put(error)
        finally:
            for _ in self._threads[2:]:
                self._pieces.put(None)

    def _make(self) -> None:
        """A decode thread."""
        while (piece := self._pieces.get()) is not None and not self._closing:
            job, lo, hi = piece
            failure: BaseException | None = None
            try:
                self._maker.make(job, lo, hi)
            except BaseException as error:
                failure = error
            if job.finish_piece(failure):
                self._free_pools.put(job.loaded.pool)
            del job, piece  # it holds on to a window's memory
