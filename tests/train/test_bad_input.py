"""What is wrong with a job or its data is told before training, in one message, with the exit code of its kind."""

import os
import shutil
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest

from dpnn import cli
from dpnn.comm.notes import Notes
from dpnn.data import shards
from dpnn.data.manifest import Manifest
from dpnn.observe import metrics

TEXT = """
[data]
train = "{data}/train"
test = "{data}/test"
[model]
name = "lenet"
kernel = 3
[train]
epochs = 1
global_batch = 16
[optimizer]
lr = 0.01
[output]
dir = "{out}"
"""


def shard(data: Path, number: int = 0) -> Path:
    return sorted((data / "train").glob("*.h5"))[number]


def cut_shard(data: Path) -> None:
    os.truncate(shard(data, 1), shard(data, 1).stat().st_size - 100)


def remove_shard(data: Path) -> None:
    shard(data, 2).unlink()


def add_shard(data: Path) -> None:
    shutil.copy(shard(data), data / "train" / "train-00003-of-00004.h5")


def flip_byte_of_labels(data: Path) -> None:
    with h5py.File(shard(data), "r") as file:
        place = file["y"].id.get_offset()
    content = bytearray(shard(data).read_bytes())
    content[place] ^= 1
    shard(data).write_bytes(content)


def label_out_of_range(data: Path) -> None:
    """A shard that was written so: its digest is right."""
    with h5py.File(shard(data), "r+") as file:
        file["y"][7] = 99
    manifest = Manifest.read(data / "train")
    first = manifest.shards[0]
    file = shards.open_shard(shard(data))
    digest = shards.read_outside(file, shard(data), first).digest
    os.close(file)
    changed = (msgspec.structs.replace(first, digest=digest), *manifest.shards[1:])
    msgspec.structs.replace(manifest, shards=changed).write(data / "train")


def cut_manifest(data: Path) -> None:
    os.truncate(data / "train" / "manifest.json", 300)


def remove_manifest(data: Path) -> None:
    (data / "train" / "manifest.json").unlink()


DAMAGES = [
    (cut_shard, "train-00001-of-00003.h5 has ", "is truncated; copy the shard again, or pack the data again"),
    (remove_shard, "train-00002-of-00003.h5: the manifest names this shard, but it is missing", "pack the data again"),
    (add_shard, "train-00003-of-00004.h5, which its manifest doesn't name", "remove it, or pack the data again"),
    (flip_byte_of_labels, "train-00000-of-00003.h5: the labels, ids or metadata are damaged", "pack the data again"),
    (label_out_of_range, "train-00000-of-00003.h5, y[7] = 99: the label of sample 7 is not in 0..4", "pack the data"),
    (cut_manifest, "train/manifest.json can't be read", "pack the data again"),
    (remove_manifest, "train holds no manifest.json", "write it with `dpnn pack SOURCE FOLDER`"),
]

