"""The networks of the papers over several ranks learn what they learn on one: small images, 10 steps."""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from dpnn import models
from dpnn.backends.reference import Reference
from dpnn.comm.faults import wait
from dpnn.nn import Graph
from dpnn.plan import Costs, Placement
from dpnn.plan.forecast import Forecaster
from dpnn.plan.placement import by_branches, by_depth, by_filters

from .parts import CLASSES, Course, Trained, random_placement, train
from .test_parts import alone

NETWORKS = {
    "googlenet": (48, lambda shape: models.googlenet(CLASSES, shape, heads=True)),
    "resnet18": (64, lambda shape: models.resnet(CLASSES, shape, depth=18)),
    "resnet50": (64, lambda shape: models.resnet(CLASSES, shape)),
    "vgg": (32, lambda shape: models.vgg(CLASSES, shape)),
    "alexnet": (67, lambda shape: models.alexnet(CLASSES, shape)),
}
RATES = {"resnet50": 1e-4}
"""Else 1e-3, at which 10 steps make 4 % of one rounding there: its BatchNorms divide by little."""
ONEDNN = {"name": "onednn", "threads": 1}
EPS = float(np.finfo(np.float32).eps)
ROUNDINGS = EPS / 2, -EPS / 2, EPS, -EPS
"""Of all parameters: the last bit of some, and of all, up or down."""


def placements(name: str, graph: Graph, parts: int) -> Iterator[Placement]:
    """By depth and by filters, by branches where there are so many, and at random."""
    loads = Forecaster(graph, [Reference(np.dtype(np.float64))], 4, 1, Costs()).loads(1)
    yield by_depth(graph, parts, loads)
    yield by_filters(graph, parts, loads)
    if parts <= {"googlenet": 4, "resnet18": 2, "resnet50": 2}.get(name, 0):
        yield by_branches(graph, parts, loads)
    yield random_placement(random.Random(parts), graph, parts)


def course(name: str, **how) -> Course:
    side, network = NETWORKS[name]
    how = {"shape": (3, side, side), "rows": 8, "microbatches": 2, "steps": 10, "rate": RATES.get(name, 1e-3), **how}
    return Course(network(how["shape"]), **how)


def course_in_float32(name: str, **how) -> Course:
    """At a rate at which fewer roundings turn a ReLU or a maximum over."""
    return course(name, rate=1e-5, **{"backend": ONEDNN, **how})


def once(world, make):
    """What `make` makes, on the first rank only: it takes long."""
    made = make() if world.rank == 0 else None
    wait(world.comm.Ibarrier().Test, "the first rank alone", 500)
    return made


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parallel([2, 3, 4, 6])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_a_paper_learns_alike_over_any_placement(world, name):
    it = course(name)
    wanted = once(world, lambda: alone(it))
    for placement in placements(name, it.graph, world.size):
        found = train(world, it, placement)
        if world.rank == 0:
            print(f"{name} over {world.size} parts differs by {distance(wanted, found):.1e}")
            assert distance(wanted, found) <= 1e-9
            assert found.losses == pytest.approx(wanted.losses, rel=1e-9)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_in_float32_parts_matter_no_more_than_threads_do(world, name):
    """Within three times of what one rank differs from itself; the first loss comes before all that grows."""
    it = course_in_float32(name)
    one, differs = once(world, lambda: alone_and_differently(name)) or (None, 0.0)
    for placement in placements(name, it.graph, world.size):
        found = train(world, it, placement)
        if world.rank == 0:
            print(f"{name} over {world.size} parts differs by {distance(one, found):.1e} (limit {3 * differs:.1e})")
            assert distance(one, found) <= 3 * differs
            assert found.losses[0] == pytest.approx(one.losses[0], rel=1e-4)  # a BatchNorm divides by little


def alone_and_differently(name: str) -> tuple[Trained, float]:
    """One rank, and how much two threads differ from it.

    Where they do by less than a rounding, as they add in the same order, parameters that are rounded otherwise tell.
    """
    one = alone(course_in_float32(name))
    differs = distance(one, alone(course_in_float32(name, backend={**ONEDNN, "threads": 2})))
    if differs < EPS / 2:
        others = (alone(course_in_float32(name, disturbance=rounding)) for rounding in ROUNDINGS)
        differs = max(EPS / 2, *(distance(one, other) for other in others))
    return one, differs


def distance(one, other) -> float:
    """Relative, of all parameters together."""
    assert one.params.keys() == other.params.keys()
    mine, theirs = (np.concatenate([it.params[name].ravel() for name in one.params]) for it in (one, other))
    return float(np.linalg.norm(mine - theirs) / np.linalg.norm(mine))
