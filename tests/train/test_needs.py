"""Memory: a job that its nodes can't hold is refused, not killed; one that may be too large says so."""

import sys
from pathlib import Path

import numpy as np
import pytest

from dpnn import config
from dpnn.data.pack import pack
from dpnn.errors import JobError
from dpnn.machine import Share
from dpnn.needs import Need, compare, room_of
from dpnn.prepare import resolve

from .conftest import HERE, JOB

NETWORKS = HERE / "networks.py"
MIB = 1 << 20
HUGE = f"model.name={NETWORKS}:huge"


@pytest.fixture
def line(tmp_path, images):
    """line(*settings) -> the arguments of `python` for a short run."""

    def make(*settings):
        file = tmp_path / "job.toml"
        file.write_text(JOB.format(data=images, out=tmp_path / "run"))
        settings = ("train.epochs=0", "train.steps=1", "train.eval_every=0", *settings)
        return ["-m", "dpnn", "train", file, *(word for setting in settings for word in ("--set", setting))]

    return make


def test_limits_hold_for_the_ranks_inside_them_together():
    machine, inside = {"machine": 10e9}, {"machine": 10e9, "group": 4e9}
    small, large = Need(1e9, 2e9), Need(3e9, 3.5e9)
    assert compare([small, small], [machine, machine], 0) == ""
    assert compare([large, small], [machine, inside], 1) == ""
    assert compare([small, large], [inside, inside], 0).startswith("the job needs about 5.5 GB, and group on ")
    told = compare([large, small, small], [inside] * 3, 2)
    assert told.startswith("the network alone needs at least 5 GB, and group on ")
    assert told.endswith("lets its 3 ranks have 4 GB")


def test_a_network_larger_than_the_control_group_is_refused(start_in_group, line, tmp_path):
    """The kernel would end it."""
    limits = {"limit_in_bytes": 350 * MIB}
    ended = start_in_group("memory", limits, sys.executable, *line(HUGE)).finish()
    assert ended.returncode == JobError.exit_code, ended.stderr
    assert "the network alone needs at least 0.5" in ended.stderr
    assert "control group /sys/fs/cgroup/memory/dpnn-test-" in ended.stderr
    assert "lets its 1 ranks have 0.367 GB; start fewer ranks on a node" in ended.stderr


@pytest.mark.soak
def test_a_placement_is_chosen_that_fits_into_the_control_group(start_in_group, line, tmp_path):
    """Two parts of one network, and its checkpoint; where there is room they take more."""
    settings = (HUGE, "parallel.parts=2", "train.global_batch=64")
    launched = ["-m", "dpnn", "launch", "-n", "2", *line(*settings)[2:]]
    ended = start_in_group("memory", {"limit_in_bytes": 1100 * MIB}, sys.executable, *launched).finish(100)
    assert ended.returncode == 0, ended.stderr
    assert "little_memory" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_job_that_may_need_more_than_slurm_gives_says_so(python, line):
    env = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "90"}
    ended = python(*line(), env=env)
    assert ended.returncode == 0, ended.stderr
    assert "the job needs about 0.10" in ended.stdout
    assert "and job 7 of Slurm on " in ended.stdout


@pytest.mark.parallel(2)
def test_the_least_room_of_all_ranks_counts(world, monkeypatch, shared_path):
    np.savez(shared_path / f"images-{world.rank}.npz", x_train=np.zeros((64, 12, 12, 3), np.uint8), y_train=[0, 1] * 32)
    world.first(lambda: pack(str(shared_path / "images-0.npz"), str(shared_path / "data"), test_fraction=0.5) and None)
    start = resolve(config.parse(JOB.format(data=shared_path / "data", out="run")), Path(), world.size)
    monkeypatch.setattr(world, "room", Share(1e9 * (1 + world.rank), "the machine"))
    assert 0.85e9 < room_of(world, start) < 0.9e9
