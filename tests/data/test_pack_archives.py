"""Pictures in tars are found where they lie, as Python's tarfile finds them, and a damaged tar is told by name."""

import io
import os
import tarfile

import numpy as np
import pytest

from dpnn.data.pack.archives import read_archives
from dpnn.data.pack.formats import Options, open_source
from dpnn.data.pack.imagenet import read_imagenet
from dpnn.data.pack.tar import members
from dpnn.errors import DataError


def tar_of(files, format=tarfile.GNU_FORMAT):
    """The bytes of a tar of {name: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pictures(*names):
    """{name: its own name as its bytes}."""
    return {name: f"picture {name}".encode() for name in names}


def listed(split):
    """(label, bytes) of each sample."""
    return [(int(label), split.samples.read(i).decode()) for i, label in enumerate(split.labels)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    rng = np.random.default_rng(0)
    names = [
        "a",
        "sub/b.jpg",
        "sub/" + "long" * 20 + "/" + "name" * 20 + ".jpg",
        "\u00fcber.jpg",
        ".hidden",
        "sub/._b.jpg",
        "z",
    ]
    if format != tarfile.USTAR_FORMAT:
        names.insert(3, "verylong/" * 40 + "end.jpg")
    path = tmp_path / "some.tar"
    path.write_bytes(tar_of({name: rng.bytes(int(rng.integers(0, 1500))) for name in names}, format))
    with tarfile.open(path) as tar:
        wanted = [(m.name, m.offset_data, m.size) for m in tar if not m.name.split("/")[-1].startswith(".")]
    assert list(members(path)) == wanted
    assert len(wanted) == len(names) - 2


def test_a_length_in_base_256_is_read(tmp_path):
    data = bytearray(tar_of(pictures("cat/1.jpg")))
    data[124:136] = b"\x80" + (17).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    (tmp_path / "some.tar").write_bytes(data)
    assert [member.nbytes for member in members(tmp_path / "some.tar")] == [17]


@pytest.mark.parametrize("layout", ["tar of tars", "folder of tars", "tar of folders"])
def test_each_layout_gives_the_same_classes_and_pictures(tmp_path, layout):
    classes = {"dog": ["d2.jpg", "d1.jpg"], "ape": ["a1.jpg"], "ape-2": ["b1.jpg", "b2.jpg"]}
    tars = {f"{name}.tar": tar_of(pictures(*inside)) for name, inside in classes.items()}
    source = tmp_path / "source"
    if layout == "folder of tars":
        source.mkdir()
        for name, data in tars.items():
            (source / name).write_bytes(data)
    elif layout == "tar of tars":
        source.write_bytes(tar_of(tars))
    else:
        inside = {
            f"./{name}/{file}": data for name, files in classes.items() for file, data in pictures(*files).items()
        }
        source.write_bytes(tar_of(inside))
    data = read_archives(source)
    assert data.class_names == ("ape", "ape-2", "dog")
    (train,) = data.splits
    wanted = [(0, "a1.jpg"), (1, "b1.jpg"), (1, "b2.jpg"), (2, "d2.jpg"), (2, "d1.jpg")]
    assert listed(train) == [(label, f"picture {name}") for label, name in wanted]
    assert train.samples.name(3).startswith(str(source))
    assert train.samples.name(3).endswith("d2.jpg")
    assert (train.samples.codec, train.samples.nbytes) == ("image", 14.0)
    assert train.ids.tolist() == [0, 1, 2, 3, 4]


def test_two_tars_are_a_training_and_a_test_part(tmp_path):
    (tmp_path / "train.tar").write_bytes(tar_of(pictures("cat/1.jpg", "dog/2.jpg")))
    (tmp_path / "val.tar").write_bytes(tar_of(pictures("dog/3.jpg")))
    train, test = read_archives(tmp_path).splits
    assert listed(test) == [(1, "picture dog/3.jpg")]
    assert np.concatenate([train.ids, test.ids]).tolist() == [0, 1, 2]


def test_a_tar_cut_or_changed_anywhere_is_read_right_or_told(tmp_path):
    """A cut is always told; a changed byte is told, or it is one of a picture's, of which a tar has no checksum."""
    whole = tar_of(
        {f"{name}.tar": tar_of(pictures(f"{name}1.jpg", f"{name}2.jpg"), tarfile.PAX_FORMAT) for name in "ab"}
    )
    path = tmp_path / "train.tar"
    path.write_bytes(whole)
    wanted = read_archives(path).splits[0].samples
    ends = len(whole.rstrip(b"\0"))
    for cut in [*range(0, ends, 97), *range(0, ends, 512)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"train\.tar.* (truncated|no tar)"):
            read_archives(path)
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(ends)] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        found, problem = None, ""
        try:
            found = read_archives(path).splits[0].samples
        except DataError as error:
            problem = str(error)
        if found is None:
            assert str(path) in problem
            told += 1
        else:
            assert found.offsets.tolist() == wanted.offsets.tolist()
            assert found.lengths.tolist() == wanted.lengths.tolist()
    assert told > 50


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is an empty tar"),
        ({"a.tar": tar_of({})}, "no pictures of the class 'a'"),
        ({"a.tar": tar_of(pictures("1")), "b.jpg": b"b"}, "holds 'b.jpg' beside tars; each of its members must be"),
        ({"a.tar": tar_of(pictures("1")), "sub/a.tar": tar_of(pictures("2"))}, "holds two tars of the class 'a'"),
        ({"a.tar": b"\x1f\x8b" + bytes(600)}, "the tar at byte 512, is no tar (if it is compressed, unpack it)"),
        (pictures("1.jpg"), "'1.jpg' lies in no folder, so it has no class"),
        (
            pictures("train/cat/1.jpg", "test/cat/2.jpg"),
            "holds the class 'cat' twice, in 'train/cat' and in 'test/cat'",
        ),
    ],
)
def test_a_tar_of_another_layout_is_told(tmp_path, files, message):
    path = tmp_path / "some.tar"
    path.write_bytes(tar_of(files))
    with pytest.raises(DataError) as error:
        read_archives(path)
    assert message in str(error.value)


