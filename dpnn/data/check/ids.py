"""Ids that stand twice: in two shards of a folder, or in the training and in the test part.

All ids of a folder are held as one sorted array, 8 bytes a sample: 272 MB for 34 million. Only where an id stands twice
are the shards read again, to say where.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.manifest import Manifest
from dpnn.data.problems import SHOWN, Problem
from dpnn.data.reader import ShardReader
from dpnn.errors import DataError

Array = NDArray[Any]
Place = tuple[str, int]
"""File, and index in its dataset `id`."""

_LOOKED_UP = 1000


def merged(parts: list[Array]) -> Array:
    """All ids, sorted. `parts` is emptied meanwhile, so that they are not held twice."""
    ids = np.empty(sum(map(len, parts)), np.uint64)
    end = len(ids)
    while parts:
        part = parts.pop()
        ids[end - len(part) : end] = part
        end -= len(part)
    ids.sort()
    return ids


def repeated(folder: Path, manifest: Manifest, ids: Array) -> Iterator[Problem]:
    """Ids, sorted, of a folder that stand in several of its shards. Twice in one shard is that shard's problem."""
    twice = np.unique(ids[1:][ids[1:] == ids[:-1]])
    found = _places(folder, manifest, twice[:_LOOKED_UP])
    several = {value: places for value, places in found.items() if len({file for file, _ in places}) > 1}
    more = len(several) + len(twice[_LOOKED_UP:]) - SHOWN
    for value, ((first, i), *others) in list(several.items())[:SHOWN]:
        file, j = next(place for place in others if place[0] != first)
        text = f"{file}, id[{j}] = {value} stands in {first}, id[{i}] too; pack the data again"
        yield Problem(text=text, file=file, dataset="id", index=j)
    if more > 0:
        yield Problem(
            text=f"{folder}: {more:,} more ids stand in two shards", file=str(folder), dataset="id", count=more
        )


def shared(train: tuple[Path, Manifest, Array], test: tuple[Path, Manifest, Array]) -> Iterator[Problem]:
    """Ids that are in both of two parts, given as folder, manifest and sorted ids."""
    ids, other = train[2], test[2]
    if not len(ids):
        return
    both = np.unique(other[ids[np.minimum(np.searchsorted(ids, other), len(ids) - 1)] == other])
    theirs, ours = (_places(folder, manifest, both[:SHOWN]) for folder, manifest, _ in (train, test))
    for value in both[:SHOWN].tolist():
        (file, i), (seen, j) = ours[value][0], theirs[value][0]
        text = (
            f"{file}, id[{i}] = {value}: the sample is also trained on ({seen}, id[{j}]), "
            "so the error on it says nothing; pack the data again"
        )
        yield Problem(text=text, file=file, dataset="id", index=i)
    more = len(both) - SHOWN
    if more > 0:
        text = f"{test[0]}: {more:,} more samples are also in {train[0]}"
        yield Problem(text=text, file=str(test[0]), dataset="id", count=more)


def _places(folder: Path, manifest: Manifest, values: Array) -> dict[int, list[Place]]:
    """Where some ids stand, shard by shard."""
    found: dict[int, list[Place]] = {int(value): [] for value in values}
    reader = ShardReader(folder, manifest)
    try:
        for number, shard in enumerate(manifest.shards if found else ()):
            if not shard.is_in_folder:
                continue
            try:
                ids = reader.index(number).ids
            except DataError:  # told already, and none of its ids are in question
                continue
            for place in np.flatnonzero(np.isin(ids, values)).tolist():
                found[int(ids[place])].append((str(folder / shard.name), place))
    finally:
        reader.close()
    return found
