"""Reading a folder of shards: indexes and descriptors kept as far as memory and the system allow."""

import errno
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpnn.data import shards
from dpnn.data.manifest import Manifest
from dpnn.data.shards import Index, Layout, Outside
from dpnn.errors import DataError

Array = NDArray[Any]
T = TypeVar("T")
Read = Callable[[int, memoryview, int, Path], T]

OPEN_FILES = 64
_ASKED_NBYTES = 1 << 19
"""Linux reads no more than a device's longest request ahead at a time."""
INDEX_NBYTES = 32 << 20
"""Indexes take 12 bytes a sample and more: beyond this, the one that wasn't used longest is given up, and read again
when it is needed. The system keeps what was read as long as it has room."""

MOST_WHOLE = 256
"""Shards that a rank checks in whole before training: opening them by HDF5 takes most of the time."""


def check_shards(
    folder: str | Path, manifest: Manifest, replica: int = 0, replicas: int = 1, among: Sequence[int] | None = None
) -> None:
    """Check what can be known before training of the shards replica, replica + replicas, ...: all but the payload.

    `among`: of these shards; None: of all. Beyond `MOST_WHOLE` shards only size and digest are compared: these say that
    a shard is what `dpnn pack` has verified, and its first reader checks the rest. DataError naming file, dataset and
    index of the first thing that is wrong. Replica 0 also looks for shards that the manifest doesn't name; files under
    temporary names are what a killed `dpnn pack` left, and are ignored.
    """
    if replica == 0:
        named = {shard.name for shard in manifest.shards}
        extra = sorted(path.name for path in Path(folder).glob("*.h5") if path.name not in named)
        if extra:
            raise DataError(
                f"{folder} holds {extra[0]}, which its manifest doesn't name; remove it, or pack the data again"
            )
    reader = ShardReader(folder, manifest)
    try:
        mine = (range(len(manifest.shards)) if among is None else among)[replica::replicas]
        for number in mine[:MOST_WHOLE]:
            reader.check(number)
        for number in mine[MOST_WHOLE:]:
            reader.compare(number)
    finally:
        reader.close()


