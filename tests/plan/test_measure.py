"""Times of layers: all have some, and a machine that stands still for a moment isn't taken for work."""

import random

import pytest

from dpnn.backends.reference import Reference
from dpnn.nn import Branches, Chain, Concat, Conv, Dense, Flatten, Graph, SoftmaxCrossEntropy
from dpnn.plan import measured
from dpnn.plan.costs import Phases, question
from dpnn.plan.measure import add_time
from dpnn.plan.schedule import choose_groups

from .conftest import SHAPE
from .parts import random_network

PLAIN = {1: Phases(1e-3, 2e-3), 4: Phases(4e-3, 7e-3), 16: Phases(15e-3, 30e-3)}
BRANCHES_OF_IMAGES = Chain(Branches(Conv(4, 3), Conv(2, 3), join=Concat()), Flatten(), Dense(5))


@pytest.mark.parametrize("network", [BRANCHES_OF_IMAGES, *map(random_network, map(random.Random, range(6)))])
def test_every_group_has_a_time_but_those_of_what_replicas_sum(network):
    graph, backends = Graph(network, SHAPE, SoftmaxCrossEntropy()), [Reference()]
    found = measured(graph, 2, backends, 4).groups
    for group in choose_groups(graph.nodes, backends, "train"):
        sources = [graph.nodes[node.inputs[i]] for node, i in group.inputs]
        if any(node.layer.collected for node in (*group.nodes, *sources)):
            assert question(group) not in found
            continue
        times = found[question(group)].of(4)
        assert (times.forward > 0) == (not group.forward_view)
        assert (times.backward > 0) == (any(node.needs_grad for node in group.nodes) and not group.backward_view)


@pytest.mark.parametrize("paused", [None, *PLAIN])
def test_what_can_not_be_is_timed_once_more(paused):
    times, asked = dict[int, Phases](), list[int]()

    def seconds(rows: int) -> Phases:
        asked.append(rows)
        return PLAIN[rows]._replace(forward=0.8) if rows == paused and asked.count(rows) == 1 else PLAIN[rows]

    for rows in PLAIN:
        add_time(times, rows, seconds)
    assert times == PLAIN
    assert asked.count(paused) == (2 if paused else 0)
    assert len(asked) == len(PLAIN) + (paused is not None)


def test_what_is_slow_again_is_taken_for_slow():
    times = {1: PLAIN[1]}
    add_time(times, 4, lambda rows: Phases(0.8, 7e-3))
    assert times[4].forward == 0.8