def test_a_link_and_a_picture_that_comes_twice_are_told(tmp_path):
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("cat/1.jpg", "cat/2.jpg", "cat/1.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="the members at bytes 512 and 1536 have the same name"):
        read_archives(path)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("cat/1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"'cat/1.jpg' is a link, not a file; make the tar anew with `tar -h`"):
        next(members(path))


@pytest.fixture
def imagenet(tmp_path):
    """Three classes of two pictures and four validation pictures, as ImageNet 2012 is handed out, without a list."""
    synsets = ["n03", "n01", "n02"]
    train = {f"{name}.tar": tar_of(pictures(f"{name}_1.JPEG", f"{name}_2.JPEG")) for name in synsets}
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of(train))
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (2, 1, 4, 3)]
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_of(pictures(*names)))
    return tmp_path


WANTED = [2, 0, 1, 2]
"""The classes of the validation pictures, in the order of their names."""


def write_caffe(folder):
    lines = [f"ILSVRC2012_val_{i:08d}.JPEG {label}" for i, label in enumerate(WANTED, 1)]
    (folder / "val.txt").write_text("\n".join(lines[::-1]))


def write_synsets(folder):
    lines = [f"ILSVRC2012_val_{i:08d}.JPEG n0{label + 1}" for i, label in enumerate(WANTED, 1)]
    (folder / "val.txt").write_text("\n".join(lines))


def write_truth(folder):
    """n02 has the ID 1, n03 has 2, n01 has 3; 4 is no class of pictures, but one of classes."""
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n2\n")


def write_map(folder):
    write_truth(folder)
    (folder / "map_clsloc.txt").write_text("n02 1 kit_fox\nn03 2 English_setter\nn01 3 Siberian_husky\n")


def write_devkit(folder):
    from scipy.io import savemat

    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    write_truth(data)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [
        (1, "n02", "kit fox", "small", 0),
        (2, "n03", "setter", "dog", 0),
        (3, "n01", "husky", "", 0),
        (4, "n00", "", "", 3),
    ]
    savemat(data / "meta.mat", {"synsets": np.array([(*row,) for row in rows], kinds)[:, None]}, do_compression=True)


@pytest.mark.parametrize("write", [write_caffe, write_synsets, write_map, write_devkit])
def test_each_list_gives_the_validation_pictures_their_classes(imagenet, write):
    if write is write_devkit:
        pytest.importorskip("scipy", reason="the devkit's meta.mat is read by scipy")
    write(imagenet)
    source = open_source(str(imagenet), Options())
    train, test = source.splits
    assert source.class_names == ("n01", "n02", "n03")
    assert listed(train) == [(i // 2, f"picture n0{i // 2 + 1}_{i % 2 + 1}.JPEG") for i in range(6)]
    assert listed(test) == [(label, f"picture ILSVRC2012_val_{i:08d}.JPEG") for i, label in enumerate(WANTED, 1)]


def test_without_validation_pictures_there_is_one_part(imagenet):
    os.unlink(imagenet / "ILSVRC2012_img_val.tar")
    assert [split.name for split in read_imagenet(imagenet).splits] == ["train"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds ILSVRC2012_img_val.tar, but neither val.txt nor ILSVRC2012_validation_ground_truth.txt"),
        ({"val.txt": "ILSVRC2012_val_00000001.JPEG 0"}, "val.txt doesn't name ILSVRC2012_val_00000002.JPEG"),
        ({"val.txt": "a 3"}, "val.txt, line 1: the class 3 is not in 0..2"),
        ({"val.txt": "a 1\n\na 2"}, "line 3: a is of n03, and of n02 in a line before"),
        ({"val.txt": "a"}, "line 1: not a picture and its class"),
        ({"ILSVRC2012_validation_ground_truth.txt": "1\n"}, "but neither map_clsloc.txt nor meta.mat"),
        (
            {"ILSVRC2012_validation_ground_truth.txt": "1\n", "map_clsloc.txt": "n01\n"},
            "line 1: not a class and its",
        ),
        (
            {"ILSVRC2012_validation_ground_truth.txt": "1\n2", "map_clsloc.txt": "n01 1"},
            "line 2: '2' is no ILSV",
        ),
        ({"ILSVRC2012_validation_ground_truth.txt": "1\n1", "map_clsloc.txt": "n01 1"}, "has 2 lines, and"),
        ({"ILSVRC2012_validation_ground_truth.txt": "1\n1\n1\n1", "map_clsloc.txt": "n9 1"}, "class 'n9', which"),
        ({"ILSVRC2012_validation_ground_truth.txt": "1\n", "meta.mat": "none"}, "meta.mat can't be read"),
    ],
)
def test_a_wrong_list_is_told_by_its_line(imagenet, files, message):
    if "meta.mat" in files:
        pytest.importorskip("scipy", reason="the devkit's meta.mat is read by scipy")
    for name, text in files.items():
        (imagenet / name).write_text(text)
    with pytest.raises(DataError) as error:
        read_imagenet(imagenet)
    assert message in str(error.value)
