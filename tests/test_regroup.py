"""Who goes on together where ranks have died: pure decisions."""

import pytest

from dpnn.errors import RankError
from dpnn.regroup import Told, apart, together


def told(*stands: tuple[int, ...]) -> list[Told]:
    """Of ranks (part, home, steps, averages)."""
    return [Told(number, part, home, True, *rest) for number, (part, home, *rest) in enumerate(stands)]


def test_all_go_back_to_the_last_step_that_all_have_ended():
    found = together(told((0, 0, 8), (0, 1, 7), (0, 2, 8)), 1, grains=0)
    assert (found.replicas, found.steps, found.back) == ([[0], [1], [2]], 7, {0: (7, 0)})


def test_parts_of_different_replicas_make_a_new_one():
    found = together(told((1, 0, 3), (0, 2, 3), (1, 2, 3)), 2, grains=0)
    assert found.replicas == [[1, 0]]
    assert found.places == [1, 0]


@pytest.mark.parametrize(("grains", "ranks", "replicas"), [(0, 5, 5), (12, 5, 4), (8, 7, 4), (7, 6, 1)])
def test_replicas_divide_the_grains(grains, ranks, replicas):
    assert len(together(told(*[(0, i, 1) for i in range(ranks)]), 1, grains).replicas) == replicas


def test_without_a_part_nobody_goes_on():
    with pytest.raises(RankError, match=r"no rank is left of part 1 of 3; go on with --resume"):
        together(told((0, 0, 1), (2, 0, 1)), 3, grains=0)


def test_replicas_that_average_stay_whole_and_wait_for_the_first():
    found = apart(told((0, 0, 9, 2), (1, 0, 9, 2), (1, 2, 9, 2), (0, 4, 6, 2), (1, 4, 7, 2)), 2)
    assert (found.replicas, found.homes) == ([[0, 1], [3, 4]], (0, 4))
    assert found.steps == 9
    assert found.back == {0: (9, 2), 1: (9, 2), 3: (6, 2), 4: (6, 2)}
    assert found.ahead is None


def test_who_has_not_averaged_takes_the_parameters_of_one_that_has():
    found = apart(told((0, 0, 8, 1), (0, 1, 8, 2), (0, 2, 10, 2)), 1)
    assert (found.steps, found.ahead) == (10, 1)
    assert found.back == {0: (8, 1), 1: (8, 2), 2: (10, 2)}


def test_a_replica_has_averaged_when_all_its_parts_have():
    found = apart(told((0, 0, 8, 2), (1, 0, 8, 1), (0, 2, 8, 1), (1, 2, 7, 1)), 2)
    assert found.ahead is None
    assert found.back == {0: (8, 1), 1: (8, 1), 2: (7, 1), 3: (7, 1)}


def test_where_no_replica_is_whole_nobody_goes_on():
    with pytest.raises(RankError, match=r"no replica is left that has all its 2 parts"):
        apart(told((0, 0, 1, 0), (1, 2, 1, 0)), 2)
