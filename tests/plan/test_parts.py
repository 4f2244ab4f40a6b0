"""A network over several ranks learns what it learns on one."""

import random

import numpy as np
import pytest

from dpnn.comm.world import World

from .parts import Course, random_network, random_placement, train


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
