"""Packing: any source of samples becomes folders of shards, in an order that is random over all of them.

Each rank writes its own shards. What is in which shard doesn't depend on the number of ranks, nor does any byte. A
packing that was killed goes on where it stood (journal.py).
"""

import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dpnn import philox
from dpnn.data.labels import Lists
from dpnn.data.pack.folder import Folder
from dpnn.data.pack.formats import Options, open_source
from dpnn.data.pack.journal import Finished, Journal, Plan, digest_of
from dpnn.data.pack.ranks import Alone, Ranks
from dpnn.data.pack.source import Source, Split, chosen
from dpnn.data.pack.stored import Rejected, form_of
from dpnn.data.pack.summary import Packed, Summary
from dpnn.errors import DataError, JobError

__all__ = ["Options", "Packed", "Ranks", "Summary", "pack"]

_ORDER, _HELD_OUT = zlib.crc32(b"pack.order"), zlib.crc32(b"pack.held_out")


def pack(
    source: str,
    folder: str | Path,
    *,
    options: Options | None = None,
    test_fraction: float | None = None,
    shorter_side: int = 0,
    raw: int = 0,
    shard_mb: float = 1024.0,
    seed: int = 0,
    on_bad: Literal["reject", "stop"] = "reject",
    force: bool = False,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write the shards of FOLDER/train, and of FOLDER/test where there is a test part. Collective over `ranks`.

    `source`: a path, or "digits"; `options` say how it is read. `test_fraction`: the share that is held out where the
    source has no test part of its own (default: a fifth of "digits", nothing of others). Pictures are kept as their
    files are; `shorter_side`: larger ones are made so large, as JPEG; `raw`: all are decoded and become squares of so
    many pixels. `shard_mb`: the target size of a shard in MiB. `seed`: of the order in which the samples are laid into
    the shards. `on_bad`: what is done with samples that can't be read or decoded: left out and named in a file, or the
    first ends all. `progress(done, total)` counts samples, those of other ranks by the share that this one has done;
    what it raises ends the packing.

    The manifests are written when all shards are there. A packing that ended before goes on where the same is asked
    for: its finished shards are checked and kept.

    JobError where the source isn't known, or FOLDER holds data, or another packing that isn't complete (and not
    `force`); DataError naming file and place of what is wrong with the source, or what can't be written.
    """
    ranks, target = ranks or Alone(), Path(folder)
    if not shard_mb > 0:
        raise JobError(f"shard_mb = {shard_mb:g} is not more than 0; good shards have 500 to 2000")
    if not 0 <= seed < 1 << 32:
        raise JobError(f"seed = {seed} is not from 0 to {(1 << 32) - 1}")
    if min(shorter_side, raw) < 0 or (shorter_side and raw):
        raise JobError(f"shorter_side = {shorter_side} and raw = {raw}: one of them is a number of pixels, the other 0")
    journal = Journal(target)

    def list_source() -> Source:
        journal.check_free(force)  # before the source is read, which may take long
        data = _with_test(open_source(source, options or Options()), test_fraction)
        _check_alike(data, source)
        for split in data.splits:
            form_of(split.samples, shorter_side, raw)
        return data

    data = ranks.first(list_source)
    folders = []
    for number, split in enumerate(data.splits):
        order = philox.permutation(len(split.ids), seed, _ORDER, number)
        form = form_of(split.samples, shorter_side, raw)
        folders.append(Folder(target / split.name, split, data, form, shard_mb * 2**20, order))
    how = {"test_fraction": test_fraction, "shorter_side": shorter_side, "raw": raw, "shard_mb": shard_mb, "seed": seed}

    def begin() -> None:
        plan = Plan(digest_of(data), {name: str(value) for name, value in how.items()})
        with _writing(target):
            journal.begin(plan, force)
            for one in folders:
                one.path.mkdir(exist_ok=True)
            if not shorter_side:  # how small the pictures will be isn't known
                _check_room(target, folders)

    ranks.first(begin)
    with _writing(target):
        mine = _write(folders, journal, ranks, on_bad == "stop", progress)
    finished = {name: one for rank in range(ranks.size) for name, one in ranks.first(lambda: mine, rank).items()}

    def end() -> Summary:
        shards = [[finished[name] for name in one.shards] for one in folders]
        manifests = [one.manifest(its) for one, its in zip(folders, shards, strict=True)]
        with _writing(target):
            for one, its, manifest in zip(folders, shards, manifests, strict=True):
                one.write_rejected(its)
                manifest.write(one.path)
            journal.end()
        parts = zip(folders, manifests, shards, strict=True)
        return Summary(tuple(Packed.of(one.path, manifest, its) for one, manifest, its in parts))

    return ranks.first(end)


def _write(
    folders: Sequence[Folder], journal: Journal, ranks: Ranks, stop: bool, progress: Callable[[int, int], None] | None
) -> dict[str, Finished]:
    """See to it that this rank's shards are there; what is to be known of them, by name."""
    shards = [(folder, shard) for folder in folders for shard in range(len(folder.shards))]
    total = sum(folder.samples(shard) for folder, shard in shards)
    shards = shards[ranks.rank :: ranks.size]
    share, done = sum(folder.samples(shard) for folder, shard in shards), 0

    def look(samples: int, rejected: Sequence[Rejected]) -> None:
        nonlocal done
        if stop and rejected:
            raise DataError(f"{rejected[0].name}: {rejected[0].reason}; mend it, or use --on-bad reject")
        done += samples
        if progress is not None:
            progress(total * done // share, total)

    threads = ranks.threads()
    finished: dict[str, Finished] = {}
    with ThreadPoolExecutor(threads) as pool:
        for folder, shard in shards:
            name = folder.shards[shard]
            found = folder.kept(shard, journal)
            if found is not None:
                look(folder.samples(shard), found.rejected)
            else:
                found = folder.write(shard, pool, 2 * threads, lambda part: look(len(part.kept), part.rejected))
                journal.write(name, found)
            finished[name] = found
    return finished


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """An error of the system in the block becomes a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{target} can't be written ({error}); make room there and give the same command again: it goes on with "
            "the shards that are finished. Or name another folder"
        ) from error


def _check_room(target: Path, folders: Sequence[Folder]) -> None:
    """DataError where more is still to be written than there is room for."""
    wanted = sum(folder.nbytes for folder in folders)
    there = sum(path.stat().st_size for folder in folders for path in folder.path.glob("*.h5"))
    free = shutil.disk_usage(target).free
    if wanted - there > free:
        raise DataError(
            f"{target} has room for {free / 1e6:,.1f} MB, and about {(wanted - there) / 1e6:,.1f} MB are still to be "
            "written; make room there, or name another folder"
        )


def _check_alike(data: Source, name: str) -> None:
    """DataError where one network couldn't be trained on one part and tested on the other."""
    kinds = [
        (split.samples.shape, getattr(split.samples, "codec", ""), type(split.labels) is Lists) for split in data.splits
    ]
    if len(set(kinds)) > 1:
        shapes = " and ".join("x".join(map(str, shape)) or "pictures" for shape, *_ in kinds)
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
        Split(name, chosen(whole.samples, numbers), whole.labels[numbers], whole.ids[numbers])
        for name, numbers in parts.items()
    ]
    return replace(source, splits=splits)
