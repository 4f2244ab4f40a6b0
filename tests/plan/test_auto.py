"""The search for a placement: near the best of all that there are, under the limit on memory, and always the same."""

import random
from itertools import product

import pytest

from dpnn.backends.reference import Reference
from dpnn.errors import JobError
from dpnn.nn import Branches, Chain, Concat, Conv, Dense, Flatten, Graph, ReLU, SoftmaxCrossEntropy
from dpnn.plan import Costs, Forecaster, Placement, Setting, choose, place
from dpnn.plan.placement import outer_blocks, settled

from .parts import random_network

SHAPE = (3, 16, 16)


def forecaster(network, rows=8, costs=None):
    graph = Graph(network, SHAPE, SoftmaxCrossEntropy())
    return Forecaster(graph, [Reference()], rows, 1, costs or Costs(multiply_adds=1e9, latency=5e-6))


def chain(seed):
    """Layers of very different cost."""
    rng = random.Random(seed)
    convs = [Conv(rng.choice([2, 4, 8, 16]), 3, padding=1) for _ in range(4)]
    return Chain(*convs, Flatten(), Dense(rng.choice([8, 64])), Dense(5))


def wide(seed):
    """Branches of very different cost behind a trunk."""
    rng = random.Random(seed)
    sizes = [rng.choice([1, 3, 5]) for _ in range(3)]
    branches = [Conv(rng.choice([2, 4, 8]), size, padding=size // 2) for size in sizes]
    return Chain(Conv(4, 3, padding=1), Branches(*branches, join=Concat()), Flatten(), Dense(5))


def best_of_all(made: Forecaster, parts: int, microbatches: int) -> float:
    """The shortest step over every placement of the units."""
    units, graph = made.loads(1).units, made.graph
    shortest = float("inf")
    for found in product(range(parts), repeat=len(units)):
        part_of = [0] * len(graph.nodes)
        for unit, part in zip(units, found, strict=True):
            for index in unit:
                part_of[index] = part
        placement = settled(graph, parts, part_of, {})
        shortest = min(shortest, made.look(Setting(placement, microbatches)).timing.step)
    return shortest


@pytest.mark.parametrize("network", [chain, wide])
@pytest.mark.parametrize(
    ("parts", "microbatches", "seed"),
    [(2, 1, 0), (2, 4, 1), (2, 2, 2), pytest.param(3, 4, 3, marks=pytest.mark.soak)],
)
def test_the_choice_is_within_a_tenth_of_the_best_of_all(network, parts, microbatches, seed, monkeypatch):
    monkeypatch.setattr("dpnn.plan.auto._ALL", 0)  # else it looks at all itself
    made = forecaster(network(seed))
    found = choose(made, parts, "auto", microbatches)[0][1]
    assert found.timing.step <= 1.1 * best_of_all(made, parts, microbatches)


def test_the_choice_is_the_same_every_time():
    first, second = (choose(forecaster(chain(1)), 3, "auto")[0][1].setting for _ in range(2))
    assert first == second


def test_a_layer_that_is_too_large_is_shared_out():
    network = Chain(Conv(4, 3, padding=1), Flatten(), Dense(2000), ReLU(), Dense(5))
    made = forecaster(network, rows=4)
    one = made.look(Setting(Placement(1, (0,) * len(made.graph.nodes)), 1))
    limit = 0.35 * max(one.nbytes) / 1e9
    found = choose(made, 4, "auto", memory_gb=limit)[0][1]
    assert max(found.nbytes) <= limit * 1e9
    assert found.setting.placement.shards
    with pytest.raises(JobError, match=r"memory_gb = .*: with parallel\.parts = 4 the least is .* GB on a rank"):
        choose(made, 4, "auto", memory_gb=limit / 100)


def test_the_room_of_a_rank_is_kept_where_it_can_be_and_else_the_least_is_taken():
    network = Chain(Conv(4, 3, padding=1), Flatten(), Dense(2000), ReLU(), Dense(5))
    made = forecaster(network, rows=4)
    whole = max(made.look(Setting(Placement(1, (0,) * len(made.graph.nodes)), 1)).nbytes)
    assert max(choose(made, 4, "auto", room=0.35 * whole)[0][1].nbytes) <= 0.35 * whole
    looked = choose(made, 4, "auto", room=0.01 * whole)
    assert max(looked[0][1].nbytes) == min(max(forecast.nbytes) for _, forecast in looked)


def test_more_micro_batches_are_chosen_where_stages_wait():
    made = forecaster(chain(1), rows=32, costs=Costs(multiply_adds=1e8, call=0.0, latency=1e-6))
    best = choose(made, 2, "depth")[0][1]
    assert best.setting.microbatches > 4
    alone = made.look(Setting(Placement(1, (0,) * len(made.graph.nodes)), 1))
    assert best.timing.step < alone.timing.step


@pytest.mark.parametrize("name", ["depth", "branches", "filters"])
def test_named_placements_use_every_part(name):
    made = forecaster(wide(0))
    placement = place(made.graph, 2, name, made.loads(1))
    used = set(placement.part_of) | {part for parts in placement.shards.values() for part in parts}
    assert used == {0, 1}


def test_what_a_placement_by_names_can_not_be_is_said_with_what_can():
    made = forecaster(wide(0))
    with pytest.raises(JobError, match=r"no layer has a name like 'conv7'; there are conv1, branches1"):
        place(made.graph, 2, {"conv7": 1}, made.loads(1))
    with pytest.raises(JobError, match=r"'conv1' is to lie on part 2, but parallel.parts = 2; use 0 to 1"):
        place(made.graph, 2, {"conv1": 2}, made.loads(1))
    with pytest.raises(JobError, match=r"the widest, branches1, has 3 branches; use parallel\.parts = 3"):
        place(made.graph, 5, "branches", made.loads(1))
    with pytest.raises(JobError, match=r"parallel.parts = 99: the network is computed in \d+ pieces"):
        place(made.graph, 99, "depth", made.loads(1))


@pytest.mark.parametrize("seed", range(20))
def test_outer_blocks_lie_in_no_other(seed):
    graph = Graph(random_network(random.Random(seed)), (*SHAPE[:1], 8, 8), SoftmaxCrossEntropy())
    runs = [run for block in outer_blocks(graph) if block.join is not None for run in block.branches]
    assert all(hi <= other or end <= lo for i, (lo, hi) in enumerate(runs) for other, end in runs[:i])
