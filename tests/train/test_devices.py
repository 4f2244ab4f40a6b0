"""Whole runs on devices, stand-ins or GPUs: they learn, save and score as runs on the CPU do."""

import numpy as np
import pytest

from dpnn.backends.cuda import device_of_rank
from dpnn.native import Unavailable
from dpnn.observe.folder import RunFolder
from tests.train.runs import told

from .conftest import HERE, JOB, last

PROGRAM = HERE / "programs" / "stand_in.py"
NETWORKS = HERE / "networks.py"
SHORT = ("train.epochs=0", "train.steps=4", "backend.name=cuda")
ON_CPU = "backend.name=reference"
SMOOTH, HEADS = (f"model.name={NETWORKS}:{name}" for name in ("smooth", "heads"))
CLOSE = 1e-4
"""Of the largest number of an array, after a few steps in float32 added up in another order."""
MOMENTUM = ("optimizer.name=momentum", "optimizer.lr=0.02", "optimizer.nesterov=true")
AVERAGE = ("parallel.strategy=average", "parallel.every=2", HEADS)
SHORT_BATCH = ("train.global_batch=115", "output.checkpoint_every=0.5")
"""The third batch has one sample, of one replica; then the network is evaluated, and the run goes on."""
CASES = {
    "alone": (1, (*MOMENTUM, "optimizer.clip=0.5", "parallel.microbatches=2")),
    "smooth": (1, (SMOOTH,)),
    "allreduce": (2, (*MOMENTUM, "optimizer.clip=0.5")),
    "allreduce-short": (2, (*MOMENTUM, HEADS, *SHORT_BATCH, "parallel.bucket_mb=0.001")),
    "average": (2, (*AVERAGE, *MOMENTUM)),
    "average-short": (2, (*AVERAGE, *MOMENTUM, *SHORT_BATCH)),
    "average-reset": (2, (*AVERAGE, "parallel.state=reset", *MOMENTUM)),
    "depth": (2, ("parallel.parts=2", "parallel.placement=depth", "parallel.microbatches=2", HEADS)),
    "branches": (2, ("parallel.parts=2", "parallel.placement=branches", "parallel.microbatches=1")),
    "filters": (2, ("parallel.parts=2", "parallel.placement=filters", "parallel.microbatches=1", SMOOTH)),
}
SOAK = ("average-reset", "filters", "branches", "smooth", "average-short")
DOWNPOUR = (
    "parallel.strategy=downpour", "parallel.servers=1", "train.global_batch=0", "train.replica_batch=8",
    "train.steps=6", HEADS,
)  # fmt: skip


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """What a run computes on: a stand-in, or the GPU that is there."""
    if request.param == "gpu":
        try:
            device_of_rank(0)
        except Unavailable as error:
            pytest.skip(f"no GPU: {error}")
    return request.param


@pytest.fixture
def run(mpirun, python, tmp_path, images):
    """run(name, ranks, device, *settings) -> the run's folder."""

    def train(name, ranks, device, *settings, wanted=0, told=""):
        path = tmp_path / name
        file = path.with_suffix(".toml")
        file.write_text(JOB.format(data=images, out=path))
        line = ["train", file, *(word for setting in settings for word in ("--set", setting))]
        env = {"STAND_IN": device}
        if ranks > 1:
            ended = mpirun(ranks, *line, script=PROGRAM, env=env, timeout=100)
        else:
            ended = python(PROGRAM, *line, env=env, timeout=100)
        assert ended.returncode == wanted, ended.stderr
        assert told in ended.stderr
        return path

    return train


def close(one, other, limit=CLOSE):
    """Two runs have the same parameters and state, losses and scores, up to rounding."""
    a, b = last(one), last(other)
    assert (a.epoch, a.step, a.steps) == (b.epoch, b.step, b.steps)
    arrays, others = dict(a.arrays()), dict(b.arrays())
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(others[name], array, limit, limit * max(1, np.abs(array).max()), err_msg=name)
    for kind in ("step", "eval"):
        mine, theirs = ([line["loss"] for line in told(folder, kind)] for folder in (one, other))
        assert mine == pytest.approx(theirs, rel=limit, abs=limit)


def identical(one, other):
    """Two runs have the same bits."""
    a, b = last(one), last(other)
    for (name, array), (_, its) in zip(a.arrays(), b.arrays(), strict=True):
        assert array.tobytes() == its.tobytes(), name


