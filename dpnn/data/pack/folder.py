"""One folder of shards from one part of a source."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.labels import Lists, histogram
from dpnn.data.manifest import NAME, Content, Manifest, Shard
from dpnn.data.pack.source import Split
from dpnn.data.writer import write_shard

Array = NDArray[Any]

_MOST_SAMPLES, _MOST_NBYTES, _LEAST_BLOCKS = 256, 4 << 20, 64


def block_size(samples: int, sample_nbytes: int) -> int:
    """Samples of a block: a power of two up to 256, of up to 4 MiB, and so that there are 64 blocks to shuffle."""
    most = min(_MOST_SAMPLES, _MOST_NBYTES // sample_nbytes, samples // _LEAST_BLOCKS)
    return 1 << max(most, 1).bit_length() - 1


def clear(folder: Path) -> None:
    """Remove the manifest, the shards and the temporary files of an earlier or a killed packing from a folder."""
    if not folder.is_dir():
        return
    (folder / NAME).unlink(missing_ok=True)
    ours = re.compile(rf"{folder.name}-\d{{5}}-of-\d{{5}}\.h5|\.({folder.name}-\d+-of-\d+\.h5|{NAME})\.\d+\.tmp")
    for path in folder.iterdir():
        if ours.fullmatch(path.name):
            path.unlink()


def write_shards(
    split: Split, num_classes: int, folder: Path, shard_nbytes: float, order: Array, progress: Callable[[int], None]
) -> Manifest:
    """Write all shards of a part, of about `shard_nbytes` each; the manifest, which isn't written yet.

    Sample i of the folder is sample order[i] of the part. `progress(n)`: so many samples more have been written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    n = len(split.ids)
    sample_nbytes = math.prod(split.samples.shape) * split.samples.dtype.itemsize
    content = Content(
        kind="raw",
        shape=split.samples.shape,
        dtype=split.samples.dtype.name,
        labels="multi" if isinstance(split.labels, Lists) else "single",
        num_classes=num_classes,
        block=block_size(n, sample_nbytes),
    )
    moments = _Moments(split.samples.shape[-1])

    def blocks(numbers: Array) -> Iterator[Array]:
        for lo in range(0, len(numbers), content.block):
            block = split.samples.read(numbers[lo : lo + content.block])
            moments.add(block)
            yield block
            progress(len(block))

    # Shards are cut at blocks, so that only the folder's last block may be short.
    n_blocks = -(-n // content.block)
    n_shards = min(max(round(n * sample_nbytes / shard_nbytes), 1), n_blocks)
    cuts = np.minimum(np.arange(n_shards + 1) * n_blocks // n_shards * content.block, n)
    shards: list[Shard] = []
    for i in range(n_shards):
        numbers = order[cuts[i] : cuts[i + 1]]
        path = folder / f"{folder.name}-{i:05d}-of-{n_shards:05d}.h5"
        shards.append(write_shard(path, content, split.labels[numbers], split.ids[numbers], blocks(numbers)))
    return Manifest(
        kind=content.kind,
        shape=content.shape,
        dtype=content.dtype,
        labels=content.labels,
        num_classes=content.num_classes,
        block=content.block,
        samples=n,
        histogram=tuple(histogram(split.labels, num_classes)),
        mean=tuple(moments.mean.tolist()),
        std=tuple(np.sqrt(moments.squares / moments.n).tolist()),
        shards=tuple(shards),
    )


class _Moments:
    """Mean and sum of squared deviations for each channel, block by block.

    Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983, equation 1.5b.
    """

    def __init__(self, channels: int) -> None:
        self.n = 0
        self.mean, self.squares = np.zeros(channels), np.zeros(channels)

    def add(self, block: Array) -> None:
        values = block.reshape(-1, block.shape[-1]).astype(np.float64)
        n, mean = len(values), values.mean(axis=0)
        values -= mean
        distance = mean - self.mean
        self.squares += np.square(values).sum(axis=0) + distance**2 * (self.n * n / (self.n + n))
        self.n += n
        self.mean += distance * (n / self.n)
