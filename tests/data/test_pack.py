"""Every source becomes the same shards, and a wrong source is told by file and place."""

import gzip
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from dpnn.data import Loader, Manifest, Sampler, check_shards, view_of
from dpnn.data.pack import pack
from dpnn.data.pack.folder import block_size
from dpnn.data.pack.idx import read_folder, read_idx
from dpnn.errors import DataError, JobError

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"


def contents(folder):
    """All samples of a packed folder by id: (x as stored, label); checks the folder on the way."""
    manifest = Manifest.read(folder)
    check_shards(folder, manifest)
    sampler = Sampler(manifest.counts, manifest.block, 1, 16, 64, 0)
    channels = len(manifest.mean)
    view = view_of(manifest, mean=[0.0] * channels, std=[1.0] * channels)
    found = {}
    with Loader(folder, manifest, sampler, view=view, last=(0, sampler.steps - 1)) as loader:
        for _ in range(sampler.steps):
            batch = loader.next()
            x = batch.x.transpose(0, 2, 3, 1) if batch.x.ndim == 4 else batch.x
            found |= {int(i): (a.copy(), b.copy()) for i, a, b in zip(batch.ids, x, batch.labels, strict=True)}
            loader.release(batch)
    assert len(found) == manifest.samples
    return found


def write_idx(path, array, code=0x08):
    data = bytes([0, 0, code, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (300, 5, 4, 3)).astype(np.uint8),
        "y_train": rng.integers(0, 6, 300),
        "x_test": rng.integers(0, 256, (50, 5, 4, 3)).astype(np.uint8),
        "y_test": rng.integers(0, 6, 50),
    }


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return str(tmp_path / "data.npz")

    return write


