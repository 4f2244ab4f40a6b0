"""From shards into memory: whole windows, or, where they don't fit, the samples of a few steps, one by one."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.labels import Labels, Lists
from dpnn.data.manifest import Manifest
from dpnn.data.reader import ShardReader
from dpnn.data.runs import Run
from dpnn.data.sampler import POOLS, Sampler, Window, most_slots
from dpnn.data.view import View

Array = NDArray[Any]

_READ_NBYTES = 16 << 20
"""What is read at a time, so that who ends the reading needn't wait for more."""
Take = Callable[[], int | None]
_NO_LABELS, _NO_LISTS = np.empty(0, np.int32), Lists(np.zeros(1, np.int64), np.empty(0, np.int32))


class Records:
    """Encoded samples, end to end: that of slot i is data[starts[i]:starts[i + 1]]."""

    def __init__(self, data: memoryview, starts: Array) -> None:
        self._data, self._starts = data, starts

    def __getitem__(self, slot: int) -> memoryview:
        return self._data[self._starts[slot] : self._starts[slot + 1]]


class Pool:
    """Bytes of samples as they are stored, end to end; the memory is used again, and grows where it has to."""

    def __init__(self, manifest: Manifest, nbytes: int = 0) -> None:
        self._manifest = manifest
        self.data = np.empty(nbytes, np.uint8)

    def room(self, lo: int, hi: int) -> memoryview:
        """The bytes [lo, hi); those before stay as they are."""
        if hi > self.data.size:
            grown = np.empty(hi + hi // 8, np.uint8)
            grown[:lo] = self.data[:lo]
            self.data = grown
        return self.data.data[lo:hi]

    def samples(self, starts: Array) -> Array | Records:
        """The samples that begin at the bytes `starts`, one more than there are samples."""
        if self._manifest.kind == "encoded":
            return Records(self.data.data, starts)
        data = self.data[: int(starts[-1])]
        samples: Array = data.view(self._manifest.dtype).reshape(-1, *self._manifest.shape)
        return samples


@dataclass(frozen=True)
class Loaded:
    """Samples that were read, in slots: those of a window, or of a few of its steps."""

    pool: int
    """Where they lie."""
    source: Array | Records
    labels: Labels
    ids: Array
    choices: Array
    """What the view does to them."""
    damaged: dict[int, str]
    """What is wrong with the samples in these slots."""
    run: Run
    steps: range
    """Those of the run that are read."""
    order: Array
    """int64[steps, width]: the slots of each step; -1: none."""
    locate: Callable[[Array], tuple[Array, Array]]
    """Shard, and number in the shard, of the samples in some slots."""


class WindowReader:
    """Reads what some runs of a sampler take, for one thread; another may set `closing`, and then it ends soon.

    Each run is of `lanes` lanes. `window_mb`: the most memory for windows; `at_once`: steps that are read together
    where they don't fit. `skips`: damaged blocks are told in what is loaded; else they are an error.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        sampler: Sampler,
        view: View,
        lanes: int,
        window_mb: float,
        at_once: int,
        skips: bool,
    ) -> None:
        self._manifest, self._sampler, self._view, self._lanes = manifest, sampler, view, lanes
        self._at_once, self._skips = at_once, skips
        self._multi = manifest.labels == "multi"
        slots = most_slots(sampler.samples, lanes, min(sampler.window, sampler.longest), sampler.block)
        nbytes = sum(shard.payload_bytes for shard in manifest.shards) / manifest.samples  # of a sample
        self.window_mb = POOLS * slots * nbytes / 2**20
        """MiB that whole windows take; of encoded samples, about."""
        self.pooled = self.window_mb <= window_mb
        """Whether windows are read whole; else samples are read one by one."""
        if not self.pooled:
            slots = at_once * lanes * sampler.share
        self._sample_nbytes = nbytes
        self._pools = [Pool(manifest, math.ceil(slots * nbytes)) for _ in range(POOLS)]
        self._reader = ShardReader(folder, manifest)
        self.closing = False

    def read(self, runs: Iterable[Run], take: Take) -> Iterator[Loaded]:
        """What the runs take, each into a pool whose number `take` gives; None: it is closing."""
        width = self._sampler.steps_per_window
        load = self._whole if self.pooled else self._few
        epoch = lru_cache(maxsize=2)(self._sampler.epoch)  # leased runs of two epochs alternate where one ends
        for run in runs:
            if len(run.lanes) != self._lanes:
                raise ValueError(f"{run} for a loader of {self._lanes} lanes at a time; give it as many")
            for number in range(run.first // width, run.last // width + 1):
                steps = range(max(run.first, number * width), min(run.last + 1, (number + 1) * width))
                for loaded in load(epoch(run.epoch).window(number, run.lanes), run, steps, take):
                    if not self.closing:
                        yield loaded
                if self.closing:
                    return

    def close(self) -> None:
        """Close all files."""
        self._reader.close()

    def _whole(self, window: Window, run: Run, steps: range, take: Take) -> Iterator[Loaded]:
        """The samples of a window, whole blocks in runs."""
        number = take()
        if number is None:
            return
        pool, damaged = self._pools[number], dict[int, str]()
        coming = zip(window.shards[1:], window.firsts[1:], np.diff(window.slots)[1:], strict=True)
        starts = np.zeros(int(window.slots[-1]) + 1, np.int64)

        def read(shard: int, first: int, lo: int, hi: int) -> None:
            for following in islice(coming, 1):
                self._ahead(*map(int, following))
            end, at = first + hi - lo, starts[lo]
            starts[lo : hi + 1] = self._reader.starts(shard, first, end) + at
            for sample, reason in self._read_blocks(shard, first, end, pool, int(at)).items():
                begin = lo + sample - first
                damaged.update(dict.fromkeys(range(begin, min(begin + self._sampler.block, hi)), reason))

        labels, ids = self._look_up(window, read)
        first = steps[0] % self._sampler.steps_per_window
        yield Loaded(
            number, pool.samples(starts), labels, ids, self._view.draw(ids, run.epoch), damaged, run, steps,
            window.order[first : first + len(steps)], window.locate,
        )  # fmt: skip

    def _ahead(self, shard: int, first: int, n: int) -> None:
        """Let the system read a run of blocks, or its beginning, while another is read."""
        self._reader.ahead(shard, first, first + min(n, max(int(_READ_NBYTES / self._sample_nbytes), 1)))

    def _few(self, window: Window, run: Run, steps: range, take: Take) -> Iterator[Loaded]:
        """The samples of a window that doesn't fit into memory, one by one, for a few steps at a time."""
        labels, ids = self._look_up(window, lambda shard, first, lo, hi: None)
        for at in range(0, len(steps), self._at_once):
            number = take()
            if number is None:
                return
            some = steps[at : at + self._at_once]
            first = some[0] % self._sampler.steps_per_window
            order = window.order[first : first + len(some)]
            taken = order >= 0
            slots = order[taken]
            starts = self._read_samples(*window.locate(slots), self._pools[number])
            yield Loaded(
                number, self._pools[number].samples(starts), labels[slots], ids[slots],
                self._view.draw(ids[slots], run.epoch), {}, run, some,
                np.where(taken, np.cumsum(taken).reshape(order.shape) - 1, -1),
                partial(_among, window, slots),
            )  # fmt: skip

    def _look_up(self, window: Window, read: Callable[[int, int, int, int], None]) -> tuple[Labels, Array]:
        """Labels and ids of a window's samples. `read`, of each run, while its index is at hand."""
        parts: list[Any] = []
        ids = np.empty(int(window.slots[-1]), np.uint64)
        runs = zip(window.shards, window.firsts, window.slots[:-1], window.slots[1:], strict=True)
        for shard, first, lo, hi in (map(int, run) for run in runs):
            if self.closing:
                break
            index, end = self._reader.index(shard), first + hi - lo
            parts.append(index.labels.part(first, end) if isinstance(index.labels, Lists) else index.labels[first:end])
            ids[lo:hi] = index.ids[first:end]
            read(shard, first, lo, hi)
        return Lists.join([_NO_LISTS, *parts]) if self._multi else np.concatenate([_NO_LABELS, *parts]), ids

    def _read_blocks(self, shard: int, lo: int, hi: int, pool: Pool, at: int) -> dict[int, str]:
        """The samples [lo, hi) of a shard, whole blocks, to byte `at` of a pool; what is wrong, by first sample."""
        damaged: dict[int, str] = {}
        piece = max(int(_READ_NBYTES / self._sample_nbytes) // self._sampler.block, 1) * self._sampler.block
        for first in range(lo, hi, piece):
            if self.closing:
                break
            end = min(first + piece, hi)
            begin, stop = self._reader.span(shard, first, end)
            damaged |= self._reader.read_blocks(shard, first, end, pool.room(at, at + stop - begin))
            at += stop - begin
        for found in () if self._skips else damaged.values():
            raise self._reader.refusal(shard, found)
        return damaged

    def _read_samples(self, shards: Array, samples: Array, pool: Pool) -> Array:
        """Single samples, end to end; where each begins."""
        starts = np.zeros(len(shards) + 1, np.int64)
        at = 0
        for i, (shard, sample) in enumerate(zip(shards.tolist(), samples.tolist(), strict=True), 1):
            if self.closing:
                break
            begin, end = self._reader.span(shard, sample, sample + 1)
            self._reader.read_samples(shard, sample, sample + 1, pool.room(at, at + end - begin))
            at += end - begin
            starts[i] = at
        return starts


def _among(window: Window, slots: Array, places: Array) -> tuple[Array, Array]:
    """Shard, and number in the shard, of some of a window's `slots`, by their places among these."""
    return window.locate(slots[places])
