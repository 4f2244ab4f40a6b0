"""Which phase comes when: stages, and the order of forward and backward in each."""

import pytest

from dpnn.plan.messages import Message
from dpnn.plan.pipeline import phases, stages_of


def from_to(*pairs):
    """Messages of a forward pass, and their gradients."""
    return [
        Message(2 * i + back, 0, (i, 0), bool(back), *(pair[::-1] if back else pair), ())
        for i, pair in enumerate(pairs)
        for back in (0, 1)
    ]


@pytest.mark.parametrize(
    ("pairs", "stages"),
    [
        ([(0, 1), (1, 2), (2, 3)], [0, 1, 2, 3]),
        ([(0, 1), (1, 0)], [0, 0]),  # branches: they wait for one another
        ([(0, 1), (1, 0), (0, 2), (1, 2), (2, 3), (3, 2)], [0, 0, 1, 1]),
        ([(3, 2), (2, 1), (1, 0)], [3, 2, 1, 0]),
        ([(0, 1), (1, 2), (0, 2)], [0, 1, 2]),
        ([(0, 1), (1, 2), (2, 0), (2, 3)], [0, 0, 0, 1]),
        ([], [0, 0, 0]),
    ],
)
def test_parts_that_wait_for_one_another_are_one_stage(pairs, stages):
    assert stages_of(len(stages), from_to(*pairs)) == stages


def word(stages, part, microbatches, pipeline, trains=True):
    order, slots = phases(stages, part, microbatches, trains, pipeline)
    return " ".join(f"{direction[0]}{micro}" for direction, micro in order), slots


def test_1f1b_has_as_few_in_flight_as_there_are_stages_behind():
    stages = [0, 1, 2]
    assert word(stages, 0, 4, "1f1b") == ("f0 f1 f2 b0 f3 b1 b2 b3", 3)
    assert word(stages, 1, 4, "1f1b") == ("f0 f1 b0 f2 b1 f3 b2 b3", 2)
    assert word(stages, 2, 4, "1f1b") == ("f0 b0 f1 b1 f2 b2 f3 b3", 1)


def test_gpipe_goes_forward_through_all_first():
    assert word([0, 1], 0, 3, "gpipe") == ("f0 f1 f2 b0 b1 b2", 3)
    assert word([0, 1], 1, 3, "gpipe") == ("f0 f1 f2 b0 b1 b2", 3)


def test_where_nobody_waits_one_micro_batch_follows_on_the_other():
    for pipeline in ("1f1b", "gpipe", "sequence"):
        assert word([0, 0], 1, 2, pipeline) == ("f0 b0 f1 b1", 1)
    assert word([0, 1], 0, 2, "sequence") == ("f0 b0 f1 b1", 1)


def test_fewer_micro_batches_than_stages():
    assert word([0, 1, 2, 3], 0, 2, "1f1b") == ("f0 f1 b0 b1", 2)
    assert word([0, 1, 2, 3], 0, 1, "1f1b") == ("f0 b0", 1)


def test_evaluation_goes_forward_only():
    assert word([0, 1], 0, 2, "1f1b", trains=False) == ("f0 f1", 1)


@pytest.mark.parametrize("pipeline", ["1f1b", "gpipe", "sequence"])
@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_every_phase_comes_once_and_no_slot_is_taken_before_it_is_free(pipeline, microbatches):
    for part in range(4):
        order, slots = phases([0, 1, 2, 3], part, microbatches, True, pipeline)
        assert len(order) == len(set(order)) == 2 * microbatches
        for micro in range(microbatches):
            assert order.index(("forward", micro)) < order.index(("backward", micro))
            if micro >= slots:
                assert order.index(("backward", micro - slots)) < order.index(("forward", micro))
        assert [micro for direction, micro in order if direction == "backward"] == list(range(microbatches))
