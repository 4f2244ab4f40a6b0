"""`dpnn train` on encoded pictures: the same losses on any number of ranks; bad ones stop the run, or are skipped."""

from pathlib import Path

import pytest

from dpnn import cli
from dpnn.observe import metrics
from tests.pictures import jpegs, write_encoded

COUNTS = (61, 40, 50)
NETWORKS = Path(__file__).parent / "networks.py"
JOB = f"""
seed = 3
[data]
train = "{{data}}/train"
test = "{{data}}/test"
size = 12
augment = "imagenet"
window = 8
[model]
name = "{NETWORKS}:plain"
[train]
epochs = 2
global_batch = 16
[optimizer]
lr = 0.01
[backend]
precision = "float64"
[output]
dir = "{{out}}"
"""
DOWNPOUR = (
    "train.global_batch=0", "train.replica_batch=16", "parallel.strategy=downpour", "parallel.servers=1",
    "optimizer.name=sgd", "backend.precision=float32",
)  # fmt: skip
AVERAGE = ("parallel.strategy=average", "parallel.every=4")


@pytest.fixture
def pictures(tmp_path):
    """pictures(*bad) -> a folder with train and test, in which the pictures of these numbers are cut short."""

    def write(*bad):
        records, labels = jpegs(sum(COUNTS))
        records = [record[: len(record) // 2] if number in bad else record for number, record in enumerate(records)]
        write_encoded(tmp_path / "data/train", records, labels, COUNTS)
        write_encoded(tmp_path / "data/test", *jpegs(30, seed=5), (30,))
        return tmp_path / "data"

    return write


@pytest.fixture
def run(mpirun, python, tmp_path):
    """run(data, ranks, *settings) -> (what came back, the lines of its metrics)."""

    def train(data, ranks, *settings):
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        job = tmp_path / "job.toml"
        job.write_text(JOB.format(data=data, out=out))
        line = ["train", job, *(word for setting in settings for word in ("--set", setting))]
        ended = mpirun(ranks, *line) if ranks > 1 else python("-m", "dpnn", *line)
        return ended, metrics.read(out / "metrics.jsonl")

    return train


def of_kind(lines, kind):
    return [line for line in lines if line["kind"] == kind]


def test_losses_are_the_same_on_any_number_of_ranks(pictures, run, tmp_path, capfd):
    data, losses = pictures(), []
    for ranks, threads in ((1, 1), (2, 3)):
        ended, lines = run(data, ranks, f"data.threads={threads}")
        assert ended.returncode == 0, ended.stderr
        losses.append([line["loss"] for line in of_kind(lines, "step")])
        assert [line["bad_samples"] for line in of_kind(lines, "eval")] == [0, 0]
    assert len(losses[0]) == 2 * 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    assert cli.main(["eval", str(tmp_path / "run1")]) == 0
    error = of_kind(lines, "eval")[-1]["top1_error"]
    assert f"top-1 error {error:.2%}" in capfd.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bad_picture_stops_the_run_on_all_ranks_with_its_name(pictures, run, messages, ranks):
    ended, _ = run(pictures(70), ranks)
    assert ended.returncode == 3, ended.stderr
    (message,) = messages(ended.stderr)
    assert "train-00001-of-00003.h5, sample 9 (id 1070): its JPEG" in message
    assert 'set data.on_bad = "skip"' in message


@pytest.mark.parametrize("settings", [(), AVERAGE, DOWNPOUR], ids=["allreduce", "average", "downpour"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_skipped_pictures_are_named_and_counted_over_all_ranks(pictures, run, ranks, settings):
    if settings == DOWNPOUR and ranks == 1:
        pytest.skip("a server and a worker are two ranks")
    bad = (7, 8, 30, 70, 120)
    ended, lines = run(pictures(*bad), ranks, "data.on_bad=skip", *settings)
    assert ended.returncode == 0, ended.stderr
    named = [line for line in of_kind(lines, "event") if line["event"] == "bad_sample"]
    assert sorted(line["id"] for line in named) == sorted(1000 + number for number in 2 * bad)
    assert {Path(line["file"]).name for line in named} == {f"train-0000{n}-of-00003.h5" for n in range(3)}
    assert all("JPEG" in line["reason"] and line["sample"] < 61 for line in named)
    (end,) = of_kind(lines, "end")
    assert end["bad_samples"] == 2 * len(bad)
    counts = [line["bad_samples"] for line in of_kind(lines, "step")]
    assert counts == sorted(counts)
    assert 0 < counts[-1] <= 2 * len(bad)


@pytest.mark.parametrize("settings", [(), AVERAGE, DOWNPOUR], ids=["allreduce", "average", "downpour"])
def test_more_bad_pictures_than_the_limit_end_the_run_with_the_last_name(pictures, run, messages, settings):
    ended, _ = run(pictures(7, 8, 30, 70, 120), 3, "data.on_bad=skip", "data.bad_limit=4", *settings)
    assert ended.returncode == 3, ended.stderr
    (message,) = messages(ended.stderr)
    assert "bad samples were skipped" in message
    assert "and data.bad_limit = 4; the last one: " in message
    assert ".h5, sample " in message
    assert 4 < int(message.split(" bad samples")[0].split()[-1]) <= 15


def test_bad_pictures_to_evaluate_on_are_counted_too(pictures, run, tmp_path, capfd):
    data = pictures()
    records, labels = jpegs(30, seed=5)
    records[4] = records[4][:50]
    (data / "test").rename(data / "whole")
    write_encoded(data / "test", records, labels, (30,))
    ended, lines = run(data, 2, "data.on_bad=skip", "train.epochs=1")
    assert ended.returncode == 0, ended.stderr
    assert [line["bad_samples"] for line in of_kind(lines, "eval")] == [1]
    assert cli.main(["eval", str(tmp_path / "run0")]) == 0
    assert "(30 samples, 1 of them replaced)" in capfd.readouterr().out
