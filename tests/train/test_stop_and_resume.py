"""A run that was stopped, however, goes on as if it never had been: the same bits, and no sample lost or seen twice."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dpnn import checkpoint, cli
from dpnn.observe import metrics

EPOCH = 15
"""Steps of an epoch."""
RANDOM = random.Random(2026)
MIDDLE = RANDOM.randrange(1, EPOCH - 1)
LATE = RANDOM.randrange(EPOCH + 1, 2 * EPOCH - 2)
"""Steps in the middle of both epochs."""


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.smoke
def test_stopped_thrice_and_resumed_it_ends_with_the_same_bits(mpirun, trained, identical, job, watched, messages):
    """In the middle of an epoch, at the very end of one, and in the middle of the next; twice by SIGTERM.

    One rank gets the signal. BatchNorm, dropout, augmentation and momentum are all on.
    """
    run = job()
    command, done = ("train", run.path), 0
    for step, rank, name in ((MIDDLE, 1, "SIGTERM"), (EPOCH - 1, 0, "SIGTERM"), (LATE, 1, "SIGUSR1")):
        ended = mpirun(2, *command, script=watched, env={"FAULT": f"{rank} {step - done} {name}"})
        assert ended.returncode == 75, ended.stderr
        done = step + 1
        assert messages(ended.stderr) == [
            f"dpnn: stopped after step {done} of {2 * EPOCH}; go on with: dpnn train --resume {run.out}"
        ]
        assert checkpoints(run.out)[-1] == f"step-{done:09d}.h5"
        command = ("train", "--resume", run.out)
    ended = mpirun(2, *command)
    assert ended.returncode == 0, ended.stderr
    n = identical(run.out, trained(2))
    print(f"stopped after steps {MIDDLE + 1}, {EPOCH}, {LATE + 1}: {n} numbers, none of whose bits differ (limit 0)")
    lines = metrics.read(run.out / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 2 * EPOCH + 1))
    assert [line["exit"] for line in lines if line["kind"] == "end"] == [75, 75, 75, 0]


def test_resumed_on_other_numbers_of_ranks_every_sample_is_seen_once(mpirun, python, job, watched, tmp_path):
    """Two ranks, then three, then one. Seen from outside: what the loader handed to the training loop."""
    run, seen = job(), tmp_path / "seen"
    seen.mkdir()
    first, second = MIDDLE, LATE - MIDDLE - 1
    ended = mpirun(2, "train", run.path, script=watched, env={"SEEN": seen, "FAULT": f"0 {first} SIGTERM"})
    assert ended.returncode == 75, ended.stderr
    again = ("train", "--resume", run.out)
    ended = mpirun(3, *again, script=watched, env={"SEEN": seen, "FAULT": f"2 {second} SIGTERM"})
    assert ended.returncode == 75, ended.stderr
    assert python(watched, *again, env={"SEEN": seen}).returncode == 0
    times = {epoch: Counter() for epoch in (0, 1)}
    for path in seen.iterdir():
        for line in path.read_text().splitlines():
            epoch, _, *ids = map(int, line.split())
            times[epoch].update(ids)
    print(f"{len(list(seen.iterdir()))} processes saw {[len(times[epoch]) for epoch in times]} samples, each once")
    assert len(list(seen.iterdir())) == 6
    for epoch in times:
        assert sorted(times[epoch]) == list(range(231))
        assert set(times[epoch].values()) == {1}


@pytest.mark.parametrize("step", [5, EPOCH + 5])
def test_after_a_kill_it_goes_on_from_the_last_checkpoint(mpirun, trained, identical, job, watched, step):
    """kill -9 on every rank: before the first checkpoint, and after it, when there was time to write it."""
    run = job()
    ended = mpirun(2, "train", run.path, script=watched, env={"FAULT": f"* {step} SIGKILL", "PACE": "0.1"})
    assert ended.returncode not in (0, 75)
    kept = step // EPOCH * EPOCH
    assert checkpoints(run.out) == ([f"step-{kept:09d}.h5"] if kept else [])
    ended = mpirun(2, "train", "--resume", run.out)
    assert ended.returncode == 0, ended.stderr
    assert ("going on at epoch 2, step 16" in ended.stdout) == bool(kept)
    identical(run.out, trained(2))


def test_a_damaged_checkpoint_is_passed_over_and_said(mpirun, trained, identical, tmp_path):
    folder = shutil.copytree(trained(2), tmp_path / "run")
    newest = folder / "checkpoints" / f"step-{2 * EPOCH:09d}.h5"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    ended = mpirun(2, "train", "--resume", folder)
    assert ended.returncode == 0, ended.stderr
    assert f"passed over a damaged checkpoint: {newest}" in ended.stdout
    assert "going on at epoch 2, step 16" in ended.stdout
    identical(folder, trained(2))
    events = [line for line in metrics.read(folder / "metrics.jsonl") if line.get("event") == "damaged_checkpoint"]
    assert len(events) == 1


def test_where_every_checkpoint_is_damaged_it_says_so(trained, tmp_path, capfd, messages):
    folder = shutil.copytree(trained(2), tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["train", "--resume", str(folder)]) == 3
    (message,) = messages(capfd.readouterr().err)
    assert f"no checkpoint in {folder / 'checkpoints'} is good" in message


def test_a_finished_run_has_nothing_left_to_do(trained, tmp_path, last):
    folder = shutil.copytree(trained(2), tmp_path / "run")
    before = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == before


def test_a_finished_run_can_be_made_longer(trained, tmp_path, last):
    folder = shutil.copytree(trained(2), tmp_path / "run")
    assert cli.main(["train", "--resume", str(folder), "--set", "train.epochs=3"]) == 0
    assert last(folder).steps == 3 * EPOCH
    assert cli.main(["train", "--resume", str(folder)]) == 0


def test_a_chosen_window_stays_when_the_run_goes_on(python, job, watched, last):
    run = job()
    little = ("--set", "data.window=0", "--set", "data.window_mb=0.1")
    assert python(watched, "train", run.path, *little, env={"FAULT": "0 4 SIGTERM"}).returncode == 75
    window = last(run.out).info["window"]
    assert window < 1024
    ended = python(watched, "train", "--resume", run.out, "--set", "data.window_mb=2048")
    assert ended.returncode == 0, ended.stderr
    assert last(run.out).info["window"] == window


@pytest.mark.parametrize(
    ("setting", "code", "culprit"),
    [
        ("train.global_batch=32", 2, "global_batch = 32"),
        ("data.lanes=8", 2, "lanes = 8"),
        ("data.window=9", 2, "window = 9"),
        ("seed=4", 2, "seed = 4"),
        ("data.train={images}/test", 3, "{images}/test (digest"),
        ("optimizer.momentum=1", 2, "optimizer.momentum = 1"),
        ("model.width=9", 2, ""),
        ("model.width=10", 2, "conv1.weight has the shape (10, 3, 3, 3), and in"),
        ("optimizer.name=momentum", 2, "optimizer.name = 'momentum'"),
    ],
)
def test_what_cannot_be_changed_on_the_way_is_refused(
    python, trained, images, job, watched, tmp_path, capfd, messages, made, setting, code, culprit
):
    """In the middle of an epoch: the order of samples, the data, the network."""
    if "stopped" not in made.runs:
        run = job()
        line = (watched, "train", run.path, "--set", "optimizer.name=sgd")
        assert python(*line, env={"FAULT": "0 4 SIGTERM"}).returncode == 75
        made.runs["stopped"] = shutil.copytree(run.out, made.folder / "stopped")
    folder = shutil.copytree(made.runs["stopped"], tmp_path / "copy")
    before = checkpoints(folder), (folder / "job.toml").read_text()
    arguments = ["train", "--resume", str(folder), "--set", setting.format(images=images)]
    assert cli.main(arguments) == code
    (message,) = messages(capfd.readouterr().err)
    assert culprit.format(images=images) in message
    assert (checkpoints(folder), (folder / "job.toml").read_text()) == before


def test_the_newest_run_of_a_job_is_found(python, job, watched, tmp_path):
    """`train JOB --resume`, seen from the folder that the run was started in."""
    run = job(out="")
    run.path.write_text(run.path.read_text().replace(f'dir = "{run.out}"', ""))
    line = ("train", run.path)
    assert python("-m", "dpnn", *line, "--set", "train.epochs=1", cwd=tmp_path).returncode == 0
    assert python(watched, *line, cwd=tmp_path, env={"FAULT": "0 4 SIGTERM"}).returncode == 75
    ended = python("-m", "dpnn", *line, "--resume", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "run folder: runs/job-002" in ended.stdout
    assert checkpoint.newest(tmp_path / "runs" / "job-002" / "checkpoints")[0].steps == 2 * EPOCH
