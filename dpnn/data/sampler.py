"""The order of samples: a pure function of (seed, epoch), the same on any number of ranks.

An epoch's blocks, permuted and laid end to end, are cut into lanes that differ by at most one sample. A lane shuffles
its samples within windows. The global batch of a step is the next share of every lane, so that only an epoch's last
batch is short, and no sample is dropped or seen twice. A replica owns a run of lanes and reads only their blocks.
(DESIGN, section 8; random words: dpnn/philox.py.)

Where shards lie on the nodes' own disks, each owner's blocks are laid end to end, one owner after the other, and cut
into its own lanes. Then lanes differ, and a batch is short as soon as some of them have ended.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn import philox
from dpnn.data.owners import Owners, evenly
from dpnn.errors import DataError, JobError

Array = NDArray[Any]

_BLOCKS, _WINDOWS = zlib.crc32(b"data.blocks"), zlib.crc32(b"data.windows")
_LAST_WORD = np.uint64(2**64 - 1)
POOLS = 2
"""Windows that a rank holds: one is read while batches are made of the other."""


def default_lanes(global_batch: int, replicas: int = 1) -> int:
    """The number of lanes where a job names none: the largest divisor of `global_batch` up to 64.

    So up to 64 replicas it doesn't depend on how many there are, as a rule. Where they are more than that divisor, it
    is the smallest divisor that has a lane for each of them.
    """
    divisors = [lanes for lanes in range(1, global_batch + 1) if global_batch % lanes == 0]
    chosen = max(lanes for lanes in divisors if lanes <= 64)
    return next((lanes for lanes in divisors if lanes >= replicas), chosen) if chosen < replicas else chosen


def default_grains(lanes: int) -> int:
    """The number of grains where a job names none: the largest divisor of the lanes up to 8."""
    return max(grains for grains in range(1, 9) if lanes % grains == 0)


def most_slots(samples: int, lanes: int, window: int, block: int) -> int:
    """The most samples that lie in a window of some lanes, of `samples` in all.

    At both ends of its window a lane may touch a block that is its neighbour's as well.
    """
    return min(samples, lanes * (window + 2 * (block - 1)))


def pools_nbytes(samples: int, lanes: int, window: int, block: int, sample_nbytes: float) -> float:
    """Bytes that the windows of some lanes take on the rank that owns these, at most."""
    return POOLS * most_slots(samples, lanes, window, block) * sample_nbytes


def default_window(samples: int, lanes: int, share: int, block: int, sample_nbytes: float, window_mb: float) -> int:
    """The window where a job names none: the largest power of two up to 1024 with which the windows of all `lanes` fit
    into `window_mb` MiB on a rank alone, but at least a block and a lane's share of a step.
    """
    for window in (1024 >> k for k in range(11)):
        whole = -(-window // share) * share
        if pools_nbytes(samples, lanes, whole, block, sample_nbytes) <= window_mb * 2**20:
            break
    return max(window, block, share)


@dataclass(frozen=True)
class Window:
    """What some lanes take in a run of steps. Its samples have slots: numbers from 0, run by run."""

    shards: Array
    """int64[runs]: a run is a piece of a shard that consists of whole blocks."""
    firsts: Array
    """int64[runs]: a run's first sample in its shard."""
    slots: Array
    """int64[runs + 1]: a run's first slot; the last number is that of all slots."""
    order: Array
    """int64[steps, lanes * share]: the slots of each step, lane by lane. -1: a lane has no more (last step only)."""

    def locate(self, slots: Array) -> tuple[Array, Array]:
        """Shard, and number in the shard, of the samples in some slots."""
        run = np.searchsorted(self.slots, slots, side="right") - 1
        return self.shards[run], self.firsts[run] + slots - self.slots[run]


