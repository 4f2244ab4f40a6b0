"""`dpnn data check` lists all that is wrong, with its place, and neither dies nor hangs of it."""

import json
import os
import shutil
import signal
import time

import h5py
import msgspec
import numpy as np
import pytest

from dpnn import cli
from dpnn.data import check_shards
from dpnn.data.check import check
from dpnn.data.decode import encode
from dpnn.data.labels import Lists, histogram
from dpnn.data.manifest import Content, Manifest
from dpnn.data.shards import open_shard, read_outside
from dpnn.data.writer import write_shard
from dpnn.errors import DataError

from .conftest import flip

replace = msgspec.structs.replace


@pytest.fixture
def data(write_folder):
    return write_folder()


def path_of(data, number):
    return data.folder / data.manifest.shards[number].name


def errors(report):
    return [problem.text for problem in report.problems if not problem.warning]


def warnings(report):
    return [problem.text for problem in report.problems if problem.warning]


def doctor(data, number, change):
    """Change a shard by h5py and let the manifest agree, as if a wrong packer had written it so."""
    path = path_of(data, number)
    with h5py.File(path, "r+") as file:
        change(file)
    shards = list(data.manifest.shards)
    shards[number] = replace(shards[number], bytes=path.stat().st_size)
    file = open_shard(path)
    shards[number] = replace(shards[number], digest=read_outside(file, path, shards[number]).digest)
    os.close(file)
    data.manifest = replace(data.manifest, shards=tuple(shards))
    data.manifest.write(data.folder)


def write_encoded(folder, codec, records, labels=None, shape=(), block=2):
    folder.mkdir()
    n = len(records)
    labels = np.arange(n, dtype=np.int32) % 2 if labels is None else labels
    kind = "multi" if isinstance(labels, Lists) else "single"
    content = Content(kind="encoded", codec=codec, shape=shape, labels=kind, num_classes=2, block=block)
    shard = write_shard(folder / "a.h5", content, labels, np.arange(n), [records])
    channels = content.channels
    Manifest(
        **msgspec.structs.asdict(content), samples=n, histogram=tuple(histogram(labels, 2)),
        mean=(9.0,) * channels, std=(1.0,) * channels, shards=(shard,),
    ).write(folder)  # fmt: skip
    return folder


def test_good_data_have_no_problems(write_folder, tmp_path):
    write_folder(name="train")
    shutil.copytree(tmp_path / "train", tmp_path / "alone")
    assert check(tmp_path / "alone", threads=3).problems == []
    report = check(tmp_path / "alone", quick=True)
    assert (report.problems, report.folders, report.shards, report.samples) == ([], 1, 3, 106)
    assert "checked all but the samples of 1 folder, 3 shards, 106 samples" in str(report)


def test_all_that_is_wrong_is_listed_by_file_and_place(write_folder):
    data = write_folder(counts=(16, 16, 16, 16, 16, 16), name="train")
    folder = data.folder
    path_of(data, 0).unlink()
    os.truncate(path_of(data, 1), 0)
    os.truncate(path_of(data, 2), 4000)
    flip(path_of(data, 3), 100)
    flip(path_of(data, 4), data.manifest.shards[4].payload_offset + 24 * 8)
    flip(path_of(data, 4), data.manifest.shards[4].payload_offset)
    shutil.copy(path_of(data, 5), folder / "more.h5")
    (folder / ".train-00001-of-00003.h5.123.tmp").write_bytes(b"half a shard")
    report = check(folder, threads=2)
    told = errors(report)
    for path, text in [
        (folder / "more.h5", "the manifest doesn't name this shard"),
        (path_of(data, 0), "it is missing"),
        (path_of(data, 1), "has 0 bytes, and the manifest says"),
        (path_of(data, 2), "it is truncated"),
        (path_of(data, 3), "the labels, ids or metadata are damaged"),
        (path_of(data, 4), "x: the block of the samples 0 to 7 is damaged"),
        (path_of(data, 4), "x: the block of the samples 8 to 15 is damaged"),
    ]:
        assert [line for line in told if line.startswith(str(path)) and text in line], (path, text, told)
    assert not [line for line in told if str(path_of(data, 5)) in line]
    assert [line for line in warnings(report) if line.endswith(".tmp was left by a packing that was killed; remove it")]


def test_many_of_a_kind_are_counted(data):
    doctor(data, 2, lambda file: file["y"].__setitem__(slice(3, 15), 7))
    report = check(data.folder)
    told = [problem for problem in report.problems if problem.dataset == "y"]
    assert [problem.index for problem in told[:10]] == list(range(3, 13))
    assert "y[3] = 7: the label of sample 3 is not in 0..6" in told[0].text
    assert told[10].text.endswith("y: 2 more like these")
    assert len(told) == 11
    assert report.errors == 12


