"""YouTube-8M is read as PyPI's tfrecord reads it, level by level; what is wrong is told by file, byte and video."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from tfrecord import TFRecordWriter
from tfrecord.reader import example_loader, sequence_loader

from dpnn.data.labels import Lists
from dpnn.data.manifest import Manifest
from dpnn.data.pack import Options, pack
from dpnn.data.pack.tfrecord import scan
from dpnn.data.pack.youtube8m import read_youtube8m
from dpnn.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "yt8m"


def write(path, videos):
    """A file of videos: each a dict of features, and a dict of lists of them at the frame level."""
    writer = TFRecordWriter(str(path))
    for video in videos:
        writer.write(*video)
    writer.close()
    return path


def video(labels=(3, 1), name=b"abcd", rgb=16, audio=4, seed=0):
    values = np.random.default_rng(seed).normal(size=rgb + audio).astype(np.float32)
    features = {"mean_rgb": (values[:rgb], "float"), "mean_audio": (values[rgb:], "float")}
    return ({"labels": ([*labels], "int"), "id": (name, "byte")} | features,)


def clip(labels=(3, 1), name=b"abcd", frames=5, audio_frames=None, rgb=16, seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (frames, rgb + 4)).astype(np.uint8)
    lists = {
        "rgb": ([row[:rgb].tobytes() for row in x], "byte"),
        "audio": ([row[rgb:].tobytes() for row in x[:audio_frames]], "byte"),
    }
    return {"labels": ([*labels], "int"), "id": (name, "byte")}, lists


def test_videos_become_vectors_of_picture_then_sound(tmp_path):
    videos = [video(seed=i, labels=labels) for i, labels in enumerate([(3, 1), (), (7,)])]
    source = read_youtube8m(write(tmp_path / "a.tfrecord", videos))
    (split,) = source.splits
    x = split.samples.read(np.array([2, 0]))
    assert x.dtype == split.samples.dtype == np.float32
    assert x.shape[1:] == split.samples.shape == (20,)
    wanted = [np.concatenate([v["mean_rgb"][0], v["mean_audio"][0]]) for (v,) in (videos[2], videos[0])]
    np.testing.assert_array_equal(x, wanted)
    assert split.labels.indptr.tolist() == [0, 2, 2, 3]
    assert split.labels.indices.tolist() == [1, 3, 7]
    assert source.num_classes == 3862
    assert split.ids.tolist() == [0, 1, 2]


def test_frames_lie_end_to_end_picture_and_sound_of_each_together(tmp_path):
    clips = [clip(frames=3, seed=1), clip(frames=9, labels=(2, 2, 0), seed=2)]
    (split,) = read_youtube8m(write(tmp_path / "a.tfrecord", clips), num_classes=4).splits
    assert split.samples.codec == "frames"
    assert split.samples.shape == (20,)
    for i, (_, lists) in enumerate(clips):
        wanted = b"".join(a + b for a, b in zip(lists["rgb"][0], lists["audio"][0], strict=True))
        assert split.samples.read(i) == wanted
    assert split.labels.indptr.tolist() == [0, 2, 4]
    assert split.labels.indices.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("kept", ["rgb", "audio"])
def test_one_feature_is_enough(tmp_path, kept):
    context, lists = clip()
    (split,) = read_youtube8m(write(tmp_path / "a.tfrecord", [(context, {kept: lists[kept]})])).splits
    assert split.samples.read(0) == b"".join(lists[kept][0])
    (features,) = video()
    del features["mean_audio" if kept == "rgb" else "mean_rgb"]
    (split,) = read_youtube8m(write(tmp_path / "b.tfrecord", [(features,)])).splits
    np.testing.assert_array_equal(split.samples.read(np.array([0]))[0], features[f"mean_{kept}"][0])


def test_the_validation_files_become_the_test_part_and_files_without_labels_are_told(tmp_path):
    for name, seed in (("train01", 1), ("train00", 0), ("validate00", 2)):
        write(tmp_path / f"{name}.tfrecord", [video(seed=seed, name=name.encode()), video(seed=seed + 10)])
    (features,) = video()
    del features["labels"]
    write(tmp_path / "test00.tfrecord", [(features,)])
    source = read_youtube8m(tmp_path)
    assert [split.name for split in source.splits] == ["train", "test"]
    assert [split.ids.tolist() for split in source.splits] == [[0, 1, 2, 3], [4, 5]]
    names = [split.samples.name(0) for split in source.splits]
    assert names[0].endswith("train00.tfrecord, byte 12, video train00")
    assert names[1].endswith("validate00.tfrecord, byte 12, video validate00")
    np.testing.assert_array_equal(source.splits[0].samples.read(np.array([2]))[0, :16], video(seed=1)[0]["mean_rgb"][0])
    assert source.left_out == ((str(tmp_path / "test00.tfrecord"), "the test part of YouTube-8M has no labels"),)
    with pytest.raises(DataError, match="byte 12: no feature 'labels'"):
        read_youtube8m(tmp_path / "test00.tfrecord")


def test_labels_far_inside_a_record_are_found(tmp_path):
    features = {f"f{i:03}": (np.zeros(1000, np.float32), "float") for i in range(8)}
    path = write(tmp_path / "a.tfrecord", [({"mean_rgb": ([1.0], "float")} | features | {"labels": ([5], "int")},)])
    (_, _, head), *_ = scan(path, 0)
    assert b"labels" not in head
    assert read_youtube8m(path).splits[0].labels.indices.tolist() == [5]


def test_a_folder_without_training_files_is_told(tmp_path):
    write(tmp_path / "validate00.tfrecord", [video()])
    with pytest.raises(DataError, match=r"holds no train\*\.tfrecord; name such a folder, or one \.tfrecord file"):
        read_youtube8m(tmp_path)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (
            clip(audio_frames=4, name=b"xyz1"),
            r"byte 247, video xyz1: no frames, or not as many of each feature \(5 and 4\)",
        ),
        (clip(frames=0, name=b"xyz1"), r"byte 247, video xyz1: no frames, or not as many of each feature \(0 and 0\)"),
        (
            clip(rgb=17, name=b"xyz1"),
            r"byte 247, video xyz1: frames that aren't each one value of 16 bytes \(at byte \d+ of the record\)",
        ),
        (video(), "byte 247, video abcd: no feature 'rgb'"),
    ],
)
def test_a_clip_unlike_the_first_is_refused_when_it_is_read(tmp_path, second, problem):
    (split,) = read_youtube8m(write(tmp_path / "a.tfrecord", [clip(), second])).splits
    assert len(split.samples.read(0)) == 100
    with pytest.raises(DataError, match=problem) as told:
        split.samples.read(1)
    assert str(told.value).startswith(str(tmp_path / "a.tfrecord"))


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (video(rgb=15), r"video abcd: not as many numbers as the first video has \(15 and 4\)"),
        (({**video()[0], "mean_rgb": ([np.nan] * 16, "float")},), "video abcd: a number that isn't finite"),
        (({**video()[0], "mean_rgb": ([1] * 16, "int")},), "video abcd: a list of another type"),
    ],
)
def test_a_video_unlike_the_first_is_refused_when_it_is_read(tmp_path, second, problem):
    (split,) = read_youtube8m(write(tmp_path / "a.tfrecord", [video(), second])).splits
    assert split.samples.read(np.array([0])).shape == (1, 20)
    with pytest.raises(DataError, match=problem):
        split.samples.read(np.array([0, 1]))


@pytest.mark.parametrize("label", [-1, 4, 1 << 40])
def test_a_label_that_is_no_class_is_told(tmp_path, label):
    path = write(tmp_path / "a.tfrecord", [video(), video(labels=(label, 2))])
    with pytest.raises(DataError, match=rf"a\.tfrecord, byte \d+: label {label} is not in 0\.\.3"):
        read_youtube8m(path, num_classes=4)


def test_a_damaged_clip_is_listed_and_refused_when_it_is_read(tmp_path):
    path = write(tmp_path / "a.tfrecord", [clip(seed=0), clip(seed=1), clip(seed=2)])
    whole = path.read_bytes()
    _, (offset, nbytes, _), _ = scan(path, 0)
    for at in range(offset, offset + nbytes + 4):
        data = bytearray(whole)
        data[at] ^= 0x55
        path.write_bytes(data)
        (split,) = read_youtube8m(path).splits
        assert len(split.labels) == 3
        with pytest.raises(DataError, match=rf"byte {offset}.*: the record is damaged"):
            split.samples.read(1)
        assert len(split.samples.read(2)) == 100


def test_files_that_are_something_else_are_told(tmp_path):
    path = write(tmp_path / "a.tfrecord", [({"image": (b"abc", "byte"), "labels": ([1], "int")},)])
    with pytest.raises(DataError, match="no feature mean_rgb or mean_audio, so it is no record of YouTube-8M"):
        read_youtube8m(path)


def test_a_file_that_the_system_cannot_read_is_told(tmp_path):
    write(tmp_path / "train00.tfrecord", [clip()])
    (tmp_path / "train01.tfrecord").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"train01\.tfrecord can't be read \(No such file"):
        read_youtube8m(tmp_path)
    (split,) = read_youtube8m(tmp_path / "train00.tfrecord").splits
    (tmp_path / "train00.tfrecord").unlink()
    assert split.samples.name(0).endswith("train00.tfrecord, byte 12")
    with pytest.raises(FileNotFoundError):
        split.samples.read(0)


@pytest.mark.parametrize("make", [video, clip])
def test_a_damaged_video_is_left_out_of_what_is_packed(tmp_path, make):
    folder = tmp_path / "yt8m"
    folder.mkdir()
    for name in ("train00", "train01", "validate00"):
        write(folder / f"{name}.tfrecord", [make(seed=i, name=b"v%03d" % i, labels=(i % 5, 1)) for i in range(20)])
    path = folder / "train01.tfrecord"
    _, _, (offset, nbytes, _), *_ = scan(path, 0)
    data = bytearray(path.read_bytes())
    data[offset + nbytes - 1] ^= 1
    path.write_bytes(data)
    summary = pack(str(folder), tmp_path / "packed", options=Options(classes=5))
    manifest = Manifest.read(tmp_path / "packed" / "train")
    assert manifest.samples == 39
    assert manifest.shape == (20,)
    assert (manifest.kind, manifest.codec) == (("raw", "") if make is video else ("encoded", "frames"))
    assert len(manifest.mean) == 20
    assert "1 x the record is damaged" in str(summary)
    told = (tmp_path / "packed" / "train" / "rejected.csv").read_text()
    assert f"train01.tfrecord, byte {offset}" in told
    source = read_youtube8m(folder, 5).splits[0]
    with h5py.File(tmp_path / "packed" / "train" / manifest.shards[0].name) as file:
        ids = file["id"][:].astype(int)
        assert sorted({*range(40)} - {*ids.tolist()}) == [22]
        labels = Lists(file["y_indptr"][:], file["y_indices"][:])
        wanted = source.labels[ids]
        np.testing.assert_array_equal(labels.indptr, wanted.indptr)
        np.testing.assert_array_equal(labels.indices, wanted.indices)
        if make is video:
            np.testing.assert_array_equal(file["x"][:], source.samples.read(ids))
        else:
            assert file["bytes"][:].tobytes() == b"".join(source.samples.read(i) for i in ids)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the example files of YouTube-8M's layout aren't here")
def test_the_example_files_are_what_another_reader_reads():
    (split,) = read_youtube8m(SHARED / "synth_video00.tfrecord").splits
    assert split.samples.shape == (1152,)
    x = split.samples.read(np.arange(len(split.ids)))
    for i, found in enumerate(example_loader(str(SHARED / "synth_video00.tfrecord"), None)):
        np.testing.assert_array_equal(x[i], np.concatenate([found["mean_rgb"], found["mean_audio"]]))
        assert split.labels[np.array([i])].indices.tolist() == sorted(found["labels"].tolist())
    assert i + 1 == len(x) == 64

    (split,) = read_youtube8m(SHARED / "synth_frame00.tfrecord").splits
    assert split.samples.shape == (1152,)
    for i, (context, lists) in enumerate(sequence_loader(str(SHARED / "synth_frame00.tfrecord"), None)):
        assert split.samples.read(i) == b"".join(a + b for a, b in zip(lists["rgb"], lists["audio"], strict=True))
        assert split.labels[np.array([i])].indices.tolist() == sorted(context["labels"].tolist())
        assert split.samples.name(i).endswith(f"video {bytes(context['id']).decode()}")
    assert i + 1 == len(split.ids) == 4
