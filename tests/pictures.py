"""Folders of encoded samples, written as the packer writes them, and samples for them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from dpnn.data import Manifest
from dpnn.data.decode import encode
from dpnn.data.manifest import Content
from dpnn.data.writer import write_shard


def jpegs(n: int, seed: int = 0, sizes: tuple[int, int] = (20, 40), classes: int = 5) -> tuple[list[bytes], np.ndarray]:
    """Pictures of many sizes, of one colour for each class, under some noise; and their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n).astype(np.int32)
    colours = np.random.default_rng(1).normal(128, 50, (classes, 3))
    records = []
    for label in labels:
        height, width = rng.integers(*sizes, 2)
        picture = colours[label] + rng.normal(0, 30, (height, width, 3))
        records.append(encode(np.clip(picture, 0, 255).astype(np.uint8)))
    return records, labels


def write_encoded(
    folder: Path,
    records: Sequence[bytes],
    labels: np.ndarray,
    counts: Sequence[int],
    block: int = 8,
    classes: int = 5,
    frame: tuple[int, ...] = (),
) -> Manifest:
    """Shards of `counts` records: pictures, or where it is given frames of the shape `frame`. Ids from 1000 on."""
    content = Content(
        kind="encoded", codec="frames" if frame else "image", shape=frame, labels="single", num_classes=classes,
        block=block,
    )  # fmt: skip
    folder.mkdir(parents=True)
    shards = []
    for number, (lo, hi) in enumerate(pairwise(np.cumsum([0, *counts]).tolist())):
        blocks = [records[at : min(at + block, hi)] for at in range(lo, hi, block)]
        lengths = np.array([len(record) for record in records[lo:hi]])
        name = f"train-{number:05d}-of-{len(counts):05d}.h5"
        shards.append(write_shard(folder / name, content, labels[lo:hi], np.arange(lo, hi) + 1000, blocks, lengths))
    manifest = Manifest(
        **msgspec.structs.asdict(content), samples=len(records),
        histogram=tuple(np.bincount(labels, minlength=classes).tolist()),
        mean=(128.0,) * content.channels, std=(64.0,) * content.channels, shards=tuple(shards),
    )  # fmt: skip
    manifest.write(folder)
    return manifest
