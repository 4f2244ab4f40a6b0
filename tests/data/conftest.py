"""Folders of shards with contents that tell where they come from."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from dpnn import native
from dpnn.data.labels import Lists, histogram
from dpnn.data.manifest import Content, Manifest
from dpnn.data.view import base
from dpnn.data.writer import write_shard


def take(loader, n):
    """Copies of the next batches."""
    batches = []
    for _ in range(n):
        batch = loader.next()
        batches.append(batch._replace(x=batch.x.copy(), labels=batch.labels.copy(), ids=batch.ids.copy()))
        loader.release(batch)
    return batches


def flip(path, at):
    """Change a bit of the byte at a place in a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def by_threads(view, source, slots, choices, cuts):
    """What a view makes of the samples, each piece between two cuts by a thread."""
    out = np.empty((len(slots), *view.shape), np.float32)

    def piece(lo, hi):
        view.put(source, slots[lo:hi], choices[slots[lo:hi]], out[lo:hi])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(piece, cuts[:-1], cuts[1:]))
    return out


@pytest.fixture
def write_folder(tmp_path):
    """Write shards of `counts` samples, with a manifest.

    The result has folder, manifest and, over all shards: x, labels, ids.
    """

    def write(counts=(37, 5, 64), block=8, shape=(4, 3, 2), dtype="uint8", multi=False, classes=7, name="train"):
        rng = np.random.default_rng(0)
        n = sum(counts)
        x = rng.integers(0, 256, (n, *shape)).astype(dtype)
        ids = rng.permutation(10 * n)[:n].astype(np.uint64)
        if multi:
            labels = Lists.from_dense(rng.random((n, classes)) < 0.3)
        else:
            labels = rng.integers(0, classes, n).astype(np.int32)
        kind = "multi" if multi else "single"
        content = Content(kind="raw", shape=shape, dtype=dtype, labels=kind, num_classes=classes, block=block)
        folder = tmp_path / name
        folder.mkdir()
        cuts = np.concatenate(([0], np.cumsum(counts)))
        shards = []
        for i, (lo, hi) in enumerate(itertools.pairwise(cuts)):
            path = folder / f"{name}-{i:05d}-of-{len(counts):05d}.h5"
            blocks = [x[a : min(a + block, hi)] for a in range(lo, hi, block)]
            shards.append(write_shard(path, content, labels[lo:hi], ids[lo:hi], blocks))
        values = x.reshape(-1, shape[-1]).astype(np.float64)
        manifest = Manifest(
            **msgspec.structs.asdict(content),
            samples=n,
            histogram=tuple(histogram(labels, classes)),
            mean=tuple(values.mean(0).tolist()),
            std=tuple(values.std(0).tolist()),
            shards=tuple(shards),
        )
        manifest.write(folder)
        return SimpleNamespace(folder=folder, manifest=manifest, x=x, labels=labels, ids=ids, cuts=cuts)

    return write


@pytest.fixture(params=["numpy", *native.LEVELS])
def by(request, monkeypatch):
    """Which kernels make the samples."""
    if request.param == "numpy":
        monkeypatch.setattr(base, "_kernel", lambda name: None)
        return request.param
    if native.LEVELS.index(request.param) > native.LEVELS.index(native._level()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(native, "_level", lambda: request.param)
    monkeypatch.setattr(base, "_kernel", native.alone.__wrapped__)
    return request.param
