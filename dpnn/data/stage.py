"""Copying shards to local disk before training. What is copied is verified, and what is there and right stays.

Any number of ranks, and of jobs, may copy into one folder at the same time: a shard gets its name when it is whole.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from dpnn.data import shards
from dpnn.data.durable import replacing
from dpnn.data.manifest import NAME, Manifest, Shard
from dpnn.data.owners import held
from dpnn.data.reader import ShardReader
from dpnn.errors import DataError

_COPY_NBYTES = 16 << 20
"""About what is copied at a time: whole blocks."""
_LEFT_S = 3600.0
"""A file under a temporary name that nobody has written to for so long was left by a killed process."""
_PERIOD_S = 5.0
"""From one word on the progress to the next."""

Tell = Callable[[str], None]


def staged_folder(stage: str, folder: str, manifest: Manifest) -> Path:
    """Where the shards of `folder` are copied to: data that differ never meet in one folder."""
    return Path(stage) / f"{Path(folder).resolve().name}-{manifest.digest}"


def prepare_stage(source: str, target: Path, manifest: Manifest, wanted: Sequence[int]) -> None:
    """Make the folder, with its manifest; DataError where there is no room for the wanted shards that it hasn't."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in target.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LEFT_S:
                    path.unlink()
        there = held(target, manifest)
        needed = sum(manifest.shards[number].bytes for number in wanted if not there[number])
        room = os.statvfs(target)
        free = room.f_bavail * room.f_frsize
        if needed > free:
            raise DataError(
                f"data.stage: {target} has room for {free / 1e9:,.2f} GB, and the shards of {source} that are to be "
                f"copied there take {needed / 1e9:,.2f} GB; make room, name another folder, or leave data.stage out"
            )
        if not (target / NAME).exists():
            manifest.write(target)
    except OSError as error:
        raise DataError(f"data.stage: {target} can't be written ({error.strerror}); name another folder") from error


def stage(source: str, target: Path, manifest: Manifest, wanted: Sequence[int], tell: Tell) -> Iterator[None]:
    """Copy the wanted shards that `target` hasn't, or hasn't right, one for each turn.

    `tell` is given a line on the progress. DataError naming a shard that can't be read, isn't right, or can't be
    written.
    """
    there, staged = held(target, manifest), ShardReader(target, manifest)
    total = sum(manifest.shards[number].bytes for number in wanted)
    done, copied = 0, 0
    begin = told = time.monotonic()
    try:
        for number in wanted:
            shard = manifest.shards[number]
            if not (there[number] and _is_right(staged, number)):
                _copy(Path(source) / shard.name, target / shard.name, manifest, shard)
                copied += shard.bytes
            done += shard.bytes
            now = time.monotonic()
            if now - told > _PERIOD_S or (number == wanted[-1] and copied):
                rate = copied / max(now - begin, 1e-9)
                tell(f"{done / 1e9:,.2f} of {total / 1e9:,.2f} GB, {rate / 1e6:,.0f} MB/s")
                told = now
            yield
    finally:
        staged.close()


def _is_right(staged: ShardReader, number: int) -> bool:
    """Whether a staged shard is what was packed, but for its samples: these are verified whenever they are read."""
    try:
        staged.check(number)
    except DataError:
        return False
    return True


def _copy(source: Path, target: Path, manifest: Manifest, shard: Shard) -> None:
    """Copy a shard, verifying all of it on the way."""
    file = shards.open_shard(source)
    try:
        outside = shards.read_outside(file, source, shard)
        shards.check_digest(outside, source, shard)
        index = shards.read_index(outside, shards.read_layout(source, manifest, shard), source, manifest, shard)
        with replacing(target) as temporary, temporary.open("wb") as out:
            out.write(outside.head)
            for first, cuts in _pieces(manifest, shard, index):
                data = memoryview(bytearray(cuts[-1] - cuts[0]))
                for block, (lo, hi) in enumerate(pairwise(cuts), first):
                    piece = data[lo - cuts[0] : hi - cuts[0]]
                    crc = shards.read_checked(file, piece, shard.payload_offset + lo, source)
                    if found := shards.damage(crc, manifest, index, block):
                        raise shards.refusal(source, manifest, found)
                out.write(data)
            out.write(outside.tail)
    except OSError as error:
        raise DataError(f"data.stage: {target} can't be written ({error.strerror}); make room there") from error
    finally:
        os.close(file)


def _pieces(manifest: Manifest, shard: Shard, index: shards.Index) -> Iterator[tuple[int, list[int]]]:
    """A shard's blocks, some at a time: the first of them, and where in the payload each begins, and the last ends."""
    first, cuts = 0, [0]
    for block in range(len(index.crcs)):
        cuts.append(shards.block_range(manifest, shard, index, block)[1])
        if cuts[-1] - cuts[0] >= _COPY_NBYTES:
            yield first, cuts
            first, cuts = block + 1, cuts[-1:]
    if len(cuts) > 1:
        yield first, cuts