@pytest.fixture
def idx_folder(tmp_path):
    """An idx folder with a training part only."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 4, 3)).astype(np.uint8), rng.integers(0, 5, 20).astype(np.uint8)
    write_idx(folder / "train-images-idx3-ubyte", images)
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels)
    return folder


def test_an_npz_file_comes_back_sample_by_sample(tmp_path, npz, arrays):
    progress = []
    summary = pack(npz(**arrays), tmp_path / "out", progress=lambda done, total: progress.append((done, total)))
    train, test = contents(tmp_path / "out/train"), contents(tmp_path / "out/test")
    assert sorted(train) == list(range(300))
    assert sorted(test) == list(range(300, 350))
    for number, (x, label) in (train | test).items():
        part, at = ("train", number) if number < 300 else ("test", number - 300)
        assert np.array_equal(x, arrays[f"x_{part}"][at])
        assert label == arrays[f"y_{part}"][at]
    assert progress[-1] == (350, 350)
    assert progress == sorted(progress)
    manifest = summary.parts[0].manifest
    assert manifest == Manifest.read(tmp_path / "out/train")
    assert manifest.mean == pytest.approx(arrays["x_train"].mean((0, 1, 2)))
    assert manifest.std == pytest.approx(arrays["x_train"].std((0, 1, 2)))
    assert list(manifest.histogram) == np.bincount(arrays["y_train"], minlength=6).tolist()
    assert str(summary).splitlines() == [
        f"{tmp_path}/out/train: 300 samples of 5x4x3 uint8, 6 classes, 0.0 MB in 1 shard",
        f"{tmp_path}/out/test: 50 samples of 5x4x3 uint8, 6 classes, 0.0 MB in 1 shard",
    ]


def test_samples_are_permuted_over_all_shards_and_cut_at_blocks(tmp_path, npz, arrays):
    pack(npz(**arrays), tmp_path / "out", shard_mb=0.004)
    manifest = Manifest.read(tmp_path / "out/train")
    assert [shard.name for shard in manifest.shards] == [f"train-{i:05d}-of-00004.h5" for i in range(4)]
    assert manifest.block == 4
    assert all(n % 4 == 0 for n in manifest.counts[:-1])
    assert max(manifest.counts) - min(manifest.counts) <= 4
    sampler = Sampler(manifest.counts, manifest.block, 1, 75, 75, 0, shuffle=False)
    with Loader(tmp_path / "out/train", manifest, sampler) as loader:
        first = loader.next().ids
    assert first.min() < 40
    assert first.max() > 260
    assert abs(np.diff(first.astype(int))).mean() > 50


def test_several_labels_a_sample_are_packed_as_lists(tmp_path, npz):
    rows = np.random.default_rng(0).random((40, 5)) < 0.4
    pack(npz(x=np.ones((40, 3), np.float32), y=rows), tmp_path / "out")
    assert not (tmp_path / "out/test").exists()
    for number, (_, labels) in contents(tmp_path / "out/train").items():
        assert np.array_equal(labels, rows[number])


@pytest.mark.parametrize(("given", "stored"), [
    (np.arange(24.0).reshape(4, 3, 2) / 7, np.float32),
    (np.arange(24).reshape(4, 6), np.uint8),
    (np.arange(24).reshape(4, 6) * 100 - 5, np.float32),
    (np.arange(24).reshape(4, 6) % 2 == 0, np.uint8),
    (np.arange(24).reshape(4, 6).astype(">f2"), np.float16),
])  # fmt: skip
def test_other_types_become_one_that_holds_them(tmp_path, npz, given, stored):
    pack(npz(x=given, y=np.arange(4)), tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out/train")
    assert manifest.dtype == np.dtype(stored).name
    assert manifest.shape == ((3, 2, 1) if given.ndim == 3 else (6,))
    for number, (x, _) in contents(tmp_path / "out/train").items():
        assert np.array_equal(x.reshape(given[number].shape), given[number].astype(np.float32))


@pytest.mark.parametrize(("change", "message"), [
    ({"y_test": None}, "has no array 'y_test', only x_train, y_train, x_test"),
    ({"x_train": None, "y_train": None}, "has no array 'x_train'"),
    ({"y_train": np.zeros(299, int)}, "x_train and .*y_train: 300 samples and 299 labels"),
    ({"y_train": np.zeros(300)}, "y_train is of type float64"),
    ({"y_train": np.r_[np.zeros(299, int), -1]}, r"y_train\[299\] = -1: a class is a number from 0 to"),
    ({"y_train": np.full((300, 2), 2)}, r"y_train\[0\]\[0\] = 2: labels \(samples, classes\) are 0 or 1"),
    ({"y_test": np.zeros((50, 6), int)}, "its parts differ"),
    ({"x_test": np.zeros((50, 5, 4, 1), np.uint8)}, r"its parts differ .* \(5x4x3 and 5x4x1\)"),
    ({"x_train": np.full((300, 2), 2**40)}, r"x_train holds integers from \d+ to \d+, which float32 can't hold"),
    ({"x_train": np.full((300, 2), "a")}, "x_train is of type <U1"),
    ({"x_train": np.zeros((300, 0))}, r"x_train has the shape \(300, 0\)"),
    ({"y_train": np.array([{}] * 300)}, "can't be read .*Object arrays"),
])  # fmt: skip
def test_a_wrong_npz_file_is_refused_by_array_and_index(tmp_path, npz, arrays, change, message):
    path = npz(**{name: array for name, array in (arrays | change).items() if array is not None})
    with pytest.raises(DataError, match=message) as raised:
        pack(path, tmp_path / "out")
    assert str(raised.value).startswith(path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_npz_file_is_refused(tmp_path, npz, arrays, part):
    path = npz(**arrays)
    os.truncate(path, int(os.path.getsize(path) * part))
    with pytest.raises(DataError, match=r"data\.npz can't be read"):
        pack(path, tmp_path / "out")


def test_digits_hold_out_a_fifth_for_ever(tmp_path):
    pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")
    pack("digits", tmp_path / "out", seed=3)
    train, test = contents(tmp_path / "out/train"), contents(tmp_path / "out/test")
    assert (len(train), len(test)) == (1438, 359)
    assert sorted(train | test) == list(range(1797))
    assert sorted(test)[:5] == [9, 15, 21, 34, 36]
    manifest = Manifest.read(tmp_path / "out/train")
    assert (manifest.shape, manifest.num_classes, manifest.block) == ((8, 8, 1), 10, 16)
    assert max(x.max() for x, _ in train.values()) == 16


def test_digits_without_scikit_learn_say_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(JobError, match=r"pip install dpnn\[digits\]"):
        pack("digits", tmp_path / "out")


def test_a_part_can_be_held_out_of_any_lone_source(tmp_path, npz, arrays):
    path = npz(x=arrays["x_train"], y=arrays["y_train"])
    pack(path, tmp_path / "out", test_fraction=0.1)
    train, test = contents(tmp_path / "out/train"), contents(tmp_path / "out/test")
    assert len(test) == 30
    for number, (x, label) in (train | test).items():
        assert np.array_equal(x, arrays["x_train"][number])
        assert label == arrays["y_train"][number]
    with pytest.raises(JobError, match=r"test_fraction = 1\.5 is not from 0"):
        pack(path, tmp_path / "other", test_fraction=1.5)
    with pytest.raises(DataError, match="leaves a part without samples"):
        pack(path, tmp_path / "other", test_fraction=0.001)
    with pytest.raises(JobError, match="has a test part of its own"):
        pack(npz(**arrays), tmp_path / "other", test_fraction=0.1)


def test_idx_files_are_packed(tmp_path, idx_folder):
    pack(str(idx_folder), tmp_path / "out")
    images, labels = (
        read_idx(idx_folder / "train-images-idx3-ubyte"),
        read_idx(idx_folder / "train-labels-idx1-ubyte.gz"),
    )
    found = contents(tmp_path / "out/train")
    for number, (x, label) in found.items():
        assert np.array_equal(x[..., 0], images[number])
        assert label == labels[number]
    assert not (tmp_path / "out/test").exists()


@pytest.mark.parametrize(
    ("code", "dtype"), [(8, ">u1"), (9, ">i1"), (0xB, ">i2"), (0xC, ">i4"), (0xD, ">f4"), (0xE, ">f8")]
)
def test_every_type_of_idx_file_is_read(tmp_path, code, dtype):
    array = np.arange(60).reshape(5, 4, 3).astype(dtype)
    write_idx(tmp_path / "a.gz", array, code)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("size", [0, 3, 9, 20, 60])
def test_a_truncated_idx_file_is_refused(tmp_path, suffix, size):
    path = tmp_path / f"a{suffix}"
    write_idx(path, np.random.default_rng(0).integers(0, 256, (9, 5, 4)).astype(np.uint8))
    os.truncate(path, size)
    with pytest.raises(DataError, match=rf"{path} (is truncated|can't be read|begins with)"):
        read_idx(path)


def test_an_idx_file_with_a_wrong_header_is_refused(tmp_path):
    path = tmp_path / "a"
    write_idx(path, np.zeros((2, 2), np.uint8))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"goes on behind the 4 bytes for \[2, 2\]"):
        read_idx(path)
    path.write_bytes(b"\x89PNG....")
    with pytest.raises(DataError, match="begins with 89 50 4e 47, so it is no idx file"):
        read_idx(path)
    write_idx(path, np.zeros((2, 2), np.uint8), code=0x0A)
    with pytest.raises(DataError, match="it is no idx file"):
        read_idx(path)


def test_idx_files_that_do_not_fit_are_refused(tmp_path, idx_folder):
    labels = idx_folder / "train-labels-idx1-ubyte.gz"
    write_idx(labels, np.zeros(19, np.uint8))
    with pytest.raises(DataError, match=r"20 samples and 19 labels"):
        pack(str(idx_folder), tmp_path / "out")
    labels.unlink()
    with pytest.raises(DataError, match=r"holds no file train-labels-idx"):
        pack(str(idx_folder), tmp_path / "out")


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"the MNIST files are not in {MNIST}")
def test_mnist_is_read():
    train, test = read_folder(MNIST).splits
    assert (len(train.ids), len(test.ids)) == (60_000, 10_000)
    assert train.samples.shape == (28, 28, 1)
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.samples.read(np.arange(100)).mean() == pytest.approx(33.3, abs=3)


def test_a_folder_that_holds_data_is_overwritten_only_by_force(tmp_path, npz, arrays):
    pack(npz(**arrays), tmp_path / "out", shard_mb=0.004)
    path = npz(x=arrays["x_test"], y=arrays["y_test"])
    with pytest.raises(JobError, match=r"out/train holds packed data already; name another folder, or use --force"):
        pack(path, tmp_path / "out")
    (tmp_path / "out/train/notes.txt").write_text("mine")
    pack(path, tmp_path / "out", force=True)
    assert len(contents(tmp_path / "out/train")) == 50
    assert sorted(f.name for f in (tmp_path / "out/train").iterdir()) == [
        "manifest.json", "notes.txt", "train-00000-of-00001.h5",
    ]  # fmt: skip
    assert not list((tmp_path / "out/test").iterdir())


@pytest.mark.parametrize(("source", "message"), [
    ("nowhere", "'nowhere' doesn't exist; name a file or folder of data, or \"digits\""),
    (__file__, "is none of the known formats; name it by --format: digits, npz"),
])  # fmt: skip
def test_an_unknown_source_is_refused_with_the_known_ones(tmp_path, source, message):
    with pytest.raises(JobError, match=message):
        pack(source, tmp_path / "out")


@pytest.mark.parametrize(("samples", "nbytes", "block"), [
    (1_000_000, 784, 256), (1437, 64, 16), (10, 64, 1), (128, 64, 2), (1_000_000, 150_528, 16), (1000, 8 << 20, 1),
])  # fmt: skip
def test_blocks_are_small_enough_to_shuffle_and_to_read(samples, nbytes, block):
    assert block_size(samples, nbytes) == block
