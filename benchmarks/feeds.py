"""What `data.py` measures: our loader, and what bounds it. Each is asked for an epoch, and says how long that took.

Our loader is told of an epoch when that is measured, so that it has read nothing of it ahead.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import simplejpeg

from dpnn.data import Leases, Loader, Manifest, Run, Sampler, ShardReader

LANES = 4
WINDOW = 64
"""Samples of a lane that are shuffled: whole blocks, so that no block is read twice."""


class Feed:
    """Our loader over a folder of shards, for batches of `batch` samples."""

    def __init__(self, folder: Path, batch: int, **options: Any) -> None:
        manifest = Manifest.read(folder)
        self.samples = manifest.samples
        """Of an epoch."""
        self._batch, self._epochs = batch, 0
        self._steps = -(-manifest.samples // batch)
        self._options = {"folder": folder, "manifest": manifest, **options}
        self._runs, self._loader = Leases(), None

    def open(self) -> None:
        """Start the loader's threads, and bring an epoch, after which all its memory has been touched."""
        manifest = self._options["manifest"]
        sampler = Sampler(manifest.counts, manifest.block, LANES, self._batch, WINDOW, seed=0)
        self._loader = Loader(sampler=sampler, runs=self._runs, **self._options)
        self.epoch()

    def epoch(self) -> float:
        """The seconds that all batches of an epoch take."""
        begin = perf_counter()
        self._lease()
        for _ in range(self._steps):
            self._loader.release(self._loader.next())
        return perf_counter() - begin

    def waited(self, rate: float, epochs: int) -> float:
        """The share of its time that a consumer of `rate` samples a second waits; its first steps aren't counted."""
        for _ in range(epochs):
            self._lease()
        steps, waits = epochs * self._steps, []
        begin = perf_counter()
        for _ in range(steps):
            asked = perf_counter()
            batch = self._loader.next()
            waits.append(perf_counter() - asked)
            sleep(batch.rows / rate)
            self._loader.release(batch)
        begins = min(5, steps // 4)
        return sum(waits[begins:]) / ((perf_counter() - begin) * (steps - begins) / steps)

    def close(self) -> None:
        """End the loader's threads."""
        if self._loader is not None:
            self._loader.close()

    def _lease(self) -> None:
        self._runs.add(Run(self._epochs, range(LANES), 0, self._steps - 1))
        self._epochs += 1


class Blocks:
    """The blocks of raw shards, in a random order, into memory that is used again for each of them."""

    def __init__(self, folder: Path) -> None:
        self._manifest = manifest = Manifest.read(folder)
        self._files = [os.open(folder / shard.name, os.O_RDONLY) for shard in manifest.shards]
        self._reader = ShardReader(folder, manifest)
        self._places = [
            (number, first, min(manifest.block, shard.samples - first))
            for number, shard in enumerate(manifest.shards)
            for first in range(0, shard.samples, manifest.block)
        ]
        np.random.default_rng(0).shuffle(self._places)
        self._room = np.empty((manifest.block, *manifest.shape), manifest.dtype)
        self.nbytes = manifest.samples * manifest.sample_nbytes

    def forget(self) -> None:
        """Drop the files from the page cache."""
        for file in self._files:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def checked(self) -> float:
        """The seconds that they take by our reader, which checks them."""
        begin = perf_counter()
        for number, first, n in self._places:
            self._reader.read_blocks(number, first, self._room[:n])
        return perf_counter() - begin

    def plain(self) -> float:
        """The seconds that they take by preadv."""
        shards, nbytes = self._manifest.shards, self._manifest.sample_nbytes
        begin = perf_counter()
        for number, first, n in self._places:
            os.preadv(self._files[number], [self._room[:n]], shards[number].payload_offset + first * nbytes)
        return perf_counter() - begin


class Decoding:
    """simplejpeg alone, in some threads, on records in memory."""

    def __init__(self, records: Sequence[bytes], threads: int) -> None:
        self._parts = [records[i::threads] for i in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def epoch(self) -> float:
        """The seconds that it takes to decode all records."""
        begin = perf_counter()
        for _ in self._pool.map(_decode, self._parts):
            pass
        return perf_counter() - begin


def _decode(records: Sequence[bytes]) -> None:
    for record in records:
        simplejpeg.decode_jpeg(record)
