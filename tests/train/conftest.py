"""Small data, packed once, and whole runs of `dpnn train`, each made once."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dpnn import checkpoint, cli
from dpnn.checkpoint import Checkpoint

HERE = Path(__file__).parent
MNIST = HERE.parents[2] / "shared" / "data" / "mnist"
SAMPLES, CLASSES = 231, 5
JOB = f"""
seed = 3
[data]
train = "{{data}}/train"
test = "{{data}}/test"
augment = "crop-flip"
window = 8
[model]
name = "{HERE}/networks.py:mixed"
[train]
epochs = 2
global_batch = 16
[optimizer]
lr = 0.05
weight_decay = 0.001
[output]
dir = "{{out}}"
"""


def pack(folder: Path, **arrays: np.ndarray) -> Path:
    """`dpnn pack` of an .npz file into FOLDER/train and FOLDER/test."""
    np.savez(folder.with_suffix(".npz"), **arrays)
    assert cli.main(["pack", f"{folder}.npz", str(folder), "--shard-mb", "0.03"]) == 0
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """231 + 61 images of 12 x 12 x 3, five classes, in 3 + 1 shards: 14 batches of 16 and one of 7."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, CLASSES, SAMPLES + 61)
    x = rng.normal(128, 40, (CLASSES, 12, 12, 3))[classes] + rng.normal(0, 60, (len(classes), 12, 12, 3))
    x = np.clip(x, 0, 255).astype(np.uint8)
    parts = {"x_train": x[:SAMPLES], "y_train": classes[:SAMPLES], "x_test": x[SAMPLES:], "y_test": classes[SAMPLES:]}
    return pack(tmp_path_factory.mktemp("data") / "images", **parts)


@pytest.fixture(scope="session")
def tags(tmp_path_factory) -> Path:
    """Vectors of 6 numbers with any number of four labels: 64 + 45 of them."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(109, 6)).astype(np.float32)
    y = (x[:, :4] + rng.normal(0, 0.3, (109, 4)) > 0).astype(np.uint8)
    return pack(tmp_path_factory.mktemp("data") / "tags", x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])


@pytest.fixture(scope="session")
def mnist(tmp_path_factory) -> Path:
    """The 60,000 + 10,000 digits."""
    if not MNIST.is_dir():
        pytest.skip(f"there is no {MNIST}: the four idx files of MNIST")
    folder = tmp_path_factory.mktemp("mnist")
    assert cli.main(["pack", str(MNIST), str(folder)]) == 0
    return folder


@pytest.fixture
def job(tmp_path, images):
    """job(name="job", out="run", data=images) -> SimpleNamespace(path, out): a job file in the test's own folder."""

    def write(name: str = "job", out: str = "run", data: Path = images, text: str = JOB) -> SimpleNamespace:
        path, folder = tmp_path / f"{name}.toml", tmp_path / out
        path.write_text(text.format(data=data, out=folder))
        return SimpleNamespace(path=path, out=folder)

    return write


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> SimpleNamespace:
    return SimpleNamespace(folder=tmp_path_factory.mktemp("runs"), runs={})


@pytest.fixture
def trained(mpirun, python, made, images):
    """trained(ranks, *settings) -> the folder of a run with these settings, trained once for all tests."""

    def run(ranks: int, *settings: str) -> Path:
        key = (ranks, settings)
        if key not in made.runs:
            path = made.folder / f"run-{len(made.runs)}"
            file = path.with_suffix(".toml")
            file.write_text(JOB.format(data=images, out=path))
            line = ["train", file, *(word for setting in settings for word in ("--set", setting))]
            ended = mpirun(ranks, *line) if ranks > 1 else python("-m", "dpnn", *line)
            assert ended.returncode == 0, ended.stderr
            made.runs[key] = path
        return made.runs[key]

    return run


def last(folder: Path) -> Checkpoint:
    """The newest checkpoint of a run."""
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    return checkpoint.read(found[0].path)


@pytest.fixture(name="last")
def last_fixture():
    """last(folder) -> Checkpoint."""
    return last


@pytest.fixture
def identical():
    """identical(a, b): the newest checkpoints of two runs hold the same bits; how many numbers that are."""

    def compare(one: Path, other: Path) -> int:
        a, b = last(one), last(other)
        assert (a.epoch, a.step, a.steps) == (b.epoch, b.step, b.steps)
        arrays, others = dict(a.arrays()), dict(b.arrays())
        assert arrays.keys() == others.keys()
        differing = [name for name in arrays if arrays[name].tobytes() != others[name].tobytes()]
        assert differing == []
        return sum(array.size for array in arrays.values())

    return compare


@pytest.fixture
def until_trained():
    """until_trained(program, folder): returns once the first rank has told of a step; fails where the program ends."""

    def wait(program, folder: Path) -> None:
        end, lines = time.monotonic() + 60, folder / "metrics.jsonl"
        while not lines.exists() or b'"kind":"step"' not in lines.read_bytes():
            assert program.process.poll() is None, program.stderr
            assert time.monotonic() < end, "no step in time"
            time.sleep(0.02)

    return wait


@pytest.fixture
def messages():
    """messages(stderr) -> the lines in which dpnn speaks; nothing else may stand there."""

    def found(stderr: str) -> list[str]:
        return [line for line in stderr.splitlines() if line.startswith("dpnn: ")]

    return found


@pytest.fixture
def watched() -> Path:
    return HERE / "programs" / "watched.py"
