"""A network over several ranks learns what it learns on one."""

import random

import numpy as np
import pytest

from dpnn.comm.world import World
from dpnn.nn import Chain, Conv, Dense, Flatten, ReLU

from .parts import CLASSES, Course, random_network, random_placement, train


def alone(course: Course):
    from mpi4py import MPI

    return train(World(MPI.COMM_SELF, 30.0), course)


def assert_alike(found, wanted, rtol=1e-9) -> None:
    assert found.losses == pytest.approx(wanted.losses, rel=rtol)
    assert found.params.keys() == wanted.params.keys()
    for name, value in wanted.params.items():
        np.testing.assert_allclose(found.params[name], value, rtol, rtol, err_msg=name)


@pytest.mark.parallel([2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(50))
def test_any_network_learns_alike_over_any_placement(world, seed):
    rng = random.Random(seed)
    course = Course(random_network(rng), microbatches=rng.choice([1, 2, 3]), pipeline=rng.choice(["1f1b", "gpipe"]))
    placement = random_placement(rng, course.graph, world.size)
    found = train(world, course, placement)
    assert_alike(found, alone(course))


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("pipeline", ["1f1b", "gpipe"])
def test_gradients_that_are_made_once_a_step_are_those_of_all_micro_batches(world, pipeline):
    """Of layers with many weights, on oneDNN; the micro-batches have 2, 3 and 3 rows."""
    network = Chain(Conv(8, 3, padding=1), ReLU(), Flatten(), Dense(600), ReLU(), Dense(520), ReLU(), Dense(CLASSES))
    how = {"rows": 8, "microbatches": 3, "pipeline": pipeline}
    course = Course(network, **how, backend={"name": "onednn", "threads": 1})
    placement = random_placement(random.Random(7), course.graph, world.size) if world.size > 1 else None
    found = train(world, course, placement)
    gathering = sum(group.gathers for group in found.plan.groups)
    assert gathering == 2 or world.size > 1
    assert_alike(found, alone(Course(network, **how)), rtol=2e-4)
