"""`dpnn data show`: what a folder of shards holds, in words and as a sheet of samples as the network sees them."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn import philox
from dpnn.data.manifest import Manifest, parts
from dpnn.data.reader import ShardReader
from dpnn.data.show.pictures import levels, picture
from dpnn.data.show.sheet import sheet
from dpnn.data.show.summary import class_name, summary
from dpnn.data.view import BadSample, View, view_of
from dpnn.errors import JobError

__all__ = ["show"]

Array = NDArray[Any]

_VERSIONS = 4
_MOST_NAMES = 3
_CHOICE = zlib.crc32(b"show")


def show(
    folder: str | Path,
    out: str | Path,
    *,
    samples: int = 24,
    augment: str = "none",
    size: int = 0,
    frames: int = 0,
    seed: int = 0,
) -> str:
    """Write a sheet of some samples to the file `out` (.png), and return what is to be printed.

    `folder`: of shards, or one that holds train/ and test/; the sheet is of the first. `augment`, `size`, `frames`,
    `seed`: as in a job; so the sheet has what training sees in its first epochs. `samples` are chosen by `seed`, with
    no regard to their classes. JobError and DataError as training would raise them.
    """
    found = [(part, Manifest.read(part)) for part in parts(Path(folder))]
    if samples < 1:
        raise JobError(f"samples = {samples} is less than 1")
    part, manifest = found[0]
    views = [
        view_of(
            manifest, augment=augment, size=size, frames=frames, seed=seed,
            mean=manifest.mean, std=manifest.std, training=training,
        )
        for training in (False, True)
    ]  # fmt: skip
    source, ids, captions = _read(part, manifest, _chosen(manifest.samples, samples, seed))
    black, white = levels(source, manifest.dtype) if isinstance(source, np.ndarray) else (0.0, 255.0)
    varied = augment != "none" or manifest.codec == "frames"
    looks = [(views[0], 0), *((views[1], epoch) for epoch in range(_VERSIONS if varied else 0))]
    strips = []
    for slot, caption in enumerate(captions):
        try:
            seen = [_seen(view, manifest, source, slot, ids, epoch) for view, epoch in looks]
            strips.append(([picture(sample, black, white) for sample in seen], caption))
        except BadSample as error:
            strips.append(([np.full((96, 96, 3), 200, np.uint8)], f"{caption}: {error.reason}"))
    how = f"evaluation sees it, then as training does in its epochs 0 to {_VERSIONS - 1}" if varied else "it is seen"
    title = f'{part}, augment = "{augment}": each sample as {how}'
    try:
        sheet(title, strips).save(out)
    except (OSError, ValueError) as error:
        raise JobError(f"{out} can't be written ({error}); name another file, as in --out samples.png") from error
    shape = "x".join(map(str, views[0].shape))
    told = f"{out}: {len(strips)} samples of {part} as the network sees them, {shape}"
    return "\n".join([*(summary(*one) for one in found), told])


def _chosen(of: int, n: int, seed: int) -> list[int]:
    """Some samples, each once; all where there are no more."""
    if n >= of:
        return list(range(of))
    words = philox.words(2 * n, seed, _CHOICE) % np.uint64(of)
    return list(dict.fromkeys(words.tolist()))[:n]


def _read(folder: Path, manifest: Manifest, numbers: list[int]) -> tuple[Any, Array, list[str]]:
    """Samples as stored (an array, or records), their ids and captions. Their blocks are read and checked."""
    reader = ShardReader(folder, manifest)
    firsts = np.cumsum([0, *manifest.counts])
    samples, ids, captions = [], [], []
    try:
        for number in numbers:
            shard = int(np.searchsorted(firsts, number, side="right")) - 1
            place = number - int(firsts[shard])
            block, row = divmod(place, manifest.block)
            samples.append(reader.read_records(shard, block)[row])
            index = reader.index(shard)
            ids.append(int(index.ids[place]))
            labels = index.labels[place : place + 1]
            classes = (labels if isinstance(labels, np.ndarray) else labels.indices).tolist()
            names = [class_name(manifest, k) for k in classes[:_MOST_NAMES]]
            more = f" and {len(classes) - _MOST_NAMES} more" if len(classes) > _MOST_NAMES else ""
            captions.append(f"{', '.join(names) or 'no label'}{more} (id {ids[-1]})")
    finally:
        reader.close()
    source: Any = [memoryview(record) for record in samples]
    if manifest.kind == "raw":
        source = np.frombuffer(b"".join(samples), manifest.dtype).reshape(-1, *manifest.shape)
    return source, np.array(ids, np.uint64), captions


def _seen(view: View, manifest: Manifest, source: Any, slot: int, ids: Array, epoch: int) -> Array:
    """A sample as the network sees it, but with the normalisation undone."""
    out = np.empty((1, *view.shape), np.float32)
    view.put(source, np.array([slot]), view.draw(ids[slot : slot + 1], epoch), out)
    std = np.array(manifest.std)
    seen: Array = out[0] * np.where(std > 0, std, 1.0) + np.array(manifest.mean)
    return seen
