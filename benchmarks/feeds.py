"""What `data.py` measures: our loader, and what bounds it. Each is asked for an epoch, and says how long that took.

Our loader is told of an epoch when that is measured, so that it has read nothing of it ahead.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import cv2
import numpy as np
import simplejpeg

from dpnn.data import Leases, Loader, Manifest, Run, Sampler, ShardReader, check_shards
from dpnn.data.decode import SHRINKS, Room, decode, resize
from dpnn.data.view import view_of
from dpnn.data.view.base import Normalisation
from dpnn.data.view.colour import Colour
from dpnn.data.view.images import Boxes

LANES = 4
WINDOWS = 32
"""About so many in an epoch: what the first one takes to read, while nothing is made yet, counts as well."""
TOGETHER = 8
"""Pictures that one part is measured on before the next part: what they need stays in the cache."""
COPY_NBYTES = 38 << 20
FIRST = np.zeros(1, np.int64)


class Feed:
    """Our loader over a folder of shards, for batches of `batch` samples."""

    def __init__(self, folder: Path, batch: int, threads: int, **options: Any) -> None:
        """`options`: of the view."""
        self._manifest = manifest = Manifest.read(folder)
        self.samples = manifest.samples
        """Of an epoch."""
        self._view = view_of(manifest, mean=manifest.mean, std=manifest.std, **options)
        # Whole blocks, so that none is read twice.
        window = max(manifest.samples // (LANES * WINDOWS * manifest.block), 1) * manifest.block
        self._sampler = Sampler(manifest.counts, manifest.block, LANES, batch, window, seed=0)
        self._folder, self._threads, self._epochs = folder, threads, 0
        self._runs, self._loader = Leases(), None

    def open(self) -> None:
        """Start the loader's threads, and bring an epoch, after which all its memory has been touched."""
        self._loader = Loader(
            self._folder, self._manifest, self._sampler, view=self._view, threads=self._threads, runs=self._runs
        )
        self.epoch()

    def epoch(self) -> float:
        """The seconds that all batches of an epoch take."""
        begin = perf_counter()
        self._lease()
        for _ in range(self._sampler.steps):
            self._loader.release(self._loader.next())
        return perf_counter() - begin

    def waited(self, rate: float, epochs: int) -> float:
        """The share of its time that a consumer of `rate` samples a second waits; its first steps aren't counted."""
        for _ in range(epochs):
            self._lease()
        steps, waits = epochs * self._sampler.steps, []
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
        self._runs.add(Run(self._epochs, range(LANES), 0, self._sampler.steps - 1))
        self._epochs += 1


