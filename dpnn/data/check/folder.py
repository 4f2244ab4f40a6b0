"""What can be wrong with a folder beside its shards: stray files, and a manifest that the shards contradict."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.manifest import NAME, Manifest
from dpnn.data.problems import Problem, listed

Array = NDArray[Any]


def stray_files(folder: Path, manifest: Manifest | None) -> Iterator[Problem]:
    """Shards that no manifest names, which training refuses, and temporary files, which it ignores."""
    named = {shard.name for shard in manifest.shards} if manifest else set()
    for path in sorted(folder.glob("*.h5")):
        if manifest and path.name not in named:
            text = f"{path}: the manifest doesn't name this shard; remove it, or pack the data again"
            yield Problem(text=text, file=str(path))
    for path in sorted(folder.glob(".*.tmp")):
        text = f"{path} was left by a packing that was killed; remove it"
        yield Problem(text=text, file=str(path), warning=True)


def moment_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Means and standard deviations that no samples can have."""
    file = str(folder / NAME)
    largest = 255.0 if manifest.dtype == "uint8" else math.inf
    least = 0.0 if manifest.dtype == "uint8" else -math.inf
    for channel, (mean, std) in enumerate(zip(manifest.mean, manifest.std, strict=False)):
        if not (math.isfinite(mean) and least <= mean <= largest):
            text = (
                f"{file}: mean[{channel}] = {mean:g} is not the mean of {manifest.dtype} numbers; pack the data again"
            )
            yield Problem(text=text, file=file, dataset="mean", index=channel)
        # Of numbers from 0 to 255 it is 127.5 at most, where half of them are 0 and half 255.
        if not (math.isfinite(std) and 0 <= std <= largest / 2 + 1e-6):
            text = f"{file}: std[{channel}] = {std:g} is no deviation of {manifest.dtype} numbers; pack the data again"
            yield Problem(text=text, file=file, dataset="std", index=channel)

    def warn(channel: int) -> Problem:
        text = f"{file}: std[{channel}] = 0: the channel is {manifest.mean[channel]:g} in all samples"
        return Problem(text=text, file=file, dataset="std", index=channel, warning=True)

    yield from listed(np.flatnonzero(np.array(manifest.std) == 0), warn)


def histogram_problems(folder: Path, manifest: Manifest, counts: Array) -> Iterator[Problem]:
    """Classes whose number of samples, `counts` in the shards, isn't the manifest's; and those that have none."""
    file = str(folder / NAME)

    def tell(k: int) -> Problem:
        said = manifest.histogram[k]
        text = f"{file}: histogram[{k}] = {said}, and the shards hold {counts[k]} samples of {_called(manifest, k)}"
        return Problem(text=f"{text}; pack the data again", file=file, dataset="histogram", index=k)

    def warn(k: int) -> Problem:
        text = f"{file}, histogram: {_called(manifest, k)} has no samples"
        return Problem(text=text, file=file, dataset="histogram", index=k, warning=True)

    if len(manifest.histogram) == len(counts):
        yield from listed(np.flatnonzero(counts != np.array(manifest.histogram)), tell)
    yield from listed(np.flatnonzero(counts == 0), warn)


def differences(train: Path, one: Manifest, test: Path, other: Manifest) -> Iterator[Problem]:
    """What keeps a network that was trained on one part from being tested on the other, and shards of both."""
    file = str(test / NAME)
    for name in ("kind", "codec", "shape", "labels", "num_classes"):
        here, there = getattr(other, name), getattr(one, name)
        if here != there:
            text = f"{file}: {name} = {here!r}, and that of {train} is {there!r}; pack both alike"
            yield Problem(text=text, file=file)
    if other.class_names and one.class_names and other.class_names != one.class_names:
        text = f"{file}: its class names are not those of {train}; pack both alike"
        yield Problem(text=text, file=file)
    shards = {shard.uuid: shard.name for shard in one.shards}
    for shard in other.shards:
        if shard.uuid in shards:
            text = f"{test / shard.name} is {train / shards[shard.uuid]} (uuid {shard.uuid}); pack the data again"
            yield Problem(text=text, file=str(test / shard.name))


def _called(manifest: Manifest, k: int) -> str:
    return f"class {k} ({manifest.class_names[k]})" if manifest.class_names else f"class {k}"
