"""Times of layers: a machine that stands still for a moment isn't taken for work."""

import pytest

from dpnn.plan.costs import Phases
from dpnn.plan.measure import add_time

PLAIN = {1: Phases(1e-3, 2e-3), 4: Phases(4e-3, 7e-3), 16: Phases(15e-3, 30e-3)}


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
