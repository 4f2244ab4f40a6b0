"""Writing one shard."""

import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from dpnn.data import shards
from dpnn.data.durable import replacing, sync
from dpnn.data.labels import Labels, Lists, check_labels
from dpnn.data.manifest import Content, Shard

Array = NDArray[Any]
Block = Array | Sequence[bytes]


def write_shard(
    path: Path, content: Content, labels: Labels, ids: Array, blocks: Iterable[Block], lengths: Array | None = None
) -> Shard:
    """Write a shard under a temporary name, sync it, read it back, and only then let it have its name.

    `labels`, `ids` (uint64): of all its samples. `blocks`: `content.block` samples each (fewer only in the last one),
    as an array or as records of bytes; `lengths` are then the bytes of every record. Returns its entry in the manifest.
    DataError where a label is out of range.
    """
    check_labels(labels, content.num_classes, str(path))
    rest = {"id": np.asarray(ids, np.uint64)}
    if isinstance(labels, Lists):
        rest |= {"y_indptr": labels.indptr.astype(np.int64), "y_indices": labels.indices.astype(np.int32)}
    else:
        rest["y"] = labels.astype(np.int32)
    shape: tuple[int, ...]
    if lengths is not None:
        rest["offsets"] = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        shape, dtype = (int(rest["offsets"][-1]),), "uint8"
    else:
        shape, dtype = (len(ids), *content.shape), content.dtype
    name = uuid.uuid4().hex
    with replacing(path) as temporary:
        with h5py.File(
            temporary, "w", libver=("v110", "v110"), locking=False, alignment_threshold=65536, alignment_interval=4096
        ) as file:
            payload = file.create_dataset(shards.payload_name(content), shape, dtype, fill_time="never")
            rest["block_crc32"] = _write_blocks(payload, blocks)
            for dataset, values in rest.items():
                file.create_dataset(dataset, data=values)
            said = shards.attributes(content, len(ids), name)
            complete = said.pop("complete")
            file.attrs.update(said)
            file.flush()
            file.attrs["complete"] = complete
            offset, nbytes = payload.id.get_offset(), payload.nbytes
        sync(temporary)
        shard = Shard(
            name=path.name, samples=len(ids), bytes=temporary.stat().st_size, uuid=name, digest="",
            payload_offset=offset, payload_bytes=nbytes,
        )  # fmt: skip
        return _verified(temporary, content, shard)


def _write_blocks(payload: Any, blocks: Iterable[Block]) -> Array:
    """Fill the dataset; the CRC of each block, as uint32."""
    crcs, written = [], 0
    for block in blocks:
        if isinstance(block, np.ndarray):
            data = np.ascontiguousarray(block, payload.dtype)
        else:
            data = np.frombuffer(b"".join(block), np.uint8)
        payload[written : written + len(data)] = data
        crcs.append(crc32(data.data.cast("B")))
        written += len(data)
    if written != len(payload):
        raise ValueError(f"the blocks hold {written} of {len(payload)} rows of {payload.name}")
    return np.array(crcs, np.uint32)


def _verified(path: Path, content: Content, shard: Shard) -> Shard:
    """The entry with its digest, after the whole file was read back and checked as a reader does."""
    file = shards.open_shard(path)
    try:
        outside = shards.read_outside(file, path, shard)
        shard = msgspec.structs.replace(shard, digest=outside.digest)
        index = shards.read_index(outside, shards.read_layout(path, content, shard), path, content, shard)
        for block in range(len(index.crcs)):
            lo, hi = shards.block_range(content, shard, index, block)
            data = memoryview(bytearray(hi - lo))
            shards.read_exactly(file, data, shard.payload_offset + lo, path)
            shards.check_block(data, path, content, index, block)
    finally:
        os.close(file)
    return shard
