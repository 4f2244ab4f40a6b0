"""From `pack` to `eval`, as a user goes: what each command leaves behind, and how a person stops it."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dpnn import cli, config
from dpnn.observe import metrics

TAGGED = """
[data]
train = "{data}/train"
test = "{data}/test"
[model]
name = "NETS:vectors"
[train]
epochs = 5
global_batch = 16
loss = "sigmoid"
[optimizer]
lr = 0.3
[output]
dir = "{out}"
"""


@pytest.fixture
def evaluated(mpirun, python):
    """evaluated(ranks, ...) -> what `dpnn eval` printed."""

    def run(ranks: int, *arguments: object) -> str:
        line = ("eval", *arguments)
        ended = mpirun(ranks, *line) if ranks > 1 else python("-m", "dpnn", *line)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr == ""
        return ended.stdout

    return run


def test_a_checkpoint_of_three_ranks_scores_alike_on_one_and_three(trained, evaluated, last):
    folder = trained(3, "train.epochs=0", "train.steps=20", "train.eval_every=0", "backend.precision=float64")
    one, three = evaluated(1, folder), evaluated(3, folder)
    print(f"on one rank and on three: {one}", end="")
    assert one == three
    assert re.fullmatch(r"top-1 error \d+\.\d\d%, top-5 error 0\.00%, loss \d\.\d{4} \(61 samples\)\n", one)
    (file,) = sorted((folder / "checkpoints").iterdir())[-1:]
    assert evaluated(1, file) == one


def test_eval_prints_what_training_said_last(trained, evaluated):
    folder = trained(2)
    said = [line for line in metrics.read(folder / "metrics.jsonl") if line["kind"] == "eval"][-1]
    printed = evaluated(1, folder)
    assert printed.startswith(f"top-1 error {said['top1_error']:.2%}, ")
    assert f"loss {said['loss']:.4f} ({said['samples']} samples)" in printed


def test_several_labels_a_sample(mpirun, evaluated, job, tags, request):
    """The sigmoid loss, on vectors in place of images."""
    made = job(data=tags, text=TAGGED.replace("NETS", str(request.path.parent / "networks.py")))
    ended = mpirun(2, "train", made.path)
    assert ended.returncode == 0, ended.stderr
    one, three = evaluated(1, made.out), evaluated(3, made.out)
    assert one == three
    losses = [line["loss"] for line in metrics.read(made.out / "metrics.jsonl") if line["kind"] == "eval"]
    print(f"loss {losses[0]:.3f} after one epoch, {losses[-1]:.3f} after five; {one}", end="")
    assert losses[-1] < 0.8 * losses[0]


def test_eval_on_other_data(trained, evaluated, images):
    assert "(231 samples)" in evaluated(1, trained(2), "--set", f"data.test={images}/train")


@pytest.mark.parametrize(
    ("setting", "code", "told"),
    [
        ("data.test=", 2, "data.test is not set"),
        ("data.test=nowhere", 3, "the data folder nowhere doesn't exist"),
        (
            "data.test={tags}/test",
            3,
            "{tags}/test: its shape is (6,), that of the data that the network was trained on",
        ),
    ],
)
def test_eval_of_data_that_do_not_fit(trained, tags, capfd, messages, setting, code, told):
    folder = trained(2)
    capfd.readouterr()
    assert cli.main(["eval", str(folder), "--set", setting.format(tags=tags)]) == code
    (message,) = messages(capfd.readouterr().err)
    assert told.format(tags=tags) in message


def test_the_built_in_digits(python, tmp_path):
    """Packed where they aren't yet; settings on the command line; a folder with a space; another working folder."""
    text = '[data]\ntrain = "digits"\ntest = "digits"\n[model]\nname = "lenet"\nkernel = 3\nfilters = [4]\n'
    (tmp_path / "first job").write_text(text + "[train]\nsteps = 9\nglobal_batch = 64\n[optimizer]\nlr = 0.05\n")
    line = ("-m", "dpnn", "train", "first job", "--set", "output.dir=my runs/one", "--set", "model.dense=32")
    ended = python(*line, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "1,438 samples, 9 steps of 64" in ended.stdout
    assert "epoch 1: top-1 error " in ended.stdout
    assert "(359 samples)" in ended.stdout
    assert (tmp_path / "data" / "digits" / "train" / "manifest.json").exists()
    again = config.load(str(tmp_path / "my runs" / "one" / "job.toml"))
    assert (again.data.train, again.data.test) == ("data/digits/train", "data/digits/test")
    assert again.model.options["dense"] == 32
    ended = python("-m", "dpnn", "eval", "my runs/one", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_pack_overwrites_only_when_forced(tmp_path, capfd):
    np.savez(tmp_path / "a.npz", x=np.zeros((30, 4, 4), np.uint8), y=np.arange(30) % 3)
    line = ["pack", str(tmp_path / "a.npz"), str(tmp_path / "a"), "--test-fraction", "0.2"]
    assert cli.main(line) == 0
    assert "24 samples of 4x4x1 uint8, 3 classes" in capfd.readouterr().out
    assert cli.main(line) == 2
    assert "holds packed data already; name another folder, or use --force" in capfd.readouterr().err
    assert cli.main([*line, "--force"]) == 0


def test_the_job_that_a_run_keeps_is_the_job_that_it_ran(trained, tmp_path, identical):
    """job.toml has every value written out; trained again from it, the run is the same."""
    folder = trained(2)
    job = config.load(str(folder / "job.toml"))
    assert job.data.lanes == 0
    assert job.model.classes == 5
    assert config.parse(job.dump()) == job
    again = tmp_path / "again"
    assert cli.main(["train", str(folder / "job.toml"), "--set", f"output.dir={again}"]) == 0
    once_more = tmp_path / "once more"
    assert cli.main(["train", str(again / "job.toml"), "--set", f"output.dir={once_more}"]) == 0
    identical(again, once_more)


def test_the_metrics_have_the_keys_of_the_design(trained):
    lines = metrics.read(trained(2) / "metrics.jsonl")
    keys = {}
    for line in lines:
        keys.setdefault(line["kind"], line.keys())
    assert lines[0]["kind"] == "start"
    assert lines[-1]["kind"] == "end"
    assert keys["start"] >= {"dpnn", "numpy", "mpi", "python", "ranks", "replicas", "parts", "parameters", "seed"}
    assert keys["step"] >= {"step", "epoch", "loss", "lr", "images_s", "read", "compute", "wait", "update"}
    assert keys["eval"] >= {"step", "epoch", "top1_error", "top5_error", "loss"}
    assert keys["end"] >= {"steps", "seconds", "images_s", "exit"}
    assert [line["event"] for line in lines if line["kind"] == "event"] == ["checkpoint"] * 2
    assert all(line["read"] >= 0 and line["compute"] > 0 for line in lines if line["kind"] == "step")


def test_only_the_newest_checkpoints_are_kept(job):
    made = job()
    settings = ("--set", "output.checkpoint_every=0.2", "--set", "output.keep=2", "--set", "train.epochs=1")
    assert cli.main(["train", str(made.path), *settings]) == 0
    assert sorted(path.name for path in (made.out / "checkpoints").iterdir()) == [
        "step-000000012.h5",
        "step-000000015.h5",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        ("train.global_batch=1000",),  # larger than the data
        ("train.global_batch=230",),  # a last batch of one sample
        ("data.lanes=1",),
        ("data.window=1",),
        ("data.window_mb=0.0001",),
        ("train.epochs=0", "train.steps=1"),
        ("train.global_batch=0", "train.replica_batch=16"),
        ("data.test=",),
        ("parallel.microbatches=30",),  # more than a batch has samples
    ],
    ids=" ".join,
)
def test_odd_settings_work(job, last, settings):
    made = job()
    words = [word for setting in ("train.epochs=1", *settings) for word in ("--set", setting)]
    assert cli.main(["train", str(made.path), *words]) == 0
    assert all(np.isfinite(array).all() for array in last(made.out).params.values())


@pytest.mark.mpi
def test_ctrl_c_stops_at_a_checkpoint(start_python, job):
    made = job()
    program = start_python("-m", "dpnn", "launch", "-n", 2, "train", made.path, "--set", "train.epochs=1000")
    wait_for_steps(made.out)
    program.signal(signal.SIGINT)
    ended = program.finish()
    assert ended.returncode == 75, ended.stderr
    assert "stopping at the next step; once more to kill" in ended.stderr
    assert "go on with: dpnn train --resume" in ended.stderr
    (saved,) = sorted((made.out / "checkpoints").iterdir())[-1:]
    end = metrics.read(made.out / "metrics.jsonl")[-1]
    assert (end["kind"], end["exit"], f"step-{end['steps']:09d}.h5") == ("end", 75, saved.name)
    assert program.pids() == {}


@pytest.mark.mpi
def test_ctrl_c_twice_kills(start_python, job):
    """One rank is stopped, so that the run can't come to the end of its step.

    mpirun wakes it before it kills, and then the run may still reach its checkpoint: its `end` line says so.
    """
    made = job()
    program = start_python("-m", "dpnn", "launch", "-n", 2, "train", made.path, "--set", "train.epochs=1000")
    wait_for_steps(made.out)
    os.kill(program.pids()[1], signal.SIGSTOP)
    program.signal(signal.SIGINT)
    program.wait_for("once more to kill")
    program.signal(signal.SIGINT)
    code = program.finish().returncode
    ends = [line["exit"] for line in metrics.read(made.out / "metrics.jsonl") if line["kind"] == "end"]
    assert (ends[-1:] or [code]) == [code]
    assert ends or code not in (0, 75)
    assert program.pids() == {}


def wait_for_steps(folder: Path, timeout_s: float = 60) -> None:
    """Until a run has told of its first steps."""
    end = time.monotonic() + timeout_s
    while not (folder / "metrics.jsonl").exists() or b'"step"' not in (folder / "metrics.jsonl").read_bytes():
        assert time.monotonic() < end, "no step in time"
        time.sleep(0.02)
