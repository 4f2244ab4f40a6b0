"""Arrays in .npy, CIFAR's and any HDF5 files become samples and labels, read where they lie."""

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from dpnn.data import Manifest
from dpnn.data.labels import Lists
from dpnn.data.pack import Options, pack
from dpnn.data.pack.cifar import read_cifar
from dpnn.data.pack.hdf5 import read_hdf5
from dpnn.data.pack.npz import read_npy
from dpnn.errors import DataError, JobError

GO = Path(__file__).parents[3] / "shared" / "data" / "go" / "RocAlphaGo" / "alphago-vs-lee-sedol-features.hdf5"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def all_of(split, numbers=None):
    """The samples of a part in a random order, put back in order; by a copy, as the other ranks get it."""
    numbers = np.random.default_rng(1).permutation(len(split.ids)) if numbers is None else numbers
    samples = pickle.loads(pickle.dumps(split.samples))
    read = np.concatenate([samples.read(part) for part in np.array_split(numbers, 3)])
    assert read.dtype == samples.dtype
    assert read.shape[1:] == samples.shape
    return read[np.argsort(numbers)]


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        (np.arange(60).reshape(20, 3), np.uint8),
        (np.arange(60).reshape(20, 3) - 1, np.float32),
        (np.arange(60).reshape(20, 3) > 30, np.uint8),
        (np.arange(60).reshape(20, 3).astype(">f4"), np.float32),
        (np.arange(60).reshape(20, 3).astype("<f2"), np.float16),
        (np.arange(60).reshape(20, 3) / 7, np.float32),
        (np.arange(60).reshape(20, 3).astype(">u2"), np.uint8),
    ],
)
def test_npy_files_are_read_as_the_type_that_holds_them(tmp_path, values, stored):
    np.save(tmp_path / "x.npy", values)
    np.save(tmp_path / "y.npy", np.arange(20) % 4)
    source = read_npy(tmp_path)
    (train,) = source.splits
    assert train.samples.dtype == stored
    np.testing.assert_array_equal(all_of(train), values.astype(stored))
    assert train.labels.tolist() == (np.arange(20) % 4).tolist()
    assert source.num_classes == 4
    assert train.samples.name(7) == f"{tmp_path / 'x.npy'}[7]"


def test_npy_files_of_two_parts_channels_first_pack(tmp_path, rng):
    x = {part: rng.integers(0, 256, (n, 3, 4, 5)).astype(np.uint8) for part, n in (("train", 40), ("test", 9))}
    for part, array in x.items():
        np.save(tmp_path / f"x_{part}.npy", array)
        np.save(tmp_path / f"y_{part}.npy", np.arange(len(array)) % 5)
    source = read_npy(tmp_path, "NCHW")
    assert [split.name for split in source.splits] == ["train", "test"]
    for split in source.splits:
        np.testing.assert_array_equal(all_of(split), x[split.name].transpose(0, 2, 3, 1))
    pack(str(tmp_path), tmp_path / "packed", options=Options(layout="NCHW"))
    assert Manifest.read(tmp_path / "packed" / "train").shape == (4, 5, 3)
    assert Manifest.read(tmp_path / "packed" / "test").samples == 9


