"""Lanes by speed: in proportion, at least one each, all of them."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnn import config
from dpnn.balance import deal, speeds
from dpnn.data import Sampler
from dpnn.evaluate import Model
from dpnn.nn import Chain, Conv, Dense, Flatten, Graph, SoftmaxCrossEntropy
from dpnn.plan import Executor, Placed

SPEEDS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)
JOB = 'data.train = "none"\nmodel.name = "none"\ntrain = {steps = 1, global_batch = 8}\noptimizer.lr = 0.1'


@given(SPEEDS, st.integers(0, 100))
def test_every_replica_gets_a_lane_and_every_lane_a_replica(found, more):
    lanes = len(found) + more
    cuts = deal(np.array(found), lanes)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, lanes, len(found) + 1)
    assert (np.diff(cuts) >= 1).all()


def test_lanes_are_dealt_in_proportion():
    assert deal(np.array([1.0, 3.0]), 64) == [0, 16, 64]
    assert deal(np.array([5.0, 5.0, 5.0, 5.0]), 64) == [0, 16, 32, 48, 64]
    assert deal(np.array([1.0, 1000.0]), 4) == [0, 1, 4]


def test_unequal_lanes_make_the_same_global_batches():
    sampler = Sampler([100, 57], block=8, lanes=8, global_batch=24, window=16, seed=1)
    epoch = sampler.epoch(0)
    whole = [epoch.samples(step, range(8)) for step in range(sampler.steps)]
    sampler.deal([range(1), range(1, 6), range(6, 8)])
    for step, (shards, samples) in enumerate(whole):
        parts = [epoch.samples(step, sampler.owned(replica, 3)) for replica in range(3)]
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), shards)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), samples)
        counts = [sampler.micro(step, replica, 3, 1)[0][0] for replica in range(3)]
        assert counts == [len(part[0]) for part in parts]
    assert sampler.max_rows(3) == 15


@pytest.mark.parallel([2])
def test_a_slower_replica_is_measured_to_be_slower(world, mesh_of, monkeypatch):
    run = Executor.run

    def slow(self, *args):
        time.sleep(0.2 if world.rank == 1 else 0.05)
        run(self, *args)

    monkeypatch.setattr(Executor, "run", slow)
    graph = Graph(Chain(Conv(2, 3), Flatten(), Dense(3)), (1, 6, 6), SoftmaxCrossEntropy())
    model = Model(config.parse(JOB), Placed.whole(graph), 0, 1)
    found = speeds(mesh_of("together"), model, 4, 30)
    assert found.shape == (2,)
    assert 2 < found[0] / found[1] < 8
