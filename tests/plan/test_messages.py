"""What crosses between parts: every edge, its gradient back, and who belongs to one broadcast or collation."""

import random

import pytest

from dpnn.nn import Branches, Chain, Concat, Conv, Dense, Flatten, Heads, ReLU
from dpnn.nn.layer import Input
from dpnn.plan import spread
from dpnn.plan.messages import messages_of

from .lists import graph_of, placed_by
from .parts import random_network, random_placement

NETWORK = Chain(
    Conv(4, 3), Branches(*(Chain(Conv(2, 1), ReLU()) for _ in range(3)), join=Concat()), Flatten(), Dense(5)
)
THREE = {"*branch2.*": 1, "*branch3.*": 2, "*": 0}


def test_a_gradient_goes_back_wherever_an_output_that_is_trained_comes():
    placed = placed_by(NETWORK, 3, THREE)
    found = messages_of(placed, "train")
    assert [message.number for message in found] == list(range(len(found)))
    forward, backward = found[::2], found[1::2]
    for there, back in zip(forward, backward, strict=True):
        assert (there.gradient, back.gradient) == (False, True)
        assert (there.source, there.target, there.edge) == (back.target, back.source, back.edge)
        assert there.key == (there.node, -1)
        assert back.key == there.edge
    assert sorted((m.source, m.target) for m in forward) == [(0, 1), (0, 2), (1, 0), (2, 0)]
    assert {message.crew for message in found} == {(0, 1, 2)}  # one of the broadcast, one of the collation


def test_two_parts_need_no_communicator_of_their_own():
    placed = placed_by(NETWORK, 2, {"*branch2.*": 1, "*": 0})
    assert {message.crew for message in messages_of(placed, "train")} == {()}


def test_evaluation_sends_nothing_back_and_nothing_to_what_exists_in_training_only():
    aside = Chain(Flatten(), Dense(5))
    network = Chain(Conv(4, 3), ReLU(), Branches(Chain(Conv(4, 1), Flatten(), Dense(5)), aside, join=Heads(1, 0.3)))
    placed = placed_by(network, 2, {"branches1.branch2*": 1, "*": 0})
    nodes = placed.graph.nodes
    trained, evaluated = (messages_of(placed, mode) for mode in ("train", "eval"))
    assert any(m.gradient for m in trained)
    assert any(nodes[m.edge[0]].training_only for m in trained)
    assert not any(m.gradient or nodes[m.edge[0]].training_only for m in evaluated)


@pytest.mark.parametrize("seed", range(30))
def test_every_edge_between_parts_is_a_message_once(seed):
    rng = random.Random(seed)
    graph = graph_of(random_network(rng))
    placed = spread(graph, random_placement(rng, graph, rng.randint(2, 6)))
    nodes, part_of = placed.graph.nodes, placed.part_of
    edges = [
        (reader.index, position)
        for node in nodes
        for reader, position in placed.graph.readers(node)
        if part_of[node.index] != part_of[reader.index]
    ]
    found = messages_of(placed, "train")
    assert sorted(m.edge for m in found if not m.gradient) == sorted(edges)
    assert sorted(m.edge for m in found if m.gradient) == sorted(
        (reader, position) for reader, position in edges if nodes[nodes[reader].inputs[position]].needs_grad
    )
    for message in found:
        assert message.source != message.target
        assert not message.crew or {message.source, message.target} <= set(message.crew)
        assert not (message.gradient and isinstance(nodes[message.node].layer, Input))
