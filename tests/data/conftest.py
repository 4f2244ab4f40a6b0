"""Folders of shards with contents that tell where they come from."""

import itertools
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from dpnn import native
from dpnn.data.labels import Lists, histogram
from dpnn.data.manifest import Content, Manifest
from dpnn.data.view import base
from dpnn.data.writer import write_shard


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
