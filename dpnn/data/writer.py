"""Writing one shard: the payload streams to its place in the file, then HDF5's structures are put round it.

HDF5 can't say where a dataset lies before its length is known, and that is known only when all samples were read and
the bad ones left out. So HDF5 builds the file in memory, with a hole for the payload, and its bytes are copied.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import h5py
import msgspec
import numpy as np
from h5py import h5d, h5p, h5s, h5t
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from dpnn.data import shards
from dpnn.data.durable import replacing
from dpnn.data.labels import Labels, Lists, check_labels
from dpnn.data.manifest import Content, Shard

Array = NDArray[Any]
Samples = Array | Sequence[bytes]

_PLACE = 4096
"""Where HDF5 puts the payload, aligned; one of less than 64 KiB it puts elsewhere, and then it is moved."""


def write_shard(
    path: Path,
    content: Content,
    labels: Labels,
    ids: Array,
    samples: Iterable[Samples],
    kept: Sequence[bool] | None = None,
) -> Shard:
    """Write a shard under a temporary name, sync it, read it back, and only then let it have its name.

    `labels`, `ids` (uint64): of all samples. `samples`: any number of them at a time, as an array or as records of
    bytes. `kept`: which of them the samples are, where some are left out; it is read when all samples were drawn.
    Returns its entry in the manifest. DataError where a label is out of range.
    """
    check_labels(labels, content.num_classes, str(path))
    with replacing(path) as temporary:
        with open(temporary, "w+b") as file:
            file.seek(_PLACE)
            payload = _Payload(file, content)
            for some in samples:
                payload.add(some)
            if kept is not None:
                chosen = np.flatnonzero(kept)
                labels, ids = labels[chosen], ids[chosen]
            rest = payload.end(len(ids))
            rest["id"] = np.asarray(ids, np.uint64)
            if isinstance(labels, Lists):
                rest |= {"y_indptr": labels.indptr.astype(np.int64), "y_indices": labels.indices.astype(np.int32)}
            else:
                rest["y"] = labels.astype(np.int32)
            name = _name(content, rest)
            offset = _surround(file, payload.nbytes, content, len(ids), name, rest)
        shard = Shard(
            name=path.name, samples=len(ids), bytes=temporary.stat().st_size, uuid=name, digest="",
            payload_offset=offset, payload_bytes=payload.nbytes,
        )  # fmt: skip
        return verify(temporary, content, shard)


def verify(path: Path, content: Content, shard: Shard) -> Shard:
    """The entry, after the whole file was read and checked as a reader does; with its digest, where it has none yet.

    DataError naming what isn't as it was packed.
    """
    file = shards.open_shard(path)
    try:
        outside = shards.read_outside(file, path, shard)
        if shard.digest:
            shards.check_digest(outside, path, shard)
        else:
            shard = msgspec.structs.replace(shard, digest=outside.digest)
        index = shards.read_index(outside, shards.read_layout(path, content, shard), path, content, shard)
        for block in range(len(index.crcs)):
            lo, hi = shards.block_range(content, shard, index, block)
            data = memoryview(bytearray(hi - lo))
            crc = shards.read_checked(file, data, shard.payload_offset + lo, path)
            if found := shards.damage(crc, content, index, block):
                raise shards.refusal(path, content, found)
    finally:
        os.close(file)
    return shard


class _Payload:
    """The samples, end to end in a file from where it stands, and the CRC of each block."""

    def __init__(self, file: IO[bytes], content: Content) -> None:
        self._file, self._content = file, content
        self._lengths: list[int] = []
        self._n, self.nbytes = 0, 0
        self._crcs: list[int] = []

    def add(self, samples: Samples) -> None:
        """More samples, any number."""
        if isinstance(samples, np.ndarray):
            samples = np.ascontiguousarray(samples, self._content.dtype)
        done = 0
        while done < len(samples):
            filled = self._n % self._content.block
            some = samples[done : done + self._content.block - filled]
            if isinstance(some, np.ndarray):
                data = some.data.cast("B")
            else:
                self._lengths += map(len, some)
                data = memoryview(b"".join(some))
            if not filled:
                self._crcs.append(0)
            self._crcs[-1] = crc32(data, self._crcs[-1])
            self._file.write(data)
            self.nbytes += len(data)
            self._n += len(some)
            done += len(some)

    def end(self, samples: int) -> dict[str, Array]:
        """The datasets that tell where the samples and blocks are."""
        if self._n != samples:
            raise ValueError(f"{self._n} samples were given to be written, and {samples} labels and ids")
        rest = {"block_crc32": np.array(self._crcs, np.uint32)}
        if self._content.kind == "encoded":
            rest["offsets"] = np.fromiter(accumulate(self._lengths, initial=0), np.int64, samples + 1)
        return rest


def _name(content: Content, rest: dict[str, Array]) -> str:
    """The uuid: of what the shard holds, so that packing the same again gives the same files."""
    digest = hashlib.sha256(msgspec.json.encode(content))
    for name, values in sorted(rest.items()):
        digest.update(f"{name} {values.nbytes}".encode())
        digest.update(values.data.cast("B") if values.size else b"")
    return digest.hexdigest()[:32]


def _surround(file: IO[bytes], nbytes: int, content: Content, samples: int, name: str, rest: dict[str, Array]) -> int:
    """Write all of a shard but its payload, which is there at _PLACE; where the payload begins."""
    raw = content.kind == "raw"
    shape = (samples, *content.shape) if raw else (nbytes,)
    with os.fdopen(os.memfd_create("shard"), "w+b", buffering=0) as memory:
        with h5py.File(
            memory, "w", libver=("v110", "v110"), alignment_threshold=65536, alignment_interval=4096
        ) as hdf5:
            offset = _hole(hdf5, shards.payload_name(content), shape, content.dtype)
            for dataset, values in rest.items():
                hdf5.create_dataset(dataset, data=values)
            hdf5.attrs.update(shards.attributes(content, samples, name))
        if offset != _PLACE:
            file.seek(_PLACE)
            payload = file.read(nbytes)
            file.seek(offset)
            file.write(payload)
        end = memory.seek(0, os.SEEK_END)
        for lo, hi in ((0, offset), (offset + nbytes, end)):
            memory.seek(lo)
            file.seek(lo)
            file.write(memory.read(hi - lo))
        file.truncate(end)
    return offset


def _hole(file: Any, name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Create a dataset that has its place, but is never written; where it begins."""
    how = h5p.create(h5p.DATASET_CREATE)
    how.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    how.set_fill_time(h5d.FILL_TIME_NEVER)
    how.set_obj_track_times(False)  # or no two files would be the same
    kind = h5t.py_create(np.dtype(dtype), logical=True)
    offset: int = h5d.create(file.id, name.encode(), kind, h5s.create_simple(shape), how).get_offset()
    return offset