class Rank:
    """A rank of `ranks` that begins to read a large set of frames; nothing was done yet."""

    BATCH = 64

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks

    def start(self, resumes: bool) -> dict[str, float]:
        """The seconds of the manifest and the check of a share of the shards, and those until there is a batch.

        `resumes`: in the middle of an epoch. With "batches": the bytes of the loader's three batches.
        """
        began = perf_counter()
        manifest = Manifest.read(self._folder)
        check_shards(self._folder, manifest, 0, self._ranks)
        ranks, block = self._ranks, manifest.block
        sampler = Sampler(manifest.counts, block, LANES * ranks, self.BATCH * ranks, block, seed=0)
        start = (1, sampler.steps // 2) if resumes else (0, 0)
        checked = perf_counter()
        with Loader(self._folder, manifest, sampler, 0, ranks, start=start) as loader:
            batch = loader.next()
            found = {"check": checked - began, "batch": perf_counter() - checked, "batches": 3 * batch.x.nbytes}
            for _ in range(5):  # until all memory was touched
                loader.release(batch)
                batch = loader.next()
        return found


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
        self._room = memoryview(bytearray(manifest.block * manifest.sample_nbytes))
        self.nbytes = manifest.samples * manifest.sample_nbytes

    def forget(self) -> None:
        """Drop the files from the page cache."""
        for file in self._files:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def checked(self) -> float:
        """The seconds that they take by our reader, which checks them."""
        nbytes = self._manifest.sample_nbytes
        begin = perf_counter()
        for number, first, n in self._places:
            self._reader.read_blocks(number, first, first + n, self._room[: n * nbytes])
        return perf_counter() - begin

    def plain(self) -> float:
        """The seconds that they take by preadv."""
        shards, nbytes = self._manifest.shards, self._manifest.sample_nbytes
        begin = perf_counter()
        for number, first, n in self._places:
            os.preadv(self._files[number], [self._room[: n * nbytes]], shards[number].payload_offset + first * nbytes)
        return perf_counter() - begin


class Copying:
    """A copy in memory by some threads, of one batch of float32 into others in turn: about what the loader writes."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self._n = -(-nbytes // COPY_NBYTES)
        source, *targets = np.zeros((4, COPY_NBYTES // 4), np.float32)
        self._source, self._targets = np.array_split(source, threads), [np.array_split(t, threads) for t in targets]
        self._pool = ThreadPoolExecutor(threads)

    def epoch(self) -> float:
        """The seconds that so many bytes take."""
        begin = perf_counter()
        for i in range(self._n):
            list(self._pool.map(np.copyto, self._targets[i % len(self._targets)], self._source))
        return perf_counter() - begin


class Decoding:
    """Decoding alone, in some threads, of records in memory: by simplejpeg, or as our views do it."""

    def __init__(self, records: Sequence[bytes], threads: int, ours: bool = False) -> None:
        self._decode = _decode_as_views if ours else _decode
        self._parts = [records[i::threads] for i in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def epoch(self) -> float:
        """The seconds that it takes to decode all records."""
        begin = perf_counter()
        for _ in self._pool.map(self._decode, self._parts):
            pass
        return perf_counter() - begin


class Parts:
    """What a view of JPEGs consists of, each part alone, on one thread, on some pictures after the other."""

    def __init__(self, records: Sequence[bytes], boxes: Boxes, size: int) -> None:
        choices = boxes.draw(np.arange(len(records), dtype=np.uint64), 0)
        self._pictures = []
        for record, choice in zip(records, choices, strict=True):
            height, width, *_ = simplejpeg.decode_jpeg_header(record)
            box = boxes.box(choice.tolist(), height, width)
            shrink = next((s for s in SHRINKS if s * size <= min(box.height, box.width)), 1)
            room = np.empty((-(-height // shrink), -(-width // shrink), 3), np.uint8)
            top, left, height, width = (number // shrink for number in box[:4])
            cut = room[top : top + height, left : left + width]
            self._pictures.append((record, room, cut, box.mirrored, choice[boxes.coloured :]))
        self._coloured, self._size = bool(boxes.coloured), size
        shape = (size, size, 3)
        self._resized, self._mirrored = np.empty((2, TOGETHER, *shape), np.uint8)
        self._out = np.empty((TOGETHER, *shape), np.float32)
        self._normalise = Normalisation((124.0, 116.0, 104.0), (58.0, 57.0, 57.0), shape, np.float32)
        self._colour = Colour(self._normalise)
        self.seconds = dict.fromkeys(("decode", "resize", "mirror", "colour"), 0.0)
        """Of the last epoch."""

    def epoch(self) -> float:
        """The sum of the seconds of all parts."""
        seconds = dict.fromkeys(self.seconds, 0.0)
        parts = (self._decode, self._resize, self._mirror, self._finish)
        for lo in range(0, len(self._pictures), TOGETHER):
            some = self._pictures[lo : lo + TOGETHER]
            for name, part in zip(seconds, parts, strict=True):
                begin = perf_counter()
                part(some)
                seconds[name] += perf_counter() - begin
        self.seconds = seconds
        return sum(seconds.values())

    def _decode(self, pictures: Sequence[Any]) -> None:
        for record, room, *_ in pictures:
            simplejpeg.decode_jpeg(record, min_height=room.shape[0], min_width=room.shape[1], buffer=room)

    def _resize(self, pictures: Sequence[Any]) -> None:
        for (_, _, cut, *_), resized in zip(pictures, self._resized, strict=False):
            resize(cut, self._size, self._size, resized)

    def _mirror(self, pictures: Sequence[Any]) -> None:
        for (*_, mirrors, _), resized, mirrored in zip(pictures, self._resized, self._mirrored, strict=False):
            if mirrors:
                cv2.flip(resized, 1, mirrored)

    def _finish(self, pictures: Sequence[Any]) -> None:
        for i, ((*_, choice), resized) in enumerate(zip(pictures, self._resized, strict=False)):
            if self._coloured:
                self._colour(resized, choice, self._out[i])
            else:
                self._normalise.gather(resized[None], FIRST, self._out[i : i + 1])


def _decode_as_views(records: Sequence[bytes]) -> None:
    room = Room()
    for record in records:
        decode(record, room)


def _decode(records: Sequence[bytes]) -> None:
    for record in records:
        simplejpeg.decode_jpeg(record)
