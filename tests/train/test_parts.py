"""Whole runs of a network that lies on several ranks: they learn, save, go on and score as those on one rank do."""

import json
import os
import signal

import numpy as np
import pytest

from dpnn.evaluate import Scores
from tests.train.runs import told

from .conftest import HERE

LIMIT = 1e-9
SOAK = pytest.mark.soak
NETWORKS = HERE / "networks.py"
EXACT = ("train.epochs=0", "train.steps=20", "backend.precision=float64", "parallel.microbatches=1")
DEPTH = ("parallel.parts=2", "parallel.placement=depth")
FILTERS = ("parallel.parts=2", "parallel.placement=filters")
BRANCHES = ("parallel.parts=2", "parallel.placement=branches")
THREE = ("parallel.parts=3", "parallel.placement=depth")
BY_HAND = ("parallel.parts=2", 'parallel.placement={"conv1" = [1, 0], "dense*" = [0, 1], "*conv2" = 1, "*conv1" = 0}')
IDLE = ("parallel.parts=2", 'parallel.placement={"maxpool1" = 0, "*" = 1}')
"""The first part holds no parameters, and doesn't read."""
EMPTY = ("parallel.parts=2", 'parallel.placement={"*" = 1}')
"""The first part has nothing to do."""
PIPED = ("parallel.microbatches=3", "optimizer.clip=0.5", "optimizer.lr=0.2")
"""The last batch of an epoch has 7 samples: some micro-batches are empty."""
PLAIN = "model.name=networks.py:plain"
HEADS = "model.name=networks.py:heads"


KEYS = {"step": ("loss", "lr", "epoch"), "eval": ("loss", "top1_error", "top5_error")}


@pytest.fixture
def run(trained, request):
    """run(ranks, *settings) -> the folder of a run; networks are those of networks.py."""

    def make(ranks, *settings):
        return trained(ranks, *(s.replace("networks.py", f"{request.path.parent}/networks.py") for s in settings))

    return make


@pytest.fixture
def alike(last):
    """alike(a, b): two runs have the same parameters and state, losses and scores, up to rounding."""

    def compare(one, other, limit=LIMIT, kinds=("step", "eval")):
        a, b = last(one), last(other)
        assert (a.epoch, a.step, a.steps) == (b.epoch, b.step, b.steps)
        arrays, others = dict(a.arrays()), dict(b.arrays())
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            assert array.dtype == others[name].dtype
            np.testing.assert_allclose(others[name], array, limit, limit * max(1, np.abs(array).max()), err_msg=name)
        for kind in kinds:
            keys = KEYS[kind]
            mine, theirs = (told(folder, kind) for folder in (one, other))
            assert len(mine) == len(theirs)
            for line, its in zip(mine, theirs, strict=True):
                assert [its[key] for key in keys] == pytest.approx([line[key] for key in keys], rel=limit, abs=limit)

    return compare


@pytest.mark.parametrize(
    ("replicas", "parts", "settings"),
    [
        pytest.param(2, DEPTH, (), marks=pytest.mark.smoke),
        pytest.param(2, FILTERS, (*PIPED, "parallel.pipeline=gpipe"), marks=SOAK),
        pytest.param(2, BRANCHES, PIPED, marks=SOAK),
        pytest.param(2, DEPTH, (HEADS, *PIPED), marks=SOAK),
        pytest.param(1, THREE, PIPED, marks=SOAK),
        pytest.param(1, BY_HAND, (), marks=SOAK),
        pytest.param(2, IDLE, (PLAIN, *PIPED), marks=SOAK),
        pytest.param(2, EMPTY, (PLAIN, *PIPED), marks=SOAK),
        pytest.param(
            2, DEPTH, ("train.global_batch=46", "data.window=4"), marks=SOAK
        ),  # the last batch is a single sample
    ],
    ids=["depth", "filters-gpipe", "branches", "heads", "three", "by-hand", "idle", "empty", "last-batch-of-one"],
)
def test_parts_make_no_difference_to_synchronous_training(run, alike, replicas, parts, settings):
    n = int(parts[0].removeprefix("parallel.parts="))
    alike(run(replicas, *EXACT, *settings), run(replicas * n, *EXACT, *settings, *parts))


@pytest.mark.parametrize(
    ("parts", "every"),
    [(DEPTH, 1), pytest.param(FILTERS, 3, marks=SOAK), pytest.param(EMPTY, 0, marks=SOAK)],
    ids=["depth", "filters", "empty"],
)
def test_parts_make_no_difference_to_averaging(run, alike, parts, every):
    settings = (*EXACT, PLAIN, "parallel.strategy=average", f"parallel.every={every}", *PIPED)
    alike(run(2, *settings), run(4, *settings, *parts))


