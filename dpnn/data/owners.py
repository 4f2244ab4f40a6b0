"""Shards on the nodes' own disks: who owns which of them, and which lanes are whose.

An owner is a node that holds shards and has replicas that read them. Owners are numbered by the first shard that each
owns: so the order of samples depends on how the shards are parted, and on nothing else about the nodes.
"""

import heapq
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from dpnn.data.manifest import Manifest
from dpnn.errors import DataError, JobError

Array = NDArray[Any]


@dataclass(frozen=True)
class Owners:
    """Who owns what. The lanes of an owner follow those of the one before."""

    shards: tuple[int, ...]
    """The owner of each shard."""
    lanes: tuple[int, ...]
    """How many each owner has."""
    replicas: tuple[int, ...]
    """The owner whose shards each replica reads."""

    @classmethod
    def one(cls, shards: int, lanes: int) -> "Owners":
        """A single one, for all replicas."""
        return cls((0,) * shards, (lanes,), ())

    @property
    def digest(self) -> str:
        """8 hexadecimal digits: which order of samples it makes."""
        return f"{crc32(np.array([*self.shards, *self.lanes], '<i8').tobytes()):08x}"

    def cut(self, counts: Array) -> Array:
        """Where each lane begins, and the last one ends, in the samples of all owners end to end, int64[lanes + 1].

        `counts`: samples of each shard. The lanes of an owner differ by at most one sample.
        """
        ends = np.cumsum(np.bincount(self.shards, counts, len(self.lanes)).astype(np.int64))
        begins = [0, *ends[:-1].tolist()]
        runs = [lo + np.arange(n) * (hi - lo) // n for lo, hi, n in zip(begins, ends.tolist(), self.lanes, strict=True)]
        return np.concatenate([*runs, ends[-1:]])

    def lane_runs(self) -> list[range]:
        """The lanes of each owner."""
        return [range(end - n, end) for end, n in zip(np.cumsum(self.lanes).tolist(), self.lanes, strict=True)]

    def runs(self) -> list[range]:
        """The lanes of each replica: the replicas of an owner share its lanes evenly."""
        shares = [iter(evenly(run, self.replicas.count(owner) or 1)) for owner, run in enumerate(self.lane_runs())]
        return [next(shares[owner]) for owner in self.replicas]

    def of_replica(self, replica: int) -> list[int]:
        """The shards that a replica's owner has."""
        return [shard for shard, owner in enumerate(self.shards) if owner == self.replicas[replica]]


@dataclass(frozen=True)
class Location:
    """Where a data set is read: the folder, and who owns which shards in it; None: all of them are everywhere."""

    folder: str
    owners: Owners | None = None
    whole: bool = True
    """Whether the first replica finds all shards there."""


def evenly(lanes: range, replicas: int) -> list[range]:
    """Some lanes cut into as many runs of like length."""
    cuts = [lanes.start + i * len(lanes) // replicas for i in range(replicas + 1)]
    return [range(lo, hi) for lo, hi in pairwise(cuts)]


def held(folder: str | Path, manifest: Manifest) -> Array:
    """Which of a manifest's shards a folder has, in their full size, bool[shards]."""
    try:
        with os.scandir(folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".h5")}
    except FileNotFoundError:
        sizes = {}
    except OSError as error:
        raise DataError(f"{folder} can't be listed ({error.strerror}); check its permissions") from error
    return np.array([sizes.get(shard.name) == shard.bytes for shard in manifest.shards])


def part(folder: str, manifest: Manifest, holds: Array, homes: Sequence[int], lanes: int) -> Owners:
    """Give each shard to a node that has it, and the lanes to the nodes.

    The outcome doesn't depend on the order of the nodes, and on their replicas only where these need more lanes.
    `holds`: whether each node has each shard, bool[nodes, shards]; `homes`: the node of each replica, 0, 1, ...;
    `lanes`: at least one for each replica; 0: just that. A shard that several nodes have goes to the one with the
    fewest samples. DataError where no node has a shard, or a node with replicas none that it may own.
    """
    missing = np.flatnonzero(~holds.any(axis=0))
    if len(missing):
        first, others = manifest.shards[missing[0]], len(missing) - 1
        more = f" (and {others} more shards)" if others else ""
        raise DataError(
            f'{folder}: no node has {first.name} with its {first.bytes} bytes{more}; with data.location = "local" each '
            "shard has to lie on a node whose ranks read: copy it there, or pack the data again"
        )
    samples = np.array(manifest.counts)
    owners = _least_loaded(holds, samples)
    firsts = {int(node): shard for shard, node in reversed(list(enumerate(owners)))}
    if idle := sorted(set(homes) - set(firsts)):
        raise DataError(
            f"{folder}: the ranks of a node have nothing to read (replica {homes.index(idle[0])} is one of them): "
            f"{len(manifest.shards)} shards are parted among {len(holds)} nodes, and others have all that it has; "
            "copy other shards there, or all of them to every node"
        )
    ranked = sorted(firsts, key=lambda node: firsts[node])
    number = {node: i for i, node in enumerate(ranked)}
    shards = tuple(number[int(node)] for node in owners)
    least = [list(homes).count(node) for node in ranked]
    return Owners(shards, _lanes(np.bincount(shards, samples), least, lanes), tuple(number[home] for home in homes))


def _least_loaded(holds: Array, samples: Array) -> Array:
    """The node that owns each shard: first of those that one node has, then of others, the largest first."""
    order = np.array(sorted(range(len(holds)), key=lambda node: holds[node].tobytes()))
    load, owners = np.zeros(len(holds), np.int64), np.zeros(holds.shape[1], np.int64)
    for shard in np.lexsort((-samples, holds.sum(axis=0) > 1)):
        able = order[holds[order, shard]]
        owners[shard] = node = able[np.argmin(load[able])]
        load[node] += samples[shard]
    return owners


def _lanes(samples: Array, least: Sequence[int], lanes: int) -> tuple[int, ...]:
    """Lanes of each owner, at least so many, and so that the longest lane is as short as it can be."""
    if lanes and lanes < sum(least):
        raise JobError(f"data.lanes = {lanes} is less than the {sum(least)} replicas; set it to that or more")
    given = list(least)
    longest = [(-samples[owner] / n, owner) for owner, n in enumerate(given)]
    heapq.heapify(longest)
    for _ in range(lanes - sum(least)):
        _, owner = longest[0]
        given[owner] += 1
        heapq.heapreplace(longest, (-samples[owner] / given[owner], owner))
    return tuple(given)