def test_a_damaged_shard_is_looked_into_as_far_as_hdf5_can(data):
    with h5py.File(path_of(data, 0), "r+") as file:
        file["y"][5] = 9
        file["id"][6] = file["id"][4]
    with h5py.File(path_of(data, 1), "r+") as file:
        file.attrs["uuid"] = "other"
        del file["id"]
    told = errors(check(data.folder))
    for number, text in [
        (0, ": the labels, ids or metadata are damaged"), (0, ", y[5] = 9: the label of"), (0, ", id[4] = "),
        (1, ": attribute uuid = 'other' instead of"), (1, " has no dataset 'id'"),
    ]:  # fmt: skip
        assert [line for line in told if line.startswith(f"{path_of(data, number)}{text}")], text


def test_ids_that_stand_in_two_shards_are_told_with_both_places(data):
    doctor(data, 1, lambda file: file["id"].__setitem__(3, data.ids[20]))
    doctor(data, 2, lambda file: file["id"].__setitem__(0, data.ids[21]))
    told = errors(check(data.folder))
    assert len(told) == 2
    for shard, place, of in ((1, 3, 20), (2, 0, 21)):
        text = f"{path_of(data, shard)}, id[{place}] = {data.ids[of]} stands in {path_of(data, 0)}, id[{of}] too"
        assert [line for line in told if line.startswith(text)]


def test_samples_of_both_parts_are_told(write_folder, tmp_path):
    train = write_folder(name="train")
    test = write_folder(name="test", counts=(5, 5), classes=6)
    told = errors(check(tmp_path))
    assert [line for line in told if "num_classes = 6, and that of" in line]
    shared = [line for line in told if "the sample is also trained on" in line]
    assert len(shared) == len(np.intersect1d(train.ids, test.ids)) < 10
    shutil.rmtree(tmp_path / "test")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    report = check(tmp_path)
    assert len([line for line in errors(report) if "the sample is also trained on" in line]) == 10
    assert [line for line in errors(report) if line == f"{tmp_path}/test: 96 more samples are also in {tmp_path}/train"]
    assert len([line for line in errors(report) if " is " in line and "(uuid " in line]) == 3
    assert report.errors == 106 + 3


def test_pictures_that_can_not_be_decoded_are_told_unless_it_is_quick(tmp_path):
    rng = np.random.default_rng(0)
    records = [encode(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)) for _ in range(5)]
    records[1] = records[1][:-40]
    records[3] = b"no picture"
    records[4] = encode(np.full((8, 8, 3), 77, np.uint8))
    folder = write_encoded(tmp_path / "train", "image", records)
    report = check(folder)
    told = [(problem.dataset, problem.index) for problem in report.problems if not problem.warning]
    assert told == [("bytes", 1), ("bytes", 3)]
    assert errors(report)[0].startswith(f"{folder / 'a.h5'}, bytes[1]: its JPEG data are damaged")
    assert warnings(report) == [f"{folder / 'a.h5'}, bytes[4]: all of the sample is one value"]
    assert check(folder, quick=True).problems == []


def test_records_that_are_no_whole_frames_are_told(tmp_path):
    records = [bytes(range(6)), bytes(range(13)), bytes(range(18))]
    told = errors(check(write_encoded(tmp_path / "train", "frames", records, shape=(6,))))
    assert len(told) == 1
    assert "bytes: sample 1 has 13 bytes, which are not frames of 6" in told[0]


def test_lists_of_labels_may_be_empty_but_not_say_a_class_twice(tmp_path):
    labels = Lists(np.array([0, 0, 3, 4]), np.array([1, 0, 1, 1]))
    report = check(write_encoded(tmp_path / "train", "frames", [b"ab", b"cd", b"ef"], labels, shape=(2,)))
    assert report.unlabelled == 1
    assert "1 of them without a label" in str(report)
    assert errors(report) == []
    assert ["y_indices[2] = 1: sample 1 has this label twice" in line for line in warnings(report)] == [True]


def test_numbers_that_are_not_finite_and_constant_samples_are_told(write_folder):
    data = write_folder(dtype="float32", counts=(9,), block=9)
    data.x[2, 0, 0, 1] = np.nan
    data.x[5] = data.x[5, 0, 0]
    path = path_of(data, 0)
    shard = write_shard(path, data.manifest, data.labels, data.ids, [data.x])
    replace(data.manifest, shards=(shard,)).write(data.folder)
    report = check(data.folder)
    assert errors(report) == [
        f"{path}, x[2]: it holds a number that isn't finite; leave the sample out and pack the data again"
    ]
    assert f"{path}, x[5]: all of the sample is one value" in warnings(report)


def test_a_manifest_that_its_shards_contradict_is_told(data):
    manifest, counts = data.manifest, list(data.manifest.histogram)
    counts[3] += 1
    replace(manifest, histogram=tuple(counts), mean=(300.0, 1.0), std=(1.0, -1.0)).write(data.folder)
    told = errors(check(data.folder))
    assert len(told) == 3
    assert f"histogram[3] = {counts[3]}, and the shards hold {counts[3] - 1} samples of class 3" in told[2]
    assert "mean[0] = 300 is not the mean of uint8 numbers" in told[0]
    assert "std[1] = -1 is no deviation of uint8 numbers" in told[1]


