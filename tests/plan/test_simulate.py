"""All parts' lists together: what fits passes, what doesn't is found, and a step takes as long as it must."""

import random
from dataclasses import replace
from functools import partial

import pytest

from dpnn.nn import Branches, Chain, Concat, Conv, Dense, Flatten, ReLU
from dpnn.plan.instructions import Backward, Forward, PostRecv, Recv, Send, Sent, Weights
from dpnn.plan.simulate import Unmatched, simulate

from .lists import graph_of, placed_by, plans_of, plans_over
from .parts import random_network, random_placement

STAGES = Chain(Flatten(), *(Dense(192) for _ in range(4)))  # of as much work each
BY_STAGE = {"dense2": 1, "dense3": 2, "dense4": 3, "*": 0}
WIDE = Chain(Conv(4, 3), Branches(*(Chain(Conv(2, 1), ReLU()) for _ in range(3)), join=Concat()), Flatten(), Dense(5))
BY_BRANCH = {"*branch2.*": 1, "*branch3.*": 2, "*": 0}


@pytest.mark.parametrize("seed", range(40))
def test_the_lists_of_any_placement_fit(seed):
    rng = random.Random(seed)
    graph = graph_of(random_network(rng))
    placement = random_placement(rng, graph, rng.randint(2, 6))
    for mode in ("train", "eval"):
        how = {"microbatches": rng.randint(1, 4), "pipeline": rng.choice(["1f1b", "gpipe"]), "mode": mode}
        simulate(plans_over(graph, placement, **how))


def changed(plans, part, instructions):
    return [replace(plan, instructions=tuple(instructions)) if i == part else plan for i, plan in enumerate(plans)]


@pytest.mark.parametrize(("network", "patterns"), [(STAGES, BY_STAGE), (WIDE, BY_BRANCH)])
def test_any_instruction_about_a_message_that_is_left_out_or_done_twice_is_found(network, patterns):
    plans = plans_of(placed_by(network, max(patterns.values()) + 1, patterns), microbatches=2)
    simulate(plans)
    tried = 0
    for part, plan in enumerate(plans):
        for i, step in enumerate(plan.instructions):
            if isinstance(step, PostRecv | Recv | Send | Sent):
                before, behind = plan.instructions[:i], plan.instructions[i + 1 :]
                with pytest.raises(Unmatched):
                    simulate(changed(plans, part, (*before, *behind)))
                with pytest.raises(Unmatched):
                    simulate(changed(plans, part, (*before, step, step, *behind)))
                tried += 1
    assert tried >= 4 * len(plans[0].messages)


def test_parts_that_wait_for_one_another_are_found_and_named():
    """Part 0 waits for an answer before it has sent what is answered."""
    plans = plans_of(placed_by(WIDE, 3, BY_BRANCH))
    steps = list(plans[0].instructions)
    first = next(
        i for i, step in enumerate(steps) if isinstance(step, Send) and plans[0].messages[step.message].target == 1
    )
    answer = next(i for i, step in enumerate(steps) if isinstance(step, Recv))
    assert first < answer
    steps.insert(0, steps.pop(answer))
    with pytest.raises(Unmatched, match=r"part 0 waits for ever at instruction 0: Recv\(.*relu1, part 1"):
        simulate(changed(plans, 0, steps))


def test_what_would_be_sent_into_no_buffer_is_found():
    """MPI might keep a small message meanwhile, but not a large one."""
    plans = plans_of(placed_by(STAGES, 4, BY_STAGE))
    steps = list(plans[0].instructions)
    posted = next(i for i, step in enumerate(steps) if isinstance(step, PostRecv))
    waits = next(i for i, step in enumerate(steps) if isinstance(step, Recv) and step.message == steps[posted].message)
    steps.insert(waits, steps.pop(posted))  # behind what it waits for
    with pytest.raises(Unmatched, match="part 0 waits for ever"):
        simulate(changed(plans, 0, steps))


def even(plan, step, weights=0.0):
    """A second forward, two backward, on each part; of these, `weights` that no other part waits for."""
    number = {
        kind: sum(isinstance(s, kind) and s.slot == 0 for s in plan.instructions)
        for kind in (Forward, Backward, Weights)
    }
    micros = sum(type(s).__name__ == "Load" and s.slot == 0 for s in plan.instructions)
    seconds = {Forward: 1.0, Backward: 2.0 - weights, Weights: weights}
    return micros * seconds[type(step)] / number[type(step)] if type(step) in seconds else 0.0


@pytest.mark.parametrize("pipeline", ["1f1b", "gpipe"])
@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_even_stages_take_the_time_that_the_papers_give(pipeline, microbatches):
    """(micro-batches + stages - 1) times forward and backward (Huang et al. 2019, section 2.3)."""
    plans = plans_of(placed_by(STAGES, 4, BY_STAGE), microbatches=microbatches, pipeline=pipeline)
    timing = simulate(plans, even)
    assert timing.step == pytest.approx(3 * (microbatches + 3))
    assert timing.busy == pytest.approx([3 * microbatches] * 4)
    assert timing.idle == pytest.approx(3 / (microbatches + 3))
    slots = {"1f1b": [min(n, microbatches) for n in (5, 4, 3, 1)], "gpipe": [microbatches] * 4}[pipeline]
    assert [plan.slots for plan in plans] == slots


@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_a_part_waits_for_no_gradients_of_weights_of_another(microbatches):
    """The first one waits for a stage less of them (Qi et al. 2023, section 2.3)."""
    plans = plans_of(placed_by(STAGES, 4, BY_STAGE), microbatches=microbatches)
    timing = simulate(plans, partial(even, weights=1.0))
    assert timing.step == pytest.approx(3 * microbatches + 3 * 2)
    assert timing.busy == pytest.approx([3 * microbatches] * 4)


def test_bytes_are_counted_and_crossing_takes_its_time():
    plans = plans_of(placed_by(STAGES, 4, BY_STAGE), microbatches=3)
    timing = simulate(plans, crossing=lambda nbytes: nbytes / 100, nbytes=lambda plan, number: 10)
    assert sum(timing.sent) == 3 * 10 * len(plans[0].messages)
    labels = sum(not m.gradient and m.target == 3 and m.source == 0 for m in plans[0].messages)
    assert timing.sent[0] == 3 * 10 * (1 + labels)
    assert timing.step == pytest.approx(0.1 * (2 * 3 + 2 * 2), rel=0.5)


def test_a_plan_of_a_part_prints_what_comes_and_goes_and_with_whom():
    plans = plans_of(placed_by(STAGES, 4, BY_STAGE), microbatches=2)
    for plan in plans:
        lines = str(plan).splitlines()
        assert len(lines) == len(plan.instructions)
    text = str(plans[1])
    assert "dense1, part 0" in text
    assert "gradient by dense2, part 2" in text
    assert "gradient by dense1, part 0" in text