class ShardReader:
    """Reads samples, blocks and indexes of the shards that a manifest names, by their numbers in it.

    Every method raises DataError naming the file where it is missing, damaged or shorter than it was. A reader is for
    one thread. HDF5 is used for a shard's first index only: after that its place is known.
    """

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        self._manifest = manifest
        self._paths = [Path(folder) / shard.name for shard in manifest.shards]
        self._files: OrderedDict[int, int] = OrderedDict()
        self._layouts: dict[int, Layout] = {}
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._index_nbytes = 0

    def check(self, number: int) -> None:
        """Check a shard: its size, digest, structure, labels, ids."""
        self._read_index(number)

    def compare(self, number: int) -> Outside:
        """Compare a shard's size and digest with the manifest's; all of it but the payload."""
        path, shard = self._paths[number], self._manifest.shards[number]
        outside = shards.read_outside(self._file(number), path, shard)
        shards.check_digest(outside, path, shard)
        return outside

    def index(self, number: int) -> Index:
        """A shard's labels, ids and checksums."""
        index = self._indexes.get(number)
        if index is not None:
            self._indexes.move_to_end(number)
            return index
        index = self._indexes[number] = self._read_index(number)
        self._index_nbytes += index.nbytes
        while self._index_nbytes > INDEX_NBYTES and len(self._indexes) > 1:
            self._index_nbytes -= self._indexes.popitem(last=False)[1].nbytes
        return index

    def starts(self, number: int, lo: int, hi: int) -> Array:
        """Where the samples [lo, hi) of a shard begin, seen from the first of them, and where the last ends, in bytes.

        int64[hi - lo + 1].
        """
        offsets = self._offsets(number)
        if offsets is None:
            return np.arange(hi - lo + 1) * self._manifest.sample_nbytes
        found: Array = offsets[lo : hi + 1] - offsets[lo]
        return found

    def span(self, number: int, lo: int, hi: int) -> tuple[int, int]:
        """Which bytes of a shard's payload are those of its samples [lo, hi)."""
        if self._manifest.kind == "raw":
            return lo * self._manifest.sample_nbytes, hi * self._manifest.sample_nbytes
        if number not in self._indexes and number in self._layouts:
            # For single samples of very many shards, whose indexes can't all be kept.
            found = np.empty(hi - lo + 1, np.int64)
            place = self._layouts[number]["offsets"].offset
            self._read(number, place + lo * found.itemsize, found.data.cast("B"), shards.read_exactly)
            if 0 <= found[0] < found[-1] <= self._manifest.shards[number].payload_bytes:
                return int(found[0]), int(found[-1])
        offsets = self.index(number).offsets
        if offsets is None:
            raise ValueError(f"{self.path(number)} has encoded samples without offsets")
        return int(offsets[lo]), int(offsets[hi])

    def read_blocks(self, number: int, lo: int, hi: int, out: memoryview) -> dict[int, str]:
        """Read the samples [lo, hi), whole blocks, as they are stored; what is wrong with those whose CRC isn't right.

        The result has what to say of each damaged block, by its first sample. `out` has the bytes of `span`.
        """
        manifest, index = self._manifest, self.index(number)
        place, damaged = manifest.shards[number].payload_offset, {}
        base = begin = self.span(number, lo, lo + 1)[0]
        for first in range(lo, hi, manifest.block):
            end = self.span(number, lo, min(first + manifest.block, hi))[1]
            crc = self._read(number, place + begin, out[begin - base : end - base], shards.read_checked)
            begin = end
            found = shards.damage(crc, manifest, index, first // manifest.block)
            if found:
                damaged[first] = found
        return damaged

    def ahead(self, number: int, lo: int, hi: int) -> None:
        """Let the system read the samples [lo, hi) while something else is done: they will be asked for soon."""
        begin, end = self.span(number, lo, hi)
        place, file = self._manifest.shards[number].payload_offset, self._file(number)
        for at in range(begin, end, _ASKED_NBYTES):
            os.posix_fadvise(file, place + at, min(_ASKED_NBYTES, end - at), os.POSIX_FADV_WILLNEED)

    def refusal(self, number: int, found: str) -> DataError:
        """For what `read_blocks` has found in a shard."""
        return shards.refusal(self.path(number), self._manifest, found)

    def read_records(self, number: int, block: int) -> list[bytes]:
        """The samples of a block as they are stored; DataError where it is damaged."""
        lo = block * self._manifest.block
        hi = min(lo + self._manifest.block, self._manifest.shards[number].samples)
        cuts = self.starts(number, lo, hi).tolist()
        data = memoryview(bytearray(cuts[-1]))
        for found in self.read_blocks(number, lo, hi, data).values():
            raise self.refusal(number, found)
        return [bytes(data[a:b]) for a, b in itertools.pairwise(cuts)]

    def read_samples(self, number: int, lo: int, hi: int, out: memoryview) -> None:
        """Read the samples [lo, hi) as they are stored, unchecked: there is a CRC for a whole block only."""
        self._read(
            number,
            self._manifest.shards[number].payload_offset + self.span(number, lo, hi)[0],
            out,
            shards.read_exactly,
        )

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self._paths[number]

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _offsets(self, number: int) -> Array | None:
        """Where a shard's records begin; None for raw samples, whose index isn't needed for that."""
        return None if self._manifest.kind == "raw" else self.index(number).offsets

    def _read_index(self, number: int) -> Index:
        manifest, path, outside = self._manifest, self._paths[number], self.compare(number)
        if number in self._layouts:  # the digest says that all is as it was when it was checked
            return shards.index_of(outside, self._layouts[number], manifest)
        shard = manifest.shards[number]
        layout = shards.read_layout(path, manifest, shard)
        index = shards.read_index(outside, layout, path, manifest, shard)
        self._layouts[number] = layout
        return index

    def _read(self, number: int, offset: int, out: memoryview, read: Read[T]) -> T:
        """Read bytes of a shard's file; what `read` makes of them."""
        path = self._paths[number]
        try:
            return read(self._file(number), out, offset, path)
        except DataError as error:
            # A network file system gives up a handle when its server restarts: opening again mends that.
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.ESTALE:
                raise
            os.close(self._files.pop(number))
            return read(self._file(number), out, offset, path)

    def _file(self, number: int) -> int:
        """A descriptor of the shard's file; at most OPEN_FILES are open."""
        file = self._files.get(number)
        if file is not None:
            self._files.move_to_end(number)
            return file
        if len(self._files) == OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        file = self._files[number] = shards.open_shard(self._paths[number])
        return file