def test_a_class_without_samples_and_a_constant_channel_are_warned_of(data):
    replace(
        data.manifest, num_classes=7, class_names=tuple("abcdefg"), std=(0.0, 1.0),
    ).write(data.folder)  # fmt: skip
    for number, (lo, hi) in enumerate(zip(data.cuts[:-1], data.cuts[1:], strict=True)):
        labels = np.where(data.labels[lo:hi] == 5, 4, data.labels[lo:hi]).astype(np.int32)
        doctor(data, number, lambda file, labels=labels: file["y"].write_direct(labels))
    counts = histogram(np.where(data.labels == 5, 4, data.labels), 7)
    replace(data.manifest, histogram=tuple(counts), class_names=tuple("abcdefg"), std=(0.0, 1.0)).write(data.folder)
    report = check(data.folder)
    assert errors(report) == []
    assert ["std[0] = 0" in line or "class 5 (f) has no samples" in line for line in warnings(report)] == [True, True]


def test_an_edited_and_an_unreadable_manifest_are_told(data):
    path = data.folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"block": 8', '"block":8 '))
    assert check(data.folder).problems == []
    path.write_text(text.replace('"samples": 106', '"samples": 107'))
    told = errors(check(data.folder))
    assert told == [f"{path}: samples = 107, and its shards hold 106; pack the data again"]
    mean = f"{data.manifest.mean[0]}"
    path.write_text(text.replace(mean, "1" + mean))
    assert "it was damaged, or changed by hand" in errors(check(data.folder))[0]
    path.write_text(text[:200])
    (data.folder / ".x.h5.1.tmp").touch()
    report = check(data.folder)
    assert ["manifest.json can't be read" in line for line in errors(report)] == [True]
    assert len(warnings(report)) == 1


@pytest.fixture
def broken_hdf5(tmp_path):
    """Let HDF5 do something else where it opens a file, in processes that start with the result as PYTHONPATH."""

    def broken(statement):
        (tmp_path / "site").mkdir()
        text = f"import os, time, h5py\ndef broken(*arguments):\n    {statement}\nh5py.h5f.open = broken\n"
        (tmp_path / "site" / "sitecustomize.py").write_text(text)
        return str(tmp_path / "site")

    return broken


def test_a_shard_that_hdf5_dies_of_is_told_and_the_others_are_checked(data, broken_hdf5, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", broken_hdf5("os.abort()"))
    flip(path_of(data, 0), 100)
    flip(path_of(data, 2), 100)
    report = check(data.folder)
    crashes = [line for line in errors(report) if "the HDF5 library crashes on it (SIGABRT)" in line]
    assert [line.split(":")[0] for line in crashes] == [str(path_of(data, 0)), str(path_of(data, 2))]
    assert report.shards == 3


def test_a_check_ends_at_ctrl_c_also_while_hdf5_hangs(data, broken_hdf5, start_python):
    site = broken_hdf5("open(os.environ['BEGUN'], 'w').close() or time.sleep(600)")
    flip(path_of(data, 2), 100)
    begun = data.folder.parent / "begun"
    start = "import os, sys; os.environ['PYTHONPATH'] = sys.argv.pop(1); import dpnn.cli; sys.exit(dpnn.cli.main())"
    program = start_python("-c", start, site, "data", "check", data.folder, env={"BEGUN": str(begun)})
    while not begun.exists():
        assert program.process.poll() is None
        time.sleep(0.01)
    os.kill(program.process.pid, signal.SIGINT)
    ended = program.finish(30)
    assert ended.returncode == 128 + signal.SIGINT
    assert "interrupted after 1 folder" in ended.stdout


def test_training_opens_by_hdf5_only_what_has_the_manifest_s_digest(data, monkeypatch):
    opened = []
    original = h5py.h5f.open
    monkeypatch.setattr(h5py.h5f, "open", lambda name, *rest: opened.append(os.fsdecode(name)) or original(name, *rest))
    flip(path_of(data, 1), 100)
    with pytest.raises(DataError, match="metadata are damaged"):
        check_shards(data.folder, data.manifest)
    assert opened == [str(path_of(data, 0))]


def test_the_command_prints_lines_and_its_exit_code_tells_of_errors(data, capsys):
    assert cli.main(["data", "check", str(data.folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 errors, 0 warnings")
    flip(path_of(data, 1), 100)
    (data.folder / ".x.h5.1.tmp").touch()
    assert cli.main(["data", "check", str(data.folder)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"error: {path_of(data, 1)}: the labels, ids or metadata are damaged")
    assert lines[-2].startswith("warning: ")
    assert cli.main(["data", "check", "--json", str(data.folder)]) == 3
    *found, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["level"] for line in found][-1] == "warning"
    assert found[0]["file"] == str(path_of(data, 1))
    assert (summary["level"], summary["shards"], summary["warnings"]) == ("summary", 3, 1)


def test_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    assert cli.main(["data", "check", str(tmp_path / "nowhere")]) == 3
    assert "doesn't exist; write it with `dpnn pack" in capsys.readouterr().out
