"""A data set of any size that takes little room: real shards whose samples were never written.

Labels, ids, offsets and checksums are those of a packed set, so that all is checked as ever; the records are holes in
the files, read as zeros. All records have one length, so that one checksum serves all whole blocks.
"""

import sys
from pathlib import Path
from uuid import UUID

import h5py
import numpy as np
from isal.isal_zlib import crc32
from msgspec.structs import asdict, replace

from dpnn.data import shards
from dpnn.data.manifest import Content, Manifest, Shard

SHARDS, SAMPLES = 1600, 21250
"""34 million samples, in 1.7 TB, as YouTube-8M has them."""
NUMBERS, FRAMES = 1152, 43


def write_sparse(
    folder: Path,
    n_shards: int = SHARDS,
    samples: int = SAMPLES,
    block: int = 64,
    classes: int = 1000,
) -> Manifest:
    """Write `n_shards` shards of `samples` records of frames each into `folder`; their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    record_nbytes = NUMBERS * FRAMES
    content = Content(
        kind="encoded", codec="frames", shape=(NUMBERS,), labels="single", num_classes=classes, block=block
    )
    crcs = np.full(-(-samples // block), crc32(bytes(block * record_nbytes)), np.uint32)
    crcs[-1] = crc32(bytes(((samples - 1) % block + 1) * record_nbytes))
    offsets = np.arange(samples + 1, dtype=np.int64) * record_nbytes
    counts = np.zeros(classes, np.int64)
    entries = []
    for number in range(n_shards):
        rng = np.random.default_rng(number)
        labels = rng.integers(0, classes, samples, np.int32)
        counts += np.bincount(labels, minlength=classes)
        ids = rng.permutation(samples).astype(np.uint64) + np.uint64(number * samples)
        path = folder / f"train-{number:05d}-of-{n_shards:05d}.h5"
        entries.append(_write(path, content, {"offsets": offsets, "y": labels, "id": ids, "block_crc32": crcs}, number))
    manifest = Manifest(
        **asdict(content), samples=n_shards * samples, histogram=tuple(counts.tolist()),
        mean=(127.5,) * NUMBERS, std=(64.0,) * NUMBERS, shards=tuple(entries),
    )  # fmt: skip
    manifest.write(folder)
    return manifest


def _write(path: Path, content: Content, rest: dict[str, np.ndarray], number: int) -> Shard:
    samples, nbytes = len(rest["y"]), int(rest["offsets"][-1])
    name = UUID(int=number + 1).hex
    with h5py.File(path, "w", libver=("v110", "v110"), alignment_threshold=65536, alignment_interval=4096) as file:
        payload = file.create_dataset(shards.payload_name(content), (nbytes,), "uint8", fill_time="never")
        payload[-1] = 0  # HDF5 sets room aside when the first byte is written, the file system none for the others
        for dataset, values in rest.items():
            file.create_dataset(dataset, data=values)
        file.attrs.update(shards.attributes(content, samples, name))
        offset = payload.id.get_offset()
    shard = Shard(
        name=path.name, samples=samples, bytes=path.stat().st_size, uuid=name, digest="",
        payload_offset=offset, payload_bytes=nbytes,
    )  # fmt: skip
    file_number = shards.open_shard(path)
    with open(file_number, closefd=True):
        return replace(shard, digest=shards.read_outside(file_number, path, shard).digest)


if __name__ == "__main__":
    write_sparse(Path(sys.argv[1]))
