"""Which task comes when: levels, the order of forward and backward on each part, and micro-batches in flight."""

import random

import pytest

from dpnn.nn import Branches, Chain, Concat, Conv, Dense, Flatten
from dpnn.plan import spread
from dpnn.plan.pipeline import Task, levels_of, order_of

from .lists import graph_of, placed_by
from .parts import random_network, random_placement

STAGES = Chain(Flatten(), *(Dense(192) for _ in range(4)))  # of as much work each
BY_STAGE = {"dense2": 1, "dense3": 2, "dense4": 3, "*": 0}
WIDE = Chain(Conv(4, 3), Branches(*(Conv(2, 3) for _ in range(2)), join=Concat()), Flatten(), Dense(5))
BY_BRANCH = {"*branch2*": 1, "*": 0}


def words(placed, microbatches, pipeline, trains=True):
    """The order of each part, a letter for forward and backward and the micro-batch; and its slots."""
    orders, slots = order_of(placed, microbatches, trains, pipeline)
    return [" ".join(f"{'fb'[task.backward]}{task.micro}" for task in order) for order in orders], slots


def test_a_level_is_how_often_the_longest_way_has_changed_parts():
    placed = placed_by(WIDE, 2, BY_BRANCH)
    levels = dict(zip([node.name for node in placed.graph.nodes], levels_of(placed), strict=True))
    assert levels["conv1"] == levels["branches1.branch1"] == 0
    assert levels["branches1.branch2"] == 1
    assert levels["branches1.join"] == levels["dense1"] == 2


def test_1f1b_has_one_in_flight_for_each_stage_behind_and_one_between_them():
    orders, slots = words(placed_by(STAGES, 4, BY_STAGE), 6, "1f1b")
    assert slots == [5, 4, 3, 1]
    assert orders[3].startswith("f0 b0 f1 b1 f2 b2 f3 b3")
    assert orders[0].startswith("f0 f1 f2 f3 f4 b0 f5 b1")


def test_gpipe_goes_forward_through_all_first():
    orders, slots = words(placed_by(STAGES, 4, BY_STAGE), 3, "gpipe")
    assert orders == ["f0 f1 f2 b0 b1 b2"] * 4
    assert slots == [3] * 4


def test_in_sequence_one_micro_batch_follows_on_the_other():
    orders, slots = words(placed_by(STAGES, 4, BY_STAGE), 3, "sequence")
    assert orders == ["f0 b0 f1 b1 f2 b2"] * 4
    assert slots == [1] * 4


def test_evaluation_goes_forward_only():
    orders, slots = words(placed_by(STAGES, 4, BY_STAGE), 2, "1f1b", trains=False)
    assert orders == ["f0 f1"] * 4
    assert slots == [1] * 4


@pytest.mark.parametrize("pipeline", ["1f1b", "gpipe", "sequence"])
@pytest.mark.parametrize("microbatches", [1, 2, 5])
@pytest.mark.parametrize("seed", range(8))
def test_every_task_comes_once_and_no_slot_is_taken_before_it_is_free(pipeline, microbatches, seed):
    """A level goes through the micro-batches in their order, so that the first one assigns the gradients."""
    rng = random.Random(seed)
    graph = graph_of(random_network(rng))
    placed = spread(graph, random_placement(rng, graph, rng.randint(2, 5)))
    orders, slots = order_of(placed, microbatches, True, pipeline)
    levels = levels_of(placed)
    for part, order in enumerate(orders):
        assert len(order) == len(set(order))
        here = {level for level, own in zip(levels, placed.part_of, strict=True) if own == part} or {0}
        assert {task.level for task in order} == here
        for level in here:
            for backward in (False, True):
                micros = [task.micro for task in order if (task.level, task.backward) == (level, backward)]
                assert micros in ([], list(range(microbatches)))
                assert micros or backward
        place = {task: i for i, task in enumerate(order)}
        for task in order:
            if task.backward:
                assert place[Task(task.micro, False, task.level)] < place[task]
            earlier = [place[other] for other in order if other.micro == task.micro - slots[part]]
            assert not earlier or max(earlier) < place[task]