def test_one_hot_labels_are_classes_and_others_lists_in_all_parts_alike(tmp_path):
    one_hot = np.eye(4, dtype=int)[[3, 0, 2]]
    for name, rows in (("y_train", one_hot), ("y_test", one_hot[:2])):
        np.save(tmp_path / f"{name}.npy", rows)
        np.save(tmp_path / f"{name.replace('y', 'x')}.npy", np.zeros((len(rows), 2)))
    source = read_npy(tmp_path)
    assert [split.labels.tolist() for split in source.splits] == [[3, 0, 2], [3, 0]]
    assert source.num_classes == 4
    np.save(tmp_path / "y_train.npy", one_hot | [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    train, test = (split.labels for split in read_npy(tmp_path).splits)
    assert isinstance(test, Lists)
    assert (train.indptr.tolist(), train.indices.tolist()) == ([0, 2, 3, 4], [1, 3, 0, 2])


def test_a_number_that_is_not_finite_is_told_when_its_sample_is_read(tmp_path):
    x = np.zeros((10, 4))
    x[3, 2], x[7, 0] = np.nan, 1e300  # float32 can't hold the second
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.zeros(10, int))
    (train,) = read_npy(tmp_path).splits
    assert train.samples.read(np.array([2, 4])).tolist() == [[0] * 4] * 2
    for bad in (3, 7):
        with pytest.raises(DataError, match=rf"x\.npy\[{bad}\] holds a number that isn't finite"):
            train.samples.read(np.array([1, bad, 2]))
    packed = pack(str(tmp_path), tmp_path / "packed")
    assert packed.parts[0].manifest.samples == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", None, "has no .npy file 'x', only y"),
        ("x.npy", b"", r"x\.npy can't be read"),
        ("x.npy", b"none", r"x\.npy can't be read"),
        ("y.npy", np.zeros((10, 3)) + 2, r"y\.npy\[0\]\[0\] = 2.0: labels \(samples, classes\) are 0 or 1"),
        ("y.npy", np.arange(9), "10 samples and 9 labels"),
        ("y.npy", np.arange(10) - 1, r"y\.npy\[0\] = -1: a class is a number from 0"),
        ("x.npy", np.zeros((4, 10)).T, r"x\.npy is no array of rows one after the other"),
        ("x.npy", np.zeros((0, 4)), "0 samples and 10 labels"),
    ],
)
def test_a_wrong_npy_file_is_told_by_name(tmp_path, name, content, message):
    np.save(tmp_path / "x.npy", np.zeros((10, 4)))
    np.save(tmp_path / "y.npy", np.zeros(10, int))
    if isinstance(content, np.ndarray):
        np.save(tmp_path / name, content)
    elif content is None:
        os.unlink(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_npy(tmp_path)


def test_a_truncated_npy_file_is_refused_at_any_cut(tmp_path):
    np.save(tmp_path / "y.npy", np.zeros(10, int))
    np.save(tmp_path / "x.npy", np.zeros((10, 4)))
    for cut in range((tmp_path / "x.npy").stat().st_size - 1, -1, -7):
        os.truncate(tmp_path / "x.npy", cut)
        with pytest.raises(DataError, match=r"x\.npy can't be read"):
            read_npy(tmp_path)


@pytest.fixture
def cifar(tmp_path, rng):
    """The files of CIFAR-10 or CIFAR-100, of 3 images each; the images by part (n, 32, 32, 3) and the labels."""

    def write(classes):
        if classes == 10:
            files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
            (tmp_path / "batches.meta.txt").write_text("\n".join(f"kind{i}" for i in range(10)) + "\n\n")
        else:
            files = {"train": ["train.bin"], "test": ["test.bin"]}
            (tmp_path / "fine_label_names.txt").write_text("\n".join(f"kind{i}" for i in range(100)))
        wanted = {}
        for part, names in files.items():
            x = rng.integers(0, 256, (3 * len(names), 32, 32, 3)).astype(np.uint8)
            y = rng.integers(0, classes, len(x)).astype(np.uint8)
            for i, name in enumerate(names):
                lines = [
                    (b"" if classes == 10 else b"\x07") + y[j].tobytes() + x[j].transpose(2, 0, 1).tobytes()
                    for j in range(3 * i, 3 * i + 3)
                ]
                (tmp_path / name).write_bytes(b"".join(lines))
            wanted[part] = x, y
        return wanted

    return write


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_comes_back_image_by_image(tmp_path, cifar, classes):
    wanted = cifar(classes)
    source = read_cifar(tmp_path)
    assert source.num_classes == classes
    assert source.class_names == tuple(f"kind{i}" for i in range(classes))
    for split in source.splits:
        x, y = wanted[split.name]
        np.testing.assert_array_equal(all_of(split), x)
        assert split.labels.tolist() == y.tolist()
    assert source.splits[0].samples.name(2).endswith("[2]")
    packed = pack(str(tmp_path), tmp_path / "packed")
    assert [part.manifest.shape for part in packed.parts] == [(32, 32, 3)] * 2
    assert packed.parts[0].manifest.class_names == source.class_names


def test_a_damaged_cifar_file_is_told_by_name(tmp_path, cifar):
    cifar(10)
    os.truncate(tmp_path / "data_batch_2.bin", 3073 * 2 + 5)
    with pytest.raises(DataError, match=r"data_batch_2\.bin has 6151 bytes, which are not records of 3073"):
        read_cifar(tmp_path)
    os.truncate(tmp_path / "data_batch_2.bin", 3073 * 2)
    with open(tmp_path / "data_batch_3.bin", "r+b") as file:
        file.seek(3073)
        file.write(b"\x0a")
    with pytest.raises(DataError, match=r"data_batch_3\.bin\[1\] has the label 10, which is not in 0\.\.9"):
        read_cifar(tmp_path)
    os.unlink(tmp_path / "data_batch_4.bin")
    with pytest.raises(DataError, match=r"data_batch_4\.bin can't be read"):
        read_cifar(tmp_path)


@pytest.mark.parametrize(
    "how", [{}, {"chunks": (1, 6, 5, 3)}, {"chunks": (7, 6, 5, 3)}, {"chunks": (7, 4, 5, 2), "compression": "lzf"}]
)
def test_hdf5_datasets_of_any_storage_come_back_in_any_order(tmp_path, rng, how):
    x = rng.integers(0, 256, (3, 50, 6, 5, 3)).astype(np.uint8)
    for i in range(3):
        with h5py.File(tmp_path / f"part{i}.h5", "w") as file:
            file.create_dataset("group/images", data=x[i], **how)
            file.create_dataset("labels", data=np.arange(50)[:, None] % 7, chunks=(16, 1))
    source = read_hdf5(tmp_path, "group/images", "labels")
    (train,) = source.splits
    np.testing.assert_array_equal(all_of(train), x.reshape(-1, 6, 5, 3))
    np.testing.assert_array_equal(all_of(train, np.arange(150)), x.reshape(-1, 6, 5, 3))
    assert train.labels.tolist() == [*np.arange(50) % 7] * 3
    assert train.samples.name(120) == f"{tmp_path / 'part2.h5'}, group/images[20]"
    pattern = read_hdf5(Path(f"{tmp_path}/part[02].h5"), "group/images", "labels")
    assert len(pattern.splits[0].ids) == 100


def test_chunks_are_unpacked_once_each_in_whatever_order_samples_are_read(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_dataset("x", data=np.arange(4000.0).reshape(1000, 4), chunks=(10, 4), compression="gzip")
        file.create_dataset("y", data=np.zeros(1000, int), chunks=(100,))
    (train,) = read_hdf5(tmp_path / "all.h5", "x", "y").splits
    slices = []
    read = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda of, place: slices.append(place) or read(of, place))
    np.testing.assert_array_equal(all_of(train), np.arange(4000.0).reshape(1000, 4))
    assert slices == [slice(first, first + 10) for first in range(0, 1000, 10)]


def test_a_damaged_chunk_is_told_by_its_place_and_the_others_are_read(tmp_path):
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_dataset("x", data=np.arange(400).reshape(100, 4).astype(np.uint8), chunks=(10, 4), fletcher32=True)
        file.create_dataset("y", data=np.zeros(100, int))
        at = file["x"].id.get_chunk_info(3).byte_offset
    with open(tmp_path / "all.h5", "r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    (train,) = read_hdf5(tmp_path / "all.h5", "x", "y").splits
    assert train.samples.read(np.array([99, 2])).tolist() == [[140, 141, 142, 143], [8, 9, 10, 11]]
    with pytest.raises(DataError, match=r"all\.h5, x\[30\] can't be read"):
        train.samples.read(np.array([99, 35]))
    packed = pack(str(tmp_path / "all.h5"), tmp_path / "packed", options=Options(x="x", y="y"))
    assert packed.parts[0].manifest.samples == 90


def test_places_on_a_plane_become_classes(tmp_path):
    places = np.array([[0, 0], [1, 4], [2, 3]], np.uint8)
    with h5py.File(tmp_path / "go.h5", "w") as file:
        file["x"], file["y"] = np.zeros((3, 2, 3, 5), np.uint8), places
    source = read_hdf5(tmp_path / "go.h5", "x", "y", "NCHW", places=True)
    assert source.splits[0].labels.tolist() == [0, 9, 13]
    assert source.num_classes == 15
    with pytest.raises(DataError, match=r"y\[1\]: \[1, 4\] is no place on 2 x 3"):
        read_hdf5(tmp_path / "go.h5", "x", "y", places=True)
    with pytest.raises(DataError, match=r"y\[1\]\[1\] = 4: labels"):
        read_hdf5(tmp_path / "go.h5", "x", "y")


@pytest.fixture
def wrong(tmp_path):
    """HDF5 files of each kind that can't be read."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"], file["text"], file["one"] = np.zeros((4, 3)), np.zeros(4, int), ["a"] * 4, 1
        file["short"], file["group/z"] = np.zeros(3, int), np.zeros(4)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"], file["y"] = np.zeros((4, 2)), np.zeros(4, int)
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout((4, 3), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "gone.h5"), "x", (4, 3))
        file.create_virtual_dataset("x", layout)
    (tmp_path / "none.h5").write_bytes(b"none")
    (tmp_path / "cut.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "x", "y", "message"),
    [
        ("a.h5", "z", "y", r"a\.h5 has no dataset 'z' of one or more samples; it holds group/z \(4,\), one \(\)"),
        ("a.h5", "group", "y", "has no dataset 'group'"),
        ("a.h5", "one", "y", "has no dataset 'one'"),
        ("a.h5", "text", "y", r"text has the shape \(4,\)"),
        ("a.h5", "x", "text", r"text is of type object"),
        ("a.h5", "x", "short", "4 samples and 3 labels"),
        ("[ab].h5", "x", "y", r"b\.h5, x holds \(2,\) float64, but .*a\.h5 \(3,\) float64; they must be alike"),
        ("virtual.h5", "x", "y", r"virtual\.h5, x takes its data from other files"),
        ("none.h5", "x", "y", r"none\.h5 is no HDF5 file, or is damaged"),
        ("cut.h5", "x", "y", r"cut\.h5 is no HDF5 file, or is damaged"),
        ("empty", "x", "y", r"empty holds no files named \*\.h5 or \*\.hdf5"),
    ],
)
def test_a_wrong_hdf5_file_is_told_by_file_and_dataset(wrong, name, x, y, message):
    with pytest.raises(DataError, match=message):
        read_hdf5(wrong / name, x, y)


def test_options_are_asked_for_where_they_are_missing_and_refused_where_they_say_nothing(wrong, tmp_path):
    with pytest.raises(JobError, match=r"a\.h5 needs --x DATASET for the samples, .* it holds group/z"):
        pack(str(wrong / "a.h5"), tmp_path / "packed")
    with pytest.raises(JobError, match="--places is for the formats hdf5, and digits is digits; leave it out"):
        pack("digits", tmp_path / "packed", options=Options(places=True))


@pytest.mark.skipif(not GO.exists(), reason="needs the game records of ../shared/data")
def test_a_file_of_another_program_that_plays_go_is_packed(tmp_path):
    options = Options(x="states", y="actions", layout="NCHW", places=True)
    (train,) = pack(str(GO), tmp_path, options=options).parts
    assert (train.manifest.samples, train.manifest.shape) == (1033, (19, 19, 12))
    assert train.manifest.num_classes == 361
    with h5py.File(GO) as file:
        assert train.manifest.histogram[15 * 19 + 3] == (file["actions"][:] == [15, 3]).all(axis=1).sum()
