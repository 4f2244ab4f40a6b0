"""The account of killed runs finds what is wrong: a test of the tests."""

import numpy as np
import pytest

from tests.train.accounts import Books, check, check_trained

RANKS, EPOCHS, SAMPLES = 3, 2, 6


@pytest.fixture
def books(tmp_path) -> Books:
    """Ranks 0 and 1 have trained on 6 samples in 2 epochs; the last batch of rank 1, which died, was done again."""
    lines = {0: ["0 0 1", "0 4 5", "1 0 1", "1 4 5"], 1: ["0 2 3", "1 2 3"]}
    for rank, batches in lines.items():
        (tmp_path / str(rank)).write_text("".join(f"{batch}\n" for batch in batches))
    with (tmp_path / "0").open("a") as file:
        file.write("1 2 3\n")
    return Books(tmp_path, RANKS)


@pytest.fixture
def counts() -> np.ndarray:
    """In two shards; rank 0 has done all its batches, rank 1 the first."""
    counts = np.zeros((2, RANKS, 8), int)
    counts[:, 0, :5] = counts[:, 1, :1] = 1
    return counts


def account(books: Books, counts: np.ndarray, dead=(1,), stated=None, dropped=0) -> int:
    return check(books, counts, EPOCHS, SAMPLES, dead, stated or {}, dropped)


def test_books_that_are_in_order(books, counts):
    assert books.n_batches() == 7
    assert account(books, counts) == 6
    counts[1, 1, 0] = 0
    assert account(books, counts, stated={(1, 1): 1, (0, 1): 0}) == 6
    check_trained(books, EPOCHS, SAMPLES, {1})


@pytest.mark.parametrize(
    ("place", "count", "what"),
    [
        ((0, 0, 2), 2, "applied twice"),
        ((0, 0, 6), 1, "nobody has made"),
        ((slice(None), 0, 1), 0, r"rank 0 \(alive\) has lost \[1\]"),
        ((1, 1, 0), 0, "stated"),
        ((0, 1, 1), 1, "stated"),
        ((slice(None), 1, 1), 1, "in twice"),
        ((slice(None), 1, 0), 0, "2 samples aren't in, and 0 are stated"),
    ],
)
def test_books_that_are_not(books, counts, place, count, what):
    """In the order of the cases: doubled, from nowhere, lost, lost in one shard, done again although it is in one
    shard, done again although it is in all, and not done again.
    """
    counts[place] = count
    with pytest.raises(AssertionError, match=what):
        account(books, counts)


def test_what_the_living_have_trained_on_twice_or_nobody_has(books):
    with pytest.raises(AssertionError, match="trained on twice"):
        check_trained(books, EPOCHS, SAMPLES, set())
    with pytest.raises(AssertionError, match="never trained on"):
        check_trained(books, EPOCHS, SAMPLES + 1, {1})


def test_only_as_many_are_trained_on_again_as_may_be_and_once_for_each_death(books, tmp_path):
    with (tmp_path / "0").open("a") as file:
        file.write("0 0 1\n")
    check_trained(books, EPOCHS, SAMPLES, {1}, again=2)
    with pytest.raises(AssertionError, match="2 samples were trained on twice, and at most 1 may be"):
        check_trained(books, EPOCHS, SAMPLES, {1}, again=1)
    with (tmp_path / "0").open("a") as file:
        file.write("0 0 1\n")
    with pytest.raises(AssertionError, match="more often than ranks have died"):
        check_trained(books, EPOCHS, SAMPLES, {1}, again=4)


def test_counting_goes_on_where_it_stood(books, tmp_path):
    before = books.n_batches()
    with (tmp_path / "2").open("a") as file:
        file.write("2 1 2\n")
    assert books.n_batches() == before + 1