class Sampler:
    """Which samples each step takes; no I/O.

    `counts`: samples of each shard; `block`: samples of a block; `window`: samples that a lane is shuffled within,
    rounded up to a multiple of its share so that no batch straddles two windows. `shuffle=False`: the natural order,
    which the lanes only cut. `grains`: groups of lanes, each a micro-batch of its own; 0: none. `owners`: of shards and
    lanes; None: one has them all. JobError where the lanes don't divide the global batch, or the grains the lanes.
    """

    def __init__(
        self,
        counts: Sequence[int],
        block: int,
        lanes: int,
        global_batch: int,
        window: int,
        seed: int,
        shuffle: bool = True,
        grains: int = 0,
        owners: Owners | None = None,
    ) -> None:
        if global_batch % lanes:
            lower = global_batch // lanes * lanes
            options = f"{lower} or {lower + lanes}" if lower else f"{lanes}"
            raise JobError(
                f"global_batch = {global_batch} can't be divided among {lanes} lanes; "
                f"use a multiple of {lanes} ({options}), or leave data.lanes out"
            )
        if grains and lanes % grains:
            divisors = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
            raise JobError(
                f"train.grains = {grains} doesn't divide the {lanes} lanes; use {divisors}, or set data.lanes"
            )
        self.samples = sum(counts)
        """Of an epoch."""
        if not self.samples:
            raise DataError("the shards hold no samples; pack the data again")
        self.lanes, self.global_batch, self.block, self.seed, self.shuffle = lanes, global_batch, block, seed, shuffle
        self.share = global_batch // lanes
        """Samples that a lane gives to a step."""
        self.window = -(-window // self.share) * self.share
        """Samples of a lane in a window, where it has so many left."""
        self.counts = np.array(counts, np.int64)
        self.owners = owners or Owners.one(len(counts), lanes)
        self.cuts = self.owners.cut(self.counts)
        """int64[lanes + 1]: where the lanes begin in the epoch's order."""
        lengths = np.diff(self.cuts)
        self.longest = int(lengths.max())
        """Samples of the longest lane. With one owner others have one less."""
        self.steps = -(-self.longest // self.share)
        """Of an epoch."""
        self.full = int(lengths.min()) // self.share
        """Its first steps, to which every lane gives its whole share. With one owner: all, or all but the last."""
        self.steps_per_window = self.window // self.share
        self.windows = -(-self.steps // self.steps_per_window)
        """Of an epoch."""
        self.shard_blocks = np.concatenate(([0], np.cumsum(-(-self.counts // block))))
        """int64[shards + 1]: the number of each shard's first block."""
        self.grains = grains
        self._dealt: list[range] = []
        self._micro: dict[tuple[int, int, int], list[tuple[int, int]]] = {}

    def check(self, replicas: int) -> None:
        """JobError where there are fewer lanes than replicas, DataError where there are fewer samples."""
        if self.samples < replicas:
            raise DataError(
                f"{self.samples} samples can't be divided among {replicas} replicas; use fewer ranks or more data"
            )
        if self.lanes < replicas:
            raise JobError(
                f"data.lanes = {self.lanes} is less than the {replicas} replicas; use at most {self.lanes} replicas, "
                f"or set data.lanes to a divisor of the global batch ({self.global_batch}) that is {replicas} or more"
            )

        if self.grains % replicas:
            divisors = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0 and n % replicas == 0]
            other = f"train.grains = {', '.join(map(str, divisors))}" if divisors else "other data.lanes"
            raise JobError(
                f"train.grains = {self.grains} can't be divided among {replicas} replicas; "
                f"use a number of replicas that divides it, or {other}"
            )

    def owned(self, replica: int, replicas: int) -> range:
        """The lanes that a replica reads."""
        return self._runs(replicas)[replica]

    def deal(self, runs: Sequence[range]) -> None:
        """Give each replica its run of lanes, in place of equal ones."""
        self._dealt = list(runs)
        self._micro.clear()

    def lane_steps(self, lane: int) -> int:
        """Steps of an epoch that a lane gives samples to: the first ones."""
        return -(-int(self.cuts[lane + 1] - self.cuts[lane]) // self.share)

    def total(self, step: int) -> int:
        """Samples of a step on all replicas together."""
        return self.global_batch if step < self.full else int(self._replica_rows(step, [range(self.lanes)])[0])

    def max_rows(self, replicas: int) -> int:
        """The most samples of a step that any replica can have."""
        return int(self._replica_rows(0, self._runs(replicas)).max())

    def max_micro_rows(self, replicas: int, microbatches: int) -> int:
        """The most samples of a micro-batch that any replica can have."""
        return self.max_rows(self.grains) if self.grains else -(-self.max_rows(replicas) // microbatches)

    def micro(self, step: int, replica: int, replicas: int, microbatches: int) -> list[tuple[int, int]]:
        """For each micro-batch of a step: (samples of this replica, samples of all replicas).

        A replica's n samples are cut at n * m // microbatches, or at its grains. All full steps are alike.
        """
        if step >= self.full:
            return self._cut(step, replica, replicas, microbatches)
        key = (replica, replicas, microbatches)
        if key not in self._micro:
            self._micro[key] = self._cut(step, *key)
        return self._micro[key]

    def epoch(self, number: int) -> "Epoch":
        """The order of an epoch: it takes a few bytes for each block, and is made once an epoch."""
        return Epoch(self, number)

    def _cut(self, step: int, replica: int, replicas: int, microbatches: int) -> list[tuple[int, int]]:
        if self.grains:
            rows = self._replica_rows(step, self._runs(self.grains)).reshape(replicas, microbatches)
        else:
            whole = self._replica_rows(step, self._runs(replicas))
            rows = np.diff(whole[:, None] * np.arange(microbatches + 1) // microbatches, axis=1)
        return [(int(mine), int(all_)) for mine, all_ in zip(rows[replica], rows.sum(0), strict=True)]

    def _replica_rows(self, step: int, runs: Sequence[range]) -> Array:
        """Samples of a step that each run of lanes gives, int64[runs]."""
        rows = np.clip(np.diff(self.cuts) - step * self.share, 0, self.share)
        before = np.concatenate(([0], np.cumsum(rows)))
        return before[[run.stop for run in runs]] - before[[run.start for run in runs]]

    def _runs(self, replicas: int) -> Sequence[range]:
        """Each replica's run of lanes."""
        return self._dealt or evenly(range(self.lanes), replicas)


class Epoch:
    """An epoch's blocks in their order, and what the lanes take of them."""

    def __init__(self, sampler: Sampler, number: int) -> None:
        self._sampler, self._number = sampler, number
        n_blocks = int(sampler.shard_blocks[-1])
        self._order = (
            philox.permutation(n_blocks, sampler.seed, _BLOCKS, number) if sampler.shuffle else np.arange(n_blocks)
        )
        shard, first = self._locate(self._order)
        if len(sampler.owners.lanes) > 1:
            by_owner = np.argsort(np.array(sampler.owners.shards)[shard], kind="stable")
            self._order, shard, first = self._order[by_owner], shard[by_owner], first[by_owner]
        sizes = np.minimum(sampler.block, sampler.counts[shard] - first)
        self._starts = np.concatenate(([0], np.cumsum(sizes)))
        """Where each block of `_order` begins in the epoch."""

    def window(self, number: int, lanes: range) -> Window:
        """The window `number` of a run of lanes."""
        sampler = self._sampler
        cuts = sampler.cuts[lanes.start : lanes.stop + 1]
        lo = np.minimum(cuts[:-1] + number * sampler.window, cuts[1:])
        hi = np.minimum(lo + sampler.window, cuts[1:])
        positions = self._positions(number, lanes, lo, hi)

        # The blocks that the lanes touch: first their places in the epoch, then as they stand in the shards.
        begin = np.searchsorted(self._starts, lo, side="right") - 1
        end = np.where(hi > lo, np.searchsorted(self._starts, hi, side="left"), begin)
        counts = end - begin
        places = np.unique(np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(counts.sum()))
        by_block = np.argsort(self._order[places])
        blocks = self._order[places][by_block]
        sizes = np.diff(self._starts)[places][by_block]
        slots = np.concatenate(([0], np.cumsum(sizes)))

        # A sample's slot: that of its block, and its place in the block.
        shift = np.zeros(len(places) + 1, np.int64)
        shift[by_block] = slots[:-1]
        shift[:-1] -= self._starts[places]
        which = np.searchsorted(self._starts[places], positions, side="right") - 1
        order = positions + shift[which]  # a position of -1 is before all blocks: shift[-1] leaves it as it is

        shard, first = self._locate(blocks)
        opens = np.ones(len(blocks), bool)
        opens[1:] = (np.diff(blocks) != 1) | (np.diff(shard) != 0)
        steps = order.shape[1] // sampler.share
        return Window(
            shards=shard[opens],
            firsts=first[opens],
            slots=np.append(slots[:-1][opens], slots[-1]),
            order=order.reshape(len(lanes), steps, sampler.share).swapaxes(0, 1).reshape(steps, -1),
        )

    def samples(self, step: int, lanes: range) -> tuple[Array, Array]:
        """Shard, and number in the shard, of the samples that some lanes give to a step, in the batch's order."""
        number, row = divmod(step, self._sampler.steps_per_window)
        window = self.window(number, lanes)
        slots = window.order[row]
        return window.locate(slots[slots >= 0])

    def _positions(self, number: int, lanes: range, lo: Array, hi: Array) -> Array:
        """Places in the epoch, int64[lanes, width]: each lane's window as it is taken; -1 where the lane has ended."""
        sampler = self._sampler
        width = min(sampler.window, sampler.longest - number * sampler.window)
        valid = np.arange(width) < (hi - lo)[:, None]
        if sampler.shuffle:
            # The words of a window stand lane by lane, so that a run of lanes draws its own in one go.
            start = number * sampler.lanes * sampler.window + lanes.start * width
            words = philox.words(len(lanes) * width, sampler.seed, _WINDOWS, self._number, start=start)
            words = np.where(valid, words.reshape(len(lanes), width), _LAST_WORD)
            positions = lo[:, None] + np.argsort(words, axis=1, kind="stable")
        else:
            positions = lo[:, None] + np.arange(width)
        padding = -width % sampler.share
        return np.pad(np.where(valid, positions, -1), ((0, 0), (0, padding)), constant_values=-1)

    def _locate(self, blocks: Array) -> tuple[Array, Array]:
        """Shard, and first sample in the shard, of some blocks."""
        shard = np.searchsorted(self._sampler.shard_blocks, blocks, side="right") - 1
        return shard, (blocks - self._sampler.shard_blocks[shard]) * self._sampler.block
