"""A placed network: trees of Forks and Adds, runs of filters; each array crosses to another part once."""

import random
from collections import Counter

import pytest

from dpnn.nn import Add, Branches, Chain, Concat, Conv, Dense, Flatten, Fork, ReLU
from dpnn.nn.layer import Input
from dpnn.plan import Placed, lay, spread

from .lists import graph_of, placed_by
from .parts import random_network, random_placement

FIVE = {f"*branch{i + 1}.*": i for i in range(5)} | {"*": 0}


def wide(join, branches=5):
    block = Branches(*(Chain(Conv(4, 1), ReLU()) for _ in range(branches)), join=join)
    return Chain(Conv(4, 3), block, Flatten(), Dense(5))


def crossings(placed: Placed) -> list[tuple[str, int, int]]:
    """Edges between parts: the kind of the layer that is read, from which part, to which."""
    graph, part_of = placed.graph, placed.part_of
    return [
        (type(node.layer).__name__, part_of[node.index], part_of[reader.index])
        for node in graph.nodes
        for reader, _ in graph.readers(node)
        if part_of[node.index] != part_of[reader.index] and not isinstance(node.layer, Input)
    ]


def held_numbers(placed: Placed) -> Counter[tuple[str, int]]:
    """How often each number of each parameter is held."""
    pieces = [piece for part in range(placed.parts) for piece in lay(placed.nodes(part))]
    return Counter((piece.name, i) for piece in pieces for i in range(piece.lo, piece.hi))


def test_on_one_part_nothing_is_rewritten():
    graph = graph_of(wide(Concat()))
    assert placed_by(wide(Concat()), 1, {"*": 0}).graph.nodes == graph.nodes


def test_an_output_that_all_read_goes_down_a_binomial_tree_of_forks():
    placed = placed_by(wide(Concat()), 5, FIVE)
    down = [(source, target) for kind, source, target in crossings(placed) if kind == "Fork"]
    assert sorted(down) == [(0, 1), (0, 2), (0, 4), (2, 3)]
    forks = Counter(
        placed.part_of[node.index] for node in placed.graph.nodes if isinstance(node.layer, Fork) and node.index > 3
    )
    assert forks[2] == 1  # it passes on what it reads itself
    up = [(source, target) for kind, source, target in crossings(placed) if kind == "ReLU"]
    assert sorted(up) == [(1, 0), (2, 0), (3, 0), (4, 0)]  # a Concat collects from each


def test_a_sum_of_outputs_on_all_parts_is_a_binomial_tree_of_adds():
    placed = placed_by(wide(Add()), 5, FIVE)
    adds = [node for node in placed.graph.nodes if isinstance(node.layer, Add)]
    assert sorted((placed.part_of[node.index], len(node.inputs)) for node in adds) == [(0, 4), (2, 2)]
    up = [(source, target) for kind, source, target in crossings(placed) if kind in ("Add", "ReLU")]
    assert sorted(up) == [(1, 0), (2, 0), (3, 2), (4, 0)]


def test_branches_of_one_part_are_added_there_before_they_cross():
    patterns = {"*branch2.*": 1, "*branch3.*": 1, "*branch4.*": 1, "*": 0}
    placed = placed_by(wide(Add(), 4), 2, patterns)
    adds = {placed.part_of[n.index]: len(n.inputs) for n in placed.graph.nodes if isinstance(n.layer, Add)}
    assert adds == {0: 2, 1: 3}
    assert [(source, target) for kind, source, target in crossings(placed) if kind == "Add"] == [(1, 0)]
    assert Counter(crossings(placed))["Fork", 0, 1] == 1  # the input crosses once for three branches


def test_runs_of_filters_keep_the_names_and_hold_every_number_once():
    network = Chain(Conv(5, 3), ReLU(), Flatten(), Dense(5))
    placed = placed_by(network, 3, {"conv1": (0, 1, 2), "dense1": (2, 0)})
    held = held_numbers(placed)
    whole = {(piece.name, i) for piece in lay(graph_of(network).nodes) for i in range(piece.hi)}
    assert held == Counter(whole)
    relus = [node for node in placed.graph.nodes if isinstance(node.layer, ReLU)]
    assert sorted(placed.part_of[node.index] for node in relus) == [0, 1, 2]
    assert [type(placed.graph.nodes[placed.graph.output].layer)] == [Concat]


@pytest.mark.parametrize("seed", range(60))
def test_every_placement_leaves_a_sound_network(seed):
    """Edges lead forward, each output sends back one gradient, no array goes to a part twice, nothing is lost."""
    rng = random.Random(seed)
    graph = graph_of(random_network(rng))
    placement = random_placement(rng, graph, rng.randint(2, 6))
    placed = spread(graph, placement)
    nodes, part_of = placed.graph.nodes, placed.part_of
    assert len(part_of) == len(nodes)
    assert set(part_of) <= set(range(placement.parts))
    for node in nodes:
        assert all(source < node.index for source in node.inputs)
        readers = placed.graph.readers(node)
        if isinstance(node.layer, Fork) and node.needs_grad:
            assert node.layer.readers == len(readers)
        elif node.needs_grad:
            assert len(readers) <= 1, node.name
        to = Counter(part_of[reader.index] for reader, _ in readers if part_of[reader.index] != part_of[node.index])
        assert set(to.values()) <= {1}, node.name
    assert held_numbers(placed) == Counter((piece.name, i) for piece in lay(graph.nodes) for i in range(piece.hi))
    assert [nodes[i].shape for i in placed.graph.losses] == [graph.nodes[i].shape for i in graph.losses]
    assert nodes[placed.graph.output].shape == graph.nodes[graph.output].shape