@pytest.mark.mpi
@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.soak if case in SOAK else ()) for case in CASES])
def test_a_run_on_devices_is_one_on_the_cpu(run, device, case):
    ranks, settings = CASES[case]
    ours = run("device", ranks, device, *SHORT, *settings)
    close(ours, run("cpu", ranks, device, *SHORT, *settings, ON_CPU))
    (start,) = told(ours, "start")
    assert (start["backend"], start["sums_by"]) == ("cuda", "host" if case.startswith("allreduce") else "")
    shared = [line for line in told(ours, "event") if line["event"] == "shared_device"]
    assert len(shared) == (ranks > 1)


@pytest.mark.mpi
@pytest.mark.parametrize(("way", "sums_by"), [("mpi", "mpi"), ("nccl", "nccl"), ("nccl on the first", "host")])
def test_devices_sum_among_themselves_and_by_mpi(run, way, sums_by):
    """Where only some have what they need for the former, over the host."""
    ours = run("device", 2, way, *SHORT, *MOMENTUM, HEADS)
    close(ours, run("cpu", 1, way, *SHORT, *MOMENTUM, HEADS, ON_CPU))
    (start,) = told(ours, "start")
    assert start["sums_by"] == sums_by


@pytest.mark.mpi
def test_gradients_of_gpus_and_cpus_are_not_summed(run):
    """In one message that all agree on, before the first step."""
    told = "dpnn: rank 1: computes on the CPU, for want of a GPU, and others on GPUs (a stand-in on the CPU of "
    folder = run("some", 2, "first", *SHORT, "backend.name=auto", wanted=2, told=told)
    assert "in allreduce all ranks do the one or the other" in RunFolder(folder).failure.read_text()
    run("cuda", 2, "first", *SHORT, wanted=2, told="dpnn: rank 1: this job needs a GPU: CUDA finds no GPU")


@pytest.mark.mpi
def test_replicas_on_a_gpu_and_on_a_cpu_are_averaged(run):
    settings = (*SHORT, *AVERAGE, *MOMENTUM, "backend.name=auto")
    close(run("mixed", 2, "first", *settings), run("cpu", 2, "first", *settings, ON_CPU))


@pytest.mark.mpi
def test_a_device_that_never_ends_is_waited_for_no_longer_than_a_rank(run):
    """It may wait for devices of ranks that have stopped."""
    told = "waited 1 s for this rank's device, and others that it sums with: a rank has stopped"
    run("stuck", 1, "stuck", *SHORT, "parallel.stall_abort_s=1", wanted=4, told=told)


@pytest.mark.mpi
def test_downpour_has_its_servers_on_the_cpu(run, device):
    close(run("device", 2, device, *SHORT, *DOWNPOUR), run("cpu", 2, device, *SHORT, *DOWNPOUR, ON_CPU))


@pytest.mark.mpi
def test_reproducible_runs_have_the_same_bits_on_one_rank_and_two(run, device):
    settings = (*SHORT, *MOMENTUM, "train.reproducible=true", "train.grains=4", HEADS)
    identical(*(run(str(ranks), ranks, device, *settings) for ranks in (1, 2)))


@pytest.mark.mpi
def test_a_run_goes_on_on_a_device_and_is_scored_there(run, device, python):
    settings = (*SHORT, *MOMENTUM, HEADS)
    whole, half = run("whole", 1, device, *settings), run("half", 1, device, *settings, "train.steps=2")
    env = {"STAND_IN": device}
    resumed = python(PROGRAM, "train", "--resume", half, "--set", "train.steps=4", env=env, timeout=100)
    assert resumed.returncode == 0, resumed.stderr
    identical(whole, half)
    here = python(PROGRAM, "eval", whole, env=env, timeout=100)
    there = python("-m", "dpnn", "eval", whole, "--set", ON_CPU)
    assert here.returncode == 0, here.stderr
    assert here.stdout == there.stdout


@pytest.mark.mpi
def test_a_loss_that_is_not_finite_names_its_layer(run, device):
    folder = run("bad", 1, device, *SHORT, "optimizer.lr=1e30", HEADS, wanted=5)
    assert "its output is not finite" in RunFolder(folder).failure.read_text()


@pytest.mark.mpi
def test_without_a_gpu_a_job_that_wants_one_is_refused(python, tmp_path, images):
    file = tmp_path / "job.toml"
    file.write_text(JOB.format(data=images, out=tmp_path / "run"))
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    ended = python("-m", "dpnn", "train", file, "--set", "backend.name=cuda", env=hidden)
    assert ended.returncode == 2
    assert "this job needs a GPU" in ended.stderr
    assert not (tmp_path / "run").exists()
