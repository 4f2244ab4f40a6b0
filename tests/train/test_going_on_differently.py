"""A run that goes on with another batch, other lengths, other ranks; and what the review of a run's edges found."""

import subprocess
import sys
import time

import numpy as np
import pytest

from dpnn import checkpoint
from dpnn.observe import metrics

LITTLE = (
    "--set",
    "model.name=lenet",
    "--set",
    "model.filters=[4]",
    "--set",
    "model.kernel=3",
    "--set",
    "model.dense=8",
)


def settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


@pytest.fixture
def one_epoch(python, job):
    """A run of one epoch, of 15 steps of 16."""
    run = job()
    assert python("-m", "dpnn", "train", run.path, *LITTLE, *settings("train.epochs=1")).returncode == 0
    return run


@pytest.mark.parametrize(("batch", "steps"), [(8, 29), (32, 8)])
def test_after_an_epoch_the_batch_may_change_and_the_next_epoch_is_a_whole_one(python, one_epoch, batch, steps):
    changed = settings("train.epochs=2", f"train.global_batch={batch}")
    ended = python("-m", "dpnn", "train", "--resume", one_epoch.out, *changed)
    assert ended.returncode == 0, ended.stderr
    lines = metrics.read(one_epoch.out / "metrics.jsonl")
    taken = [line for line in lines if line["kind"] == "step"]
    assert [line["epoch"] for line in taken] == [1] * 15 + [2] * steps
    found = checkpoint.newest(one_epoch.out / "checkpoints")[0]
    assert (found.epoch, found.step, found.steps) == (2, 0, 15 + steps)


def test_with_a_batch_for_each_replica_the_number_of_ranks_may_change_after_an_epoch(mpirun, python, job):
    run = job()
    by_replica = settings("train.global_batch=0", "train.replica_batch=8", "train.epochs=1")
    assert mpirun(2, "train", run.path, *LITTLE, *by_replica).returncode == 0
    ended = python("-m", "dpnn", "train", "--resume", run.out, *settings("train.epochs=2"))
    assert ended.returncode == 0, ended.stderr
    taken = [line for line in metrics.read(run.out / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["epoch"] for line in taken] == [1] * 15 + [2] * 29


def test_fewer_epochs_than_were_taken_is_a_run_that_is_done(python, job):
    run = job()
    assert python("-m", "dpnn", "train", run.path, *LITTLE).returncode == 0
    ended = python("-m", "dpnn", "train", "--resume", run.out, *settings("train.epochs=1"))
    assert ended.returncode == 0, ended.stderr
    assert "steps are taken" in ended.stdout


def test_a_run_goes_on_with_its_own_job_only(python, one_epoch):
    ended = python("-m", "dpnn", "train", one_epoch.path, "--resume", one_epoch.out)
    assert ended.returncode == 2
    assert "a run goes on with its own job; name one" in ended.stderr


def test_a_damaged_test_shard_is_told_before_training(python, job, images, tmp_path):
    run = job(data=tmp_path / "copy")
    subprocess.run(["cp", "-r", images, tmp_path / "copy"], check=True)
    shard = next((tmp_path / "copy" / "test").glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:-100])
    ended = python("-m", "dpnn", "train", run.path, *LITTLE)
    assert ended.returncode == 3
    assert shard.name in ended.stderr
    assert not [line for line in metrics.read(run.out / "metrics.jsonl") if line["kind"] == "step"]


def test_fewer_test_samples_than_ranks_are_evaluated(mpirun, job, images, tmp_path):
    from dpnn import cli

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (3, 12, 12, 3), np.uint8), np.array([0, 1, 4])
    np.savez(tmp_path / "few.npz", x_train=np.repeat(x, 9, 0), y_train=np.repeat(y, 9), x_test=x, y_test=y)
    assert cli.main(["pack", str(tmp_path / "few.npz"), str(tmp_path / "few")]) == 0
    run = job()
    few = settings("train.epochs=1", f"data.test={tmp_path}/few/test")
    ended = mpirun(4, "train", run.path, *LITTLE, *few)
    assert ended.returncode == 0, ended.stderr
    assert "(3 samples)" in ended.stdout


def test_several_labels_a_sample_on_ranks_whose_lanes_end_before_the_last_window(mpirun, job, tmp_path):
    from dpnn import cli

    rng = np.random.default_rng(0)
    np.savez(tmp_path / "few.npz", x=rng.normal(size=(17, 6)), y=rng.integers(0, 2, (17, 3)).astype(np.uint8))
    assert cli.main(["pack", str(tmp_path / "few.npz"), str(tmp_path / "few")]) == 0
    (tmp_path / "net.py").write_text(
        "from dpnn.nn import Chain, Dense\nclass Own(Chain):\n    pass\n"
        "def net(classes, shape):\n    return Chain(Own(Dense(4)), Dense(classes))\n"
    )
    changed = settings(
        f"data.train={tmp_path}/few/train", "data.test=", "train.loss=sigmoid", "data.lanes=2", "data.augment=none",
        f"model.name={tmp_path}/net.py:net", "train.epochs=2",
    )  # fmt: skip
    ended = mpirun(2, "train", job().path, *changed)
    assert ended.returncode == 0, ended.stderr


def test_a_reader_of_the_output_that_leaves_does_not_end_the_run(job):
    run = job()
    line = [sys.executable, "-m", "dpnn", "train", str(run.path), *LITTLE, *settings("train.epochs=20")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0, process.stderr.read()
        assert process.stderr.read() == b""


def test_a_second_signal_after_the_run_has_stopped_does_not_change_how_it_ends(start_python, job):
    run = job()
    process = start_python("-m", "dpnn", "train", run.path, *LITTLE, *settings("train.epochs=4000"))
    process.wait_for("steps of 16")
    deadline = time.monotonic() + 30
    while process.process.poll() is None and time.monotonic() < deadline:
        process.process.terminate()
        time.sleep(0.002)
    assert process.finish(10).returncode == 75
