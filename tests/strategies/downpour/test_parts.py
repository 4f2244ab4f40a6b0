"""What the parts of a replica tell one another: all of them hear the same."""

import pytest

from dpnn.strategies.downpour.parts import Alone, Note, Parts


@pytest.mark.parallel([2, 3, 4])
def test_all_parts_hear_the_sum_of_what_they_tell(world):
    """`steps` are those that the part knows which asks for work, the last one here."""
    n, rank = world.size, world.rank
    parts = Parts(world.comm, n - 1, 30)
    assert parts.asks == (rank == n - 1)
    for step in range(3):
        stops, asked = step == 1 and rank == 0, step == 2 and rank == n - 1
        parts.tell(Note(0.5 + rank, stops, asked, 2**40 + 100 * rank + step))
        heard = parts.hear()
        assert heard == Note(0.5 * n + n * (n - 1) / 2, step == 1, step == 2, 2**40 + 100 * (n - 1) + step)
    assert parts.total(2.0**rank) == 2**n - 1


@pytest.mark.parallel([2, 3, 4])
def test_a_loss_that_is_not_finite_on_one_part_is_not_finite_on_all(world):
    parts = Parts(world.comm, 0, 30)
    parts.tell(Note(float("inf") if world.rank == 1 else 1.0, False, False, 0))
    assert parts.hear().loss == float("inf")


@pytest.mark.parallel([2, 3, 4])
def test_a_letter_to_one_part_is_read_by_all(world):
    parts = Parts(world.comm, 1, 30)
    letter = bytearray([world.rank] * 5)
    parts.share(letter)
    assert letter == bytearray([1] * 5)


def test_who_is_alone_hears_what_it_tells():
    alone = Alone()
    alone.tell(Note(0.25, True, False, 7))
    assert alone.hear() == Note(0.25, True, False, 7)
    assert alone.total(3.0) == 3.0
