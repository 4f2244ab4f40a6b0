"""Packing: any source of samples becomes folders of shards, in an order that is random over all of them."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dpnn import philox
from dpnn.data.labels import Lists
from dpnn.data.manifest import NAME, Manifest
from dpnn.data.pack.digits import read_digits
from dpnn.data.pack.folder import clear, write_shards
from dpnn.data.pack.idx import read_folder
from dpnn.data.pack.npz import read_npz
from dpnn.data.pack.source import Chosen, Source, Split
from dpnn.errors import DataError, JobError

__all__ = ["Packed", "Summary", "pack"]

_ORDER, _HELD_OUT = zlib.crc32(b"pack.order"), zlib.crc32(b"pack.held_out")


@dataclass(frozen=True)
class Packed:
    """What one folder holds now."""

    folder: Path
    manifest: Manifest

    def __str__(self) -> str:
        manifest, n = self.manifest, len(self.manifest.shards)
        nbytes = sum(shard.bytes for shard in manifest.shards)
        return (
            f"{self.folder}: {manifest.samples:,} samples of {'x'.join(map(str, manifest.shape))} {manifest.dtype}, "
            f"{manifest.num_classes} classes, {nbytes / 1e6:,.1f} MB in {n} shard{'s' if n > 1 else ''}"
        )


@dataclass(frozen=True)
class Summary:
    """What was packed, part by part; as text, a line for each."""

    parts: tuple[Packed, ...]

    def __str__(self) -> str:
        return "\n".join(str(part) for part in self.parts)


def pack(
    source: str,
    folder: str | Path,
    *,
    test_fraction: float | None = None,
    shard_mb: float = 1024.0,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write the shards of FOLDER/train, and of FOLDER/test where there is a test part.

    `source`: "digits", a folder of idx files, or an .npz file. `test_fraction`: the share that is held out where the
    source has no test part of its own (default: a fifth of "digits", nothing of others). `shard_mb`: the target size
    of a shard in MiB. `seed`: of the order in which the samples are laid into the shards. `progress(done, total)`
    counts samples. The manifests are written when all shards are there.

    JobError where the source isn't known or FOLDER holds data already (and not `force`); DataError naming file and
    place of what is wrong with the source.
    """
    if not shard_mb > 0:
        raise JobError(f"shard_mb = {shard_mb:g} is not more than 0; good shards have 500 to 2000")
    if not 0 <= seed < 1 << 32:
        raise JobError(f"seed = {seed} is not from 0 to {(1 << 32) - 1}")
    # Looked up before the source is read, which may take long; a part that the source lacks does no harm.
    for part in ("train", "test"):
        if (Path(folder) / part / NAME).exists() and not force:
            raise JobError(f"{Path(folder) / part} holds packed data already; name another folder, or use --force")
    data = _with_test(_open(source), test_fraction)
    _check_alike(data, source)
    total, done = sum(len(split.ids) for split in data.splits), 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    try:
        for part in ("train", "test"):
            clear(Path(folder) / part)
        parts = []
        for number, split in enumerate(data.splits):
            order = philox.permutation(len(split.ids), seed, _ORDER, number)
            path = Path(folder) / split.name
            parts.append(Packed(path, write_shards(split, data.num_classes, path, shard_mb * 2**20, order, count)))
        for packed in parts:
            packed.manifest.write(packed.folder)
    except OSError as error:
        raise DataError(f"{folder} can't be written ({error}); make room there, or name another folder") from error
    return Summary(tuple(parts))


def _open(source: str) -> Source:
    """The source that a word or a path names."""
    path = Path(source)
    if source == "digits":
        return read_digits()
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return read_npz(path)
    problem = "is none of the known sources" if path.exists() else "doesn't exist"
    raise JobError(f'{source!r} {problem}; name "digits", a folder of MNIST-style idx files, or an .npz file')


def _check_alike(data: Source, name: str) -> None:
    """DataError where one network couldn't be trained on one part and tested on the other."""
    kinds = [(split.samples.shape, type(split.labels) is Lists) for split in data.splits]
    if len(set(kinds)) > 1:
        shapes = " and ".join("x".join(map(str, shape)) for shape, _ in kinds)
        raise DataError(
            f"{name}: its parts differ in the samples' shape ({shapes}) or in the kind of labels; make them alike"
        )


def _with_test(source: Source, fraction: float | None) -> Source:
    """The source with a test part: its own, or a `fraction` of its only part, chosen by a fixed key."""
    if fraction is None:
        fraction = source.held_out
    elif not 0 <= fraction < 1:
        raise JobError(f"test_fraction = {fraction:g} is not from 0 to less than 1")
    if not fraction:
        return source
    if len(source.splits) > 1:
        raise JobError(f"test_fraction = {fraction:g}, but the source has a test part of its own; leave it out")
    (whole,) = source.splits
    n = len(whole.ids)
    n_test = round(n * fraction)
    if not 0 < n_test < n:
        raise DataError(f"test_fraction = {fraction:g} of {n} samples leaves a part without samples; use another")
    order = philox.permutation(n, 0, _HELD_OUT)
    parts = {"train": np.sort(order[n_test:]), "test": np.sort(order[:n_test])}
    splits = [
        Split(name, Chosen(whole.samples, numbers), whole.labels[numbers], whole.ids[numbers])
        for name, numbers in parts.items()
    ]
    return replace(source, splits=splits)