# Settings, exit code, what the message names, and the way out that it tells.
MISTAKES = [
    (["train.epoch=3"], 2, "train.epoch = 3: there is no such key", "did you mean train.epochs?"),
    (["train.epochs=1.5"], 2, "train.epochs = 1.5", "a whole number of 1 or more is wanted"),
    (["optimizer.lr='fast'"], 2, 'optimizer.lr = "fast"', "a number above 0 is wanted"),
    (["optimizer.lr=-1"], 2, "optimizer.lr = -1", "a number above 0 is wanted"),
    (["optimizer.name=adam"], 2, 'optimizer.name = "adam"', '"sgd", "momentum" or "adagrad" is wanted'),
    (["parallel.strategy=allredcue"], 2, '"allredcue"', 'did you mean "allreduce"?'),
    (["train.steps=10"], 2, "train.epochs = 1 and train.steps = 10", "exactly one of them is wanted"),
    (["data.train=nowhere"], 3, "the data folder nowhere doesn't exist", "write it with `dpnn pack SOURCE FOLDER`"),
    (["data.test=nowhere"], 3, "the data folder nowhere doesn't exist", "write it with `dpnn pack SOURCE FOLDER`"),
    (["data.train={data}"], 3, "{data} holds no manifest.json", "did you mean {data}/test or {data}/train?"),
    (["data.lanes=5"], 2, "train.global_batch = 16 can't be divided among data.lanes = 5", "use a multiple of 5"),
    (["model.name=lennet"], 2, "model.name = 'lennet' is not a model", "did you mean lenet?"),
    (["model.filtres=3"], 2, "model.filtres is not an option of lenet", "did you mean filters?"),
    (["model.filters='many'"], 2, "model.filters = 'many'", "Expected `array`"),
    (["model.kernel=9", "model.filters=[4,4]"], 2, "conv2", ""),
    (["model.name={nets}:absent"], 2, "has no function absent", "known are mixed, heads, smooth, plain"),
    (["model.name=absent.py:net"], 2, "there is no file absent.py", "seen from"),
    (["model.classes=3"], 2, "model.classes = 3, but {data}/train has 5 classes", "leave the key out"),
    (["train.loss=sigmoid"], 2, "train.loss = 'sigmoid'", "use 'softmax'"),
    (["data.train={tags}/train", "data.test="], 2, "{tags}/train has several labels a sample", "use 'sigmoid'"),
    (["data.test={tags}/test"], 3, "{tags}/test: its shape is (6,)", "pack both alike"),
    (["data.augment=flop"], 2, 'data.augment = "flop"', '"none", "crop-flip" or "imagenet" is wanted'),
    (
        ["data.train={tags}/train", "data.test=", "train.loss=sigmoid", "data.augment=crop-flip"],
        2,
        "needs images (H, W, C), and the samples are float32 of shape (6,)",
        'use "none"',
    ),
    (
        ["data.train={tags}/train", "data.test=", "train.loss=sigmoid"],
        2,
        "conv1: can't take an input of shape (6,)",
        "",
    ),
    (["output.dir=/proc/run"], 2, "the run folder /proc/run can't be made", "set output.dir"),
    (["nonsense"], 2, "--set nonsense", "KEY=VALUE is wanted, as in train.epochs=3"),
]


@pytest.fixture
def data(images, tmp_path) -> Path:
    """The data, so that they may be damaged."""
    return shutil.copytree(images, tmp_path / "data")