def test_parts_make_no_difference_where_lanes_are_dealt_by_speed(run, alike):
    alike(run(2, *EXACT), run(4, *EXACT, *DEPTH, "train.balance=true"))


@pytest.mark.parametrize("parts", [pytest.param(DEPTH, marks=SOAK), IDLE], ids=["depth", "idle"])
def test_replicas_of_parts_end_with_the_same_bits_where_that_is_asked_for(run, identical, parts):
    chosen = (PLAIN, "train.reproducible=true", "optimizer.clip=0.5", "backend.threads=1")
    identical(run(2, *chosen, *parts), run(4, *chosen, *parts))


@SOAK
def test_a_checkpoint_of_one_mesh_is_read_at_any_other(mpirun, job, run, alike, last):
    """By filters, on one rank, by depth on four, by hand in two replicas, by branches."""
    it, done = job(), 0
    command = ["train", it.path]
    four = ("parallel.parts=4", "parallel.placement=depth")
    one = ("parallel.parts=1", "parallel.placement=auto")
    for ranks, parts in ((2, FILTERS), (1, one), (4, four), (4, BY_HAND), (2, BRANCHES)):
        done += 4
        settings = (*EXACT, *parts, f"train.steps={done}")
        ended = mpirun(ranks, *command, *(word for setting in settings for word in ("--set", setting)))
        assert ended.returncode == 0, ended.stderr
        assert last(it.out).steps == done
        command = ["train", "--resume", it.out]
    alike(run(1, *EXACT), it.out, kinds=("step",))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=SOAK), pytest.param(2, marks=SOAK), 3])
def test_a_run_of_parts_is_evaluated_on_any_number_of_ranks(run, mpirun, ranks):
    folder = run(4, *EXACT, *DEPTH)
    ended = mpirun(ranks, "eval", folder)
    assert ended.returncode == 0, ended.stderr
    line = told(folder, "eval")[-1]
    wanted = Scores(61, line["top1_error"], line["top5_error"], line["loss"])
    assert str(wanted) in ended.stdout


def test_stopped_and_resumed_parts_end_with_the_same_bits(
    start_mpirun, mpirun, run, identical, job, until_trained, messages
):
    """One rank gets the signal, one that doesn't read the data."""
    settings = ("train.epochs=4", *DEPTH, "parallel.microbatches=2")
    it = job()
    program = start_mpirun(4, "train", it.path, *(word for setting in settings for word in ("--set", setting)))
    until_trained(program, it.out)
    os.kill(program.pids()[3], signal.SIGTERM)
    ended = program.finish()
    assert ended.returncode == 75, ended.stderr
    (message,) = messages(ended.stderr)
    assert message.startswith("dpnn: stopped after step ")
    ended = mpirun(4, "train", "--resume", it.out)
    assert ended.returncode == 0, ended.stderr
    identical(it.out, run(4, *settings))


def test_a_chosen_placement_is_kept_when_the_run_goes_on(mpirun, job):
    it = job()
    settings = ("parallel.parts=2", "train.epochs=0", "train.steps=4")
    line = [word for setting in settings for word in ("--set", setting)]
    ended = mpirun(2, "train", it.path, *line)
    assert ended.returncode == 0, ended.stderr
    assert "costs measured: " in ended.stdout
    choices = json.loads((it.out / "choices.json").read_text())
    (asked,) = (key for key in choices if key.startswith("placement over 2 parts"))
    ended = mpirun(2, "train", "--resume", it.out, "--set", "train.steps=8")
    assert ended.returncode == 0, ended.stderr
    assert "costs measured: " not in ended.stdout
    assert json.loads((it.out / "choices.json").read_text())[asked] == choices[asked]


def test_a_network_too_large_for_one_rank_trains_on_four(mpirun, job):
    it = job()
    settings = (f"model.name={NETWORKS}:large", "parallel.memory_gb=0.004", "train.epochs=0", "train.steps=3")
    line = [word for setting in settings for word in ("--set", setting)]
    ended = mpirun(1, "train", it.path, *line)
    assert (ended.returncode, it.out.exists()) == (2, False)
    assert "with parallel.parts = 1 the least is " in ended.stderr
    ended = mpirun(4, "train", it.path, *line, "--set", "parallel.parts=4")
    assert ended.returncode == 0, ended.stderr
    (end,) = told(it.out, "end")
    assert end["exit"] == 0
