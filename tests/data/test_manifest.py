"""The manifest says what a folder holds, and contradictions in it are found."""

import json

import pytest

from dpnn.data import Manifest, network_shape
from dpnn.errors import DataError


@pytest.fixture
def data(write_folder):
    return write_folder()


def test_a_manifest_survives_the_way_to_other_ranks(data):
    assert Manifest.from_bytes(data.manifest.to_bytes()) == data.manifest
    assert Manifest.read(data.folder).digest == data.manifest.digest


def test_images_reach_the_network_channels_first(data, write_folder):
    assert network_shape(data.manifest) == (2, 4, 3)
    assert network_shape(write_folder(shape=(5,), name="flat").manifest) == (5,)


def test_a_missing_folder_is_named_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(DataError, match=r"the data folder .*nowhere doesn't exist; write it with `dpnn pack"):
        Manifest.read(tmp_path / "nowhere")


def test_a_folder_above_the_right_one_is_told(data):
    with pytest.raises(DataError, match=r"holds no manifest\.json; did you mean .*train\?"):
        Manifest.read(data.folder.parent)


@pytest.mark.parametrize("size", [0, 1, 100, 700])
def test_a_truncated_manifest_is_refused(data, size):
    path = data.folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"manifest\.json can't be read"):
        Manifest.read(data.folder)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("version", 2, "version = 2, and this dpnn reads version 1"),
    ("samples", 3, "samples = 3, and its shards hold 106"),
    ("samples", "3", "Expected `int`"),
    ("block", 0, "block = 0 is less than 1"),
    ("dtype", "int64", "dtype = 'int64' is none of uint8, float16, float32"),
    ("shape", [], "doesn't fit kind = 'raw'"),
    ("shape", [4, 3, 0], "has a dimension below 1"),
    ("kind", "video", "Invalid enum value 'video'"),
    ("codec", "jpeg", "Invalid enum value 'jpeg'"),
    ("codec", "frames", "codec = 'frames' doesn't fit kind = 'raw'"),
    ("codec", "image", r"shape = \[4, 3, 2\] doesn't fit codec = 'image'"),
    ("class_names", ["cat"], "class_names are not one for each class"),
    ("histogram", [1], "the histogram has not one number for each class"),
    ("mean", [1.0], "mean and std have not one number for each channel"),
    ("shards", [], "it names no shards"),
    ("labels", None, "Expected `str`"),
])  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_refused(data, key, value, message):
    path = data.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DataError, match=message):
        Manifest.read(data.folder)


@pytest.mark.parametrize(("key", "value"), [("mean", [1.0, 2.0]), ("histogram", [1, 2, 3, 4, 5, 6, 85]), ("seal", "")])
def test_a_manifest_that_was_edited_is_refused(data, key, value):
    path = data.folder / "manifest.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole))
    assert Manifest.read(data.folder) == data.manifest
    path.write_text(json.dumps({**whole, key: value}))
    with pytest.raises(DataError, match=r"manifest\.json: it was damaged, or changed by hand \(its seal is"):
        Manifest.read(data.folder)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(data, name):
    path = data.folder / "manifest.json"
    text = json.loads(path.read_text())
    text["shards"][0]["name"] = name
    path.write_text(json.dumps(text))
    with pytest.raises(DataError, match="is not a plain file name"):
        Manifest.read(data.folder)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("name", "../secret.h5", "'../secret.h5' is not a plain file name"),
    ("name", "train-00001-of-00003.h5", "train-00001-of-00003.h5 stands for two shards"),
    ("uuid", None, "stands for two shards"),
    ("samples", 0, "holds no samples"),
    ("payload_bytes", 5, "payload_bytes = 5 is not 37 samples of 24 bytes"),
])  # fmt: skip
def test_a_wrong_entry_is_refused(data, key, value, message):
    path = data.folder / "manifest.json"
    text = json.loads(path.read_text())
    first, second = text["shards"][:2]
    first[key] = second[key] if value is None else value
    text["samples"] = sum(shard["samples"] for shard in text["shards"])
    path.write_text(json.dumps(text))
    with pytest.raises(DataError, match=message):
        Manifest.read(data.folder)