def check(code: int, stderr: str, folder: Path, wanted: tuple[int, str, str]) -> None:
    """One message and no traceback, the right code, and not one step was taken."""
    assert code == wanted[0], stderr
    (line,) = stderr.splitlines()
    assert line.startswith("dpnn: ")
    assert wanted[1] in line
    assert wanted[2] in line
    lines = metrics.read(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    assert {line["kind"] for line in lines} <= {"end"}


@pytest.mark.parametrize(("settings", "code", "culprit", "way_out"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_wrong_job_is_refused(job, images, tags, request, capfd, settings, code, culprit, way_out):
    places = {"data": images, "tags": tags, "nets": request.path.parent / "networks.py"}
    made = job(text=TEXT)
    words = [word for setting in settings for word in ("--set", setting.format(**places))]
    found = cli.main(["train", str(made.path), *words])
    check(found, capfd.readouterr().err, made.out, (code, culprit.format(**places), way_out.format(**places)))
    assert not made.out.exists()


@pytest.mark.parametrize(("damage", "culprit", "way_out"), DAMAGES)
def test_damaged_data_are_refused(job, data, capfd, damage, culprit, way_out):
    damage(data)
    made = job(text=TEXT, data=data)
    found = cli.main(["train", str(made.path)])
    check(found, capfd.readouterr().err, made.out, (3, culprit, way_out))


@pytest.mark.parametrize("damage", [cut_shard, label_out_of_range])
def test_damaged_data_are_refused_by_all_ranks(mpirun, job, data, damage):
    _, culprit, way_out = next(found for found in DAMAGES if found[0] is damage)
    damage(data)
    made = job(text=TEXT, data=data)
    ended = mpirun(3, "train", made.path)
    check(ended.returncode, own(ended.stderr), made.out, (3, culprit, way_out))


@pytest.mark.parametrize(
    ("settings", "code", "culprit", "way_out"),
    [
        (["train.epoch=3"], 2, "train.epoch = 3: there is no such key", "did you mean train.epochs?"),
        (
            ["data.lanes=1"],
            2,
            "data.lanes = 1 is less than the 2 replicas",
            "use at most 1 replicas, or set data.lanes",
        ),
        (["train.global_batch=1"], 2, "data.lanes = 1 is less than the 2 replicas", ""),
        (["model.kernel=9", "model.filters=[4,4]"], 2, "conv2", ""),
    ],
)
def test_a_wrong_job_is_refused_by_all_ranks(mpirun, job, settings, code, culprit, way_out):
    made = job(text=TEXT)
    ended = mpirun(2, "train", made.path, *(word for setting in settings for word in ("--set", setting)))
    check(ended.returncode, own(ended.stderr), made.out, (code, culprit, way_out))
    assert not made.out.exists()


def test_fewer_samples_than_ranks(mpirun, job, tmp_path):
    np.savez(tmp_path / "few.npz", x=np.zeros((3, 12, 12, 1), np.uint8), y=np.arange(3))
    assert cli.main(["pack", str(tmp_path / "few.npz"), str(tmp_path / "few"), "--test-fraction", "0.34"]) == 0
    made = job(text=TEXT, data=tmp_path / "few")
    ended = mpirun(3, "train", made.path)
    wanted = 3, "2 samples can't be divided among 3 replicas", "use fewer ranks or more data"
    check(ended.returncode, own(ended.stderr), made.out, wanted)


def test_a_folder_that_holds_a_run_is_not_overwritten(job, capfd):
    made = job(text=TEXT)
    assert cli.main(["train", str(made.path)]) == 0
    before = (made.out / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert cli.main(["train", str(made.path)]) == 2
    assert "holds a run already; go on with --resume, or name another folder" in capfd.readouterr().err
    assert (made.out / "metrics.jsonl").read_bytes() == before


def test_a_job_that_was_refused_can_be_corrected_and_started_again(job, capfd):
    made = job(text=TEXT)
    assert cli.main(["train", str(made.path), "--set", "model.kernel=9"]) == 2
    assert cli.main(["train", str(made.path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "culprit", "way_out"),
    [
        (["train"], 2, "name a job file", "--resume RUN"),
        (["train", "absent.toml"], 2, "absent.toml", "check the path"),
        (["train", "--resume", "absent"], 2, "absent is not a run folder", "name the folder that `train` printed"),
        (["eval", "absent"], 3, "absent is neither a checkpoint nor a run folder with one", "`dpnn train` printed"),
        (["eval", "{data}/test"], 3, "is neither a checkpoint nor a run folder with one", "`dpnn train` printed"),
        (["eval", "{data}/train/manifest.json"], 3, "manifest.json is cut short, or is no checkpoint of dpnn", ""),
        (["eval", "/"], 3, "/ is neither a checkpoint nor a run folder with one", ""),
        (["pack", "absent", "out"], 2, "'absent' doesn't exist", 'name a file or folder of data, or "digits"'),
        (["pack", "{nets}", "out"], 2, "is none of the known formats", "name it by --format: digits, "),
        (["pack", "{data}", "out"], 2, "{data}", "--x DATASET for the samples"),
        (["pack", "{data}.npz", "out", "--seed", "-1"], 2, "seed = -1 is not from 0 to 4294967295", ""),
        (["launch", "-n", "0", "train"], 2, "-n 0", "at least 1 rank"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_command_is_refused(images, request, capfd, tmp_path, monkeypatch, arguments, code, culprit, way_out):
    places = {"data": images, "nets": request.path.parent / "networks.py"}
    monkeypatch.chdir(tmp_path)
    found = cli.main([word.format(**places) for word in arguments])
    check(found, capfd.readouterr().err, tmp_path, (code, culprit.format(**places), way_out))
    assert list(tmp_path.iterdir()) == []


def own(stderr: str) -> str:
    """Without what mpirun says itself; `dpnn launch` keeps that back."""
    notes = Notes()
    return (notes.feed(stderr.encode()) + notes.rest()).decode()
