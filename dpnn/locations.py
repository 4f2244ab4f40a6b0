"""Where the data lie: on a file system that all nodes see, on the nodes' own disks, or copied there before the run.

Ranks look for the shards together, part them among their nodes where each has only some, copy them where the job says
so, and check them. After that every replica knows the folder that it reads, and which lanes are its own.
"""

import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpnn import config
from dpnn.comm.faults import deadline
from dpnn.comm.world import World
from dpnn.data import Location, Manifest, check_shards
from dpnn.data.owners import Array, Owners, held, part
from dpnn.data.stage import prepare_stage, stage, staged_folder
from dpnn.errors import DataError


@dataclass(frozen=True)
class Readers:
    """Which replicas read, on this rank's node and in all. Nodes are told apart by shared memory and by host name."""

    replica: int | None
    """This rank's, where it reads."""
    near: tuple[int, ...]
    """Those of its node."""
    replicas: int

    @property
    def first(self) -> bool:
        """Whether this rank looks for its node."""
        return self.replica is not None and self.replica == self.near[0]


def readers(world: World, replica: int | None, replicas: int) -> Readers:
    """Collective over the world. `replica`: that of this rank, where it reads."""
    host = socket.gethostname()
    with deadline(world.timeout_s, "asking which ranks of a node read", world.fail):
        told: list[tuple[str, int | None]] = world.node.allgather((host, replica))
    return Readers(replica, tuple(sorted(r for name, r in told if name == host and r is not None)), replicas)


def locate(
    world: World, who: Readers, options: config.Data, folder: str, manifest: Manifest, lanes: int = 0
) -> Location:
    """Where a data set is read, once it is there and has been checked; `lanes`: 0: one for each replica.

    Collective over the world; what is wrong on one rank is a DataError on all.
    """
    target = staged_folder(options.stage, folder, manifest) if options.stage else Path(folder)
    owners, whole = None, True
    if options.location == "local":
        owners, whole = _parted(world, who, folder, target if options.stage else None, manifest, lanes)
    numbers: Sequence[int] = range(len(manifest.shards))
    if owners is not None and who.replica is not None:
        numbers = owners.of_replica(who.replica)
    if options.stage:
        _stage(world, who, folder, target, manifest, numbers)
    else:
        world.check(partial(_check, who, folder, manifest, None if owners is None else numbers))
    return Location(str(target), owners, whole)


def _check(who: Readers, folder: str, manifest: Manifest, own: Sequence[int] | None) -> None:
    """Check this rank's share of the shards: of `own`, those of its node, or of all."""
    if who.replica is not None and own is not None:
        check_shards(folder, manifest, who.near.index(who.replica), len(who.near), own)
    elif who.replica is not None:
        check_shards(folder, manifest, who.replica, who.replicas)


def _parted(
    world: World, who: Readers, folder: str, target: Path | None, manifest: Manifest, lanes: int
) -> tuple[Owners | None, bool]:
    """Which node owns which shards, and whether the first replica will find all of them.

    None: there is nothing to part, since every node has all, or there are too few to be copied to different nodes. A
    node that has already copied a shard comes before others that could.
    """
    mine: tuple[tuple[int, ...], Array, Array | None] | None = None

    def look() -> None:
        nonlocal mine
        if who.first:
            own = Manifest.read(folder)
            if own.digest != manifest.digest:
                raise DataError(
                    f"{folder} on {socket.gethostname()} has the manifest of other data (digest {own.digest}, and the "
                    f"first rank's is {manifest.digest}); copy the same manifest.json to all nodes"
                )
            mine = who.near, held(folder, manifest), held(target, manifest) if target else None

    world.check(look)
    with deadline(world.timeout_s, "asking which shards are on which node", world.fail):
        gathered: list[Any] = world.comm.gather(mine) or []

    def parted() -> tuple[Owners | None, bool]:
        nodes = [node for node in gathered if node is not None]
        homes = [next(i for i, (near, _, _) in enumerate(nodes) if replica in near) for replica in range(who.replicas)]
        holds = np.array([has for _, has, _ in nodes])
        if len(manifest.shards) < len(nodes) if target else holds.all():
            return None, True
        if target:
            copied = np.array([has for _, _, has in nodes])
            holds = np.where(copied.any(axis=0), copied, holds)
        owners = part(folder, manifest, holds, homes, lanes)
        return owners, len(owners.lanes) == 1 if target else bool(holds[homes[0]].all())

    return world.first(parted)


def _stage(world: World, who: Readers, folder: str, target: Path, manifest: Manifest, numbers: Sequence[int]) -> None:
    """Copy shards to `target`: the ranks of a node share the work.

    Who has done its share waits for the others, and the time limit is for those that make no progress: so all meet now
    and then.
    """

    def tell(text: str) -> None:
        if who.replica == 0:
            print(f"dpnn: the first replica copies {folder} to {target}: {text}", file=sys.stderr, flush=True)

    def make_room() -> None:
        if who.first:
            prepare_stage(folder, target, manifest, numbers)

    mine = numbers[who.near.index(who.replica) :: len(who.near)] if who.replica is not None else ()
    copying, left = stage(folder, target, manifest, mine, tell), True

    def copy() -> None:
        nonlocal left
        end = time.monotonic() + world.timeout_s / 4
        while left and time.monotonic() < end:
            left = next(copying, "done") is None

    world.check(make_room)
    while world.any(left):
        world.check(copy)
