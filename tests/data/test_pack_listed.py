"""A CSV list gives each picture its labels and its part, and a wrong line is told by its number."""

import csv
from pathlib import Path

import numpy as np
import pytest

from dpnn.data import Manifest
from dpnn.data.labels import Lists
from dpnn.data.pack import pack
from dpnn.data.pack.listed import read_list
from dpnn.errors import DataError

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "list.csv"
        path.write_text("\n".join(lines))
        return path

    return write


def lists(labels):
    """The classes of each sample."""
    assert isinstance(labels, Lists)
    return [labels.indices[lo:hi].tolist() for lo, hi in zip(labels.indptr, labels.indptr[1:], strict=False)]


@pytest.mark.parametrize("header", [[], ["path,label"], ["\ufefffile, Labels"]])
def test_names_are_numbered_in_their_order(write, header):
    path = write(*header, "b/1.jpg,dog", "", "a/2.jpg, ape", '"b/3,4.jpg",Golden Retriever')
    source = read_list(path)
    (train,) = source.splits
    assert source.class_names == ("Golden Retriever", "ape", "dog")
    assert train.labels.tolist() == [2, 1, 0]
    assert [train.samples.name(i) for i in range(3)] == [
        str(path.parent / n) for n in ("b/1.jpg", "a/2.jpg", "b/3,4.jpg")
    ]


def test_numbers_stay_as_they_are(write):
    source = read_list(write("1.jpg,5", "2.jpg,0", "3.jpg,10"))
    assert source.splits[0].labels.tolist() == [5, 0, 10]
    assert (source.num_classes, source.class_names) == (11, ())


@pytest.mark.parametrize("lines", [["1.jpg,dog;ape", "2.jpg,", "3.jpg,cow"], ["1.jpg,2 0", "2.jpg,", "3.jpg,1"]])
def test_several_labels_make_lists_in_order(write, lines):
    source = read_list(write(*lines))
    assert lists(source.splits[0].labels) == [[0, 2], [], [1]]
    assert source.num_classes == 3


@pytest.mark.parametrize("test", ["test", "Val", "validation"])
def test_the_third_column_parts_the_samples(write, test):
    path = write("path,label,split", f"1.jpg,cat,{test}", "2.jpg,cat,train", f"3.jpg,dog,{test}", "4.jpg,dog,train")
    train, held_out = read_list(path).splits
    assert (train.name, held_out.name) == ("train", "test")
    assert train.ids.tolist() + held_out.ids.tolist() == [1, 3, 0, 2]
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([0, 1], [0, 1])
    assert held_out.samples.name(1) == str(path.parent / "3.jpg")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "list.csv lists no pictures"),
        (["path,label"], "list.csv lists no pictures"),
        (["1.jpg"], "line 1 has 1 columns; a line is PATH,LABEL or PATH,LABEL,SPLIT"),
        (["1.jpg,a", "2.jpg,a,train"], "line 2 has 3 columns, and the first line 2; quote commas"),
        (["path,label", "1.jpg,a", "2.jpg,"], "line 3 has no label"),
        (["1.jpg,a;b;a"], "line 1: 'a;b;a' has a label twice"),
        (["1.jpg,1 2 2"], "line 1: '1 2 2' has a label twice"),
        (["/,a"], "line 1: '/' is no file's path"),
        (["1.jpg,a,dev"], "line 1: the split 'dev' is none of train, test, val, validation"),
        (["1.jpg,a,test"], "has the splits test; it must have train"),
        (["1.jpg,a,train", "2.jpg,a,test", "3.jpg,a,val"], "has the splits train and test and val"),
        (["1.jpg,a,train", "2.jpg,b,test"], "its test part has the class 'b', which its training part hasn't"),
        (["1.jpg,4,train", "2.jpg,5,test"], "its test part has the class '5', which its training part hasn't"),
        (["s/1.jpg,a", "2.jpg,a", "s/1.jpg,b"], "s/1.jpg twice; remove a line, or name all labels in one"),
        (["1.jpg,99999999999"], "a label is 99999999999"),
        (['1.jpg,"a'], "list.csv is no CSV file in UTF-8"),
    ],
)
def test_a_wrong_list_is_told_by_its_line(write, lines, message):
    with pytest.raises(DataError) as error:
        read_list(write(*lines))
    assert message in str(error.value)


def test_a_list_that_is_no_text_or_is_not_there_is_told(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00,")
    with pytest.raises(DataError, match=r"list\.csv is no CSV file in UTF-8"):
        read_list(tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"other\.csv can't be read \(No such file"):
        read_list(tmp_path / "other.csv")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photos of ../shared/data")
def test_a_list_of_photos_is_packed_and_missing_files_are_named(tmp_path):
    photos = sorted(PHOTOS.glob("train/*/*.jpg"))[::40]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        for number, path in enumerate([*photos, tmp_path / "gone.jpg", tmp_path / "list.csv"]):
            csv.writer(file).writerow([path, path.parent.name, "test" if number % 5 == 1 else "train"])
            csv.writer(file).writerow([path.with_name(f"none{number}.jpg"), path.parent.name, "train"])
    pack(str(tmp_path / "list.csv"), tmp_path / "packed")
    train, test = (Manifest.read(tmp_path / "packed" / part) for part in ("train", "test"))
    assert train.samples + test.samples == len(photos)
    assert (train.kind, train.codec) == ("encoded", "image")
    assert train.class_names == test.class_names
    rejected = "".join((tmp_path / "packed" / part / "rejected.csv").read_text() for part in ("train", "test"))
    assert rejected.count("No such file") == len(photos) + 2 + 1
    assert f"{tmp_path / 'list.csv'}," in rejected
    assert np.count_nonzero(train.histogram) > 10
