"""A folder of pictures a class is listed in a fixed order, in little memory, and what is wrong with it is named."""

import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dpnn.data.pack import pack
from dpnn.data.pack.images import read_images
from dpnn.errors import DataError

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"


@pytest.fixture
def write(tmp_path):
    """Write files, each with its own path as its bytes, and return the folder."""

    def write(*paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(os.fsencode(path))
        return tmp_path

    return write


def listed(split, folder):
    """(label, path in the folder) of each sample, where name and bytes agree."""
    found = []
    for number, label in enumerate(split.labels):
        path = split.samples.read(number).decode()
        assert split.samples.name(number) == str(folder / path)
        found.append((int(label), path))
    return found


def test_classes_are_numbered_by_name_and_hidden_files_left_out(write):
    folder = write("cat/b.png", "cat/a.jpg", "ape/x.JPEG", "ape/.DS_Store", ".git/HEAD", "LICENSE", "dog/c.webp")
    source = read_images(folder)
    (train,) = source.splits
    assert source.class_names == ("ape", "cat", "dog")
    assert source.num_classes == 3
    assert listed(train, folder) == [(0, "ape/x.JPEG"), (1, "cat/a.jpg"), (1, "cat/b.png"), (2, "dog/c.webp")]
    assert (train.samples.codec, train.samples.shape, train.samples.nbytes) == ("image", (), 9.5)


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_the_test_part_is_numbered_by_the_classes_of_the_training_part(write, name):
    folder = write("train/ape/1.jpg", "train/cat/2.jpg", "train/dog/3.jpg", f"{name}/dog/4.jpg", f"{name}/cat/5.jpg")
    train, test = read_images(folder).splits
    assert (train.name, test.name) == ("train", "test")
    assert listed(test, folder) == [(1, f"{name}/cat/5.jpg"), (2, f"{name}/dog/4.jpg")]
    assert np.concatenate([train.ids, test.ids]).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/cat/1.jpg", "val/dog/2.jpg"], "its test part has the class 'dog', which its training part hasn't"),
        (["train/cat/1.jpg", "val/cat/2.jpg", "test/cat/2.jpg"], "holds test and val, of which only one"),
        (["cat/1.jpg", "dog/.hidden"], "its train part has no pictures of the class 'dog' (1 such)"),
        (
            ["train/cat/1.jpg", "train/dog/2.jpg", "test/cat/.hidden"],
            "its test part has no pictures of the class 'cat'",
        ),
        (["cat/images/1.jpg"], "cat holds the folder 'images'; the pictures of a class lie in its folder itself"),
        (["1.jpg"], "holds no folders"),
        (["c\nt/1.jpg"], r"holds the folder 'c\nt', which can't be the name of a class"),
    ],
)
def test_a_folder_that_no_network_could_be_trained_on_is_told(write, paths, message):
    with pytest.raises(DataError) as error:
        read_images(write(*paths))
    assert message in str(error.value)


def test_a_file_that_is_gone_empty_or_huge_is_told_when_it_is_read(write):
    folder = write("cat/1.jpg", "cat/2.jpg", "cat/3.jpg", "cat/4\udcff.jpg", "cat/5.jpg")
    (train,) = read_images(folder).splits
    (folder / "cat/1.jpg").unlink()
    (folder / "cat/2.jpg").write_bytes(b"")
    os.truncate(folder / "cat/3.jpg", (1 << 30) + 1)
    for number, reason in enumerate(("No such file", "the file is empty", "the file has 1073741825 bytes")):
        with pytest.raises(DataError, match=reason):
            train.samples.read(number)
    assert train.samples.read(4) == b"cat/5.jpg"
    assert train.samples.name(3) == str(folder / "cat/4\udcff.jpg")


def test_a_listing_takes_few_bytes_a_file(tmp_path):
    per_class, classes = 2000, 3
    for name in range(classes):
        (tmp_path / f"n{name:08d}").mkdir()
        for i in range(per_class):
            os.symlink("nowhere", tmp_path / f"n{name:08d}" / f"n{name:08d}_{i}.JPEG")  # quicker than a file
    tracemalloc.start()
    source = read_images(tmp_path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source.splits[0].ids) == classes * per_class
    assert kept / (classes * per_class) < 60  # a name has 19 bytes


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photos of ../shared/data")
def test_the_photos_are_found_with_all_their_classes():
    source = read_images(PHOTOS)
    assert [(split.name, len(split.ids)) for split in source.splits] == [("train", 2640), ("test", 648)]
    assert source.num_classes == len(source.class_names) == 81
    for split in source.splits:
        assert set(split.labels) == set(range(81))
        assert split.samples.read(100)[:2] == b"\xff\xd8"
        assert source.class_names[split.labels[100]] in split.samples.name(100)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photos of ../shared/data")
def test_photos_in_folders_and_in_tars_become_the_same_shards(tmp_path):
    source = tmp_path / "photos"
    for part in ("train", "test"):
        for folder in sorted((PHOTOS / part).iterdir())[:5]:
            (source / part / folder.name).mkdir(parents=True)
            for photo in sorted(folder.iterdir())[:6]:
                os.symlink(photo, source / part / folder.name / photo.name)
            (source / part / folder.name / "notes.txt").write_text("no picture")
        with tarfile.open(tmp_path / f"{part}.tar", "w", dereference=True) as tar:
            tar.add(source / part, part)
    of_folders = pack(str(source), tmp_path / "a", shard_mb=0.3)
    os.mkdir(tmp_path / "tars")
    for part in ("train", "test"):
        (tmp_path / f"{part}.tar").rename(tmp_path / "tars" / f"{part}.tar")
    of_tars = pack(str(tmp_path / "tars"), tmp_path / "b", shard_mb=0.3)
    for a, b in zip(of_folders.parts, of_tars.parts, strict=True):
        assert a.manifest.samples == 30
        assert a.manifest == b.manifest
        assert (a.folder / "rejected.csv").read_text().count("notes.txt") == 5
    assert len(of_folders.parts[0].manifest.shards) > 1
