"""What a step has changed is taken back, whoever changed it, and wherever it was stopped."""

import numpy as np
import pytest

from dpnn.comm.undo import Undo, log_nbytes

N = 100


def ranks() -> tuple[list[np.ndarray], list[Undo]]:
    """Two ranks of a node that change the same two arrays."""
    arrays = [np.arange(N, dtype=np.float32), np.ones(N, np.float32)]
    shadows = [np.zeros(N, np.float32), np.zeros(N, np.float32)]
    logs = [np.zeros(log_nbytes(10) // 8, np.int64) for _ in range(2)]
    return arrays, [Undo(arrays, shadows, logs, rank) for rank in range(2)]


def change(arrays, undo: Undo, lo: int, hi: int, until: int | None = None) -> None:
    undo.keep(lo, hi)
    for array in arrays:
        array[lo : hi if until is None else until] *= -3


@pytest.mark.parametrize("until", [50, 70, None])
def test_a_step_is_taken_back_also_of_others_and_also_in_the_middle(until):
    arrays, (mine, other) = ranks()
    before = [array.copy() for array in arrays]
    for undo in (mine, other):
        undo.begin(5)
    change(arrays, mine, 0, 20)
    change(arrays, mine, 20, 30)
    change(arrays, other, 50, 90, until)
    mine.take_back(5)
    mine.take_back(5)
    for array, was in zip(arrays, before, strict=True):
        assert array.tolist() == was.tolist()
    assert mine.back(5)
    assert other.back(5)
    assert not other.back(4)


def test_only_that_step_is_taken_back():
    arrays, (mine, other) = ranks()
    mine.begin(5)
    other.begin(5)
    change(arrays, mine, 0, 20)
    change(arrays, other, 20, 40)
    after = [array.copy() for array in arrays]
    mine.begin(6)
    change(arrays, mine, 0, 20)
    other.take_back(6)
    for array, was in zip(arrays, after, strict=True):
        assert array.tolist() == was.tolist()
    assert not other.back(5)
