"""Whole runs on devices, by the tests' stand-in for a GPU: they learn, save and score as runs on the CPU do."""

import numpy as np
import pytest

from dpnn import checkpoint
from dpnn.observe import metrics
from dpnn.observe.folder import RunFolder

from .conftest import HERE, JOB

STAND_IN = HERE / "programs" / "stand_in.py"
NETWORKS = HERE / "networks.py"
SHORT = ("train.epochs=0", "train.steps=4", "backend.name=cuda")
ON_CPU = "backend.name=reference"
SMOOTH, HEADS = (f"model.name={NETWORKS}:{name}" for name in ("smooth", "heads"))
CLOSE = 1e-4
"""Of the largest number of an array, after a few steps in float32 added up in another order."""
MOMENTUM = ("optimizer.name=momentum", "optimizer.lr=0.02", "optimizer.nesterov=true")
AVERAGE = ("parallel.strategy=average", "parallel.every=2", HEADS)
CASES = {
    "alone": (1, MOMENTUM, ""),
    "clipped": (1, (*MOMENTUM, "optimizer.clip=0.5", "parallel.microbatches=2"), ""),
    "adagrad": (1, ("optimizer.name=adagrad",), ""),
    "allreduce": (2, MOMENTUM, ""),
    "allreduce-clipped": (2, (*MOMENTUM, "optimizer.clip=0.5"), ""),
    "allreduce-mpi": (2, MOMENTUM, "mpi"),
    "allreduce-nccl": (2, MOMENTUM, "nccl"),
    "average": (2, (*AVERAGE, *MOMENTUM), ""),
    "average-reset": (2, (*AVERAGE, "parallel.state=reset", *MOMENTUM), ""),
    "depth": (2, ("parallel.parts=2", "parallel.placement=depth", "parallel.microbatches=2", HEADS), ""),
    "branches": (2, ("parallel.parts=2", "parallel.placement=branches", "parallel.microbatches=1"), ""),
    "filters": (2, ("parallel.parts=2", "parallel.placement=filters", "parallel.microbatches=1", SMOOTH), ""),
}
DOWNPOUR = (
    "parallel.strategy=downpour", "parallel.servers=1", "train.global_batch=0", "train.replica_batch=8",
    "train.steps=6", HEADS,
)  # fmt: skip


@pytest.fixture
def run(mpirun, python, tmp_path, images):
    """run(name, ranks, *settings, way="") -> the run's folder, on stand-ins or, with ON_CPU, on the reference."""

    def train(name, ranks, *settings, way="", wanted=0):
        path = tmp_path / name
        file = path.with_suffix(".toml")
        file.write_text(JOB.format(data=images, out=path))
        line = ["train", file, *(word for setting in settings for word in ("--set", setting))]
        env = {"STAND_IN": way}
        if ranks > 1:
            ended = mpirun(ranks, *line, script=STAND_IN, env=env, timeout=100)
        else:
            ended = python(STAND_IN, *line, env=env, timeout=100)
        assert ended.returncode == wanted, ended.stderr
        return path

    return train


def close(one, other, limit=CLOSE):
    """Two runs have the same parameters and state, losses and scores, up to rounding."""
    (_, a, _), (_, b, _) = (checkpoint.newest(folder / "checkpoints") for folder in (one, other))
    assert (a.epoch, a.step, a.steps) == (b.epoch, b.step, b.steps)
    arrays, others = dict(a.arrays()), dict(b.arrays())
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(others[name], array, limit, limit * max(1, np.abs(array).max()), err_msg=name)
    for kind, key in (("step", "loss"), ("eval", "loss")):
        mine, theirs = ([line[key] for line in told(folder, kind)] for folder in (one, other))
        assert mine == pytest.approx(theirs, rel=limit, abs=limit)


def told(folder, kind):
    return [line for line in metrics.read(folder / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
def test_a_run_on_devices_is_one_on_the_cpu(run, case):
    ranks, settings, way = CASES[case]
    ours = run("device", ranks, *SHORT, *settings, way=way)
    close(ours, run("cpu", ranks, *SHORT, *settings, ON_CPU))
    (start,) = told(ours, "start")
    assert start["backend"] == "cuda"
    assert start["sums_by"] == (way or "host" if "allreduce" in case else "")
    shared = [line for line in told(ours, "event") if line["event"] == "shared_device"]
    assert len(shared) == (ranks > 1 and way != "nccl")


@pytest.mark.mpi
def test_two_ranks_on_devices_are_one(run):
    close(run("one", 1, *SHORT, *MOMENTUM), run("two", 2, *SHORT, *MOMENTUM))


@pytest.mark.mpi
def test_downpour_has_its_servers_on_the_cpu(run):
    close(run("device", 2, *SHORT, *DOWNPOUR), run("cpu", 2, *SHORT, *DOWNPOUR, ON_CPU))


@pytest.mark.mpi
def test_reproducible_runs_have_the_same_bits_on_one_device_and_two(run):
    settings = (*SHORT, *MOMENTUM, "train.reproducible=true", "train.grains=4", HEADS)
    one, two = (run(str(ranks), ranks, *settings) for ranks in (1, 2))
    (_, a, _), (_, b, _) = (checkpoint.newest(folder / "checkpoints") for folder in (one, two))
    for (name, array), (_, other) in zip(a.arrays(), b.arrays(), strict=True):
        assert array.tobytes() == other.tobytes(), name


@pytest.mark.mpi
def test_a_run_goes_on_on_devices_and_is_scored_there(run, python, tmp_path):
    settings = (*SHORT, *MOMENTUM, HEADS)
    whole = run("whole", 1, *settings)
    half = run("half", 1, *settings, "train.steps=2")
    line = [STAND_IN, "train", "--resume", half, "--set", "train.steps=4"]
    assert python(*line, timeout=100).returncode == 0
    (_, a, _), (_, b, _) = (checkpoint.newest(folder / "checkpoints") for folder in (whole, half))
    for (name, array), (_, other) in zip(a.arrays(), b.arrays(), strict=True):
        assert array.tobytes() == other.tobytes(), name
    on_device, on_cpu = (python(*line, "eval", whole, timeout=100) for line in ([STAND_IN], ["-m", "dpnn"]))
    assert on_device.returncode == 0, on_device.stderr
    assert on_device.stdout == told(whole, "eval")[-1].get("text", on_device.stdout)
    assert on_cpu.returncode == 2  # the job says cuda, and this machine has none
    assert "this job needs a GPU" in on_cpu.stderr


@pytest.mark.mpi
def test_a_loss_that_is_not_finite_names_its_layer(run):
    folder = run("bad", 1, *SHORT, "optimizer.lr=1e30", HEADS, wanted=5)
    assert "its output is not finite" in RunFolder(folder).failure.read_text()
