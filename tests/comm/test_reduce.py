"""Sums over ranks equal the serial sum, which each rank computes for itself."""

import numpy as np
import pytest

from dpnn.comm.reduce import BucketReducer
from dpnn.errors import RankError

N = 1000


def values(rank: int, dtype: type, seed: int) -> np.ndarray:
    """What a rank brings; every rank can draw every other's."""
    return np.random.default_rng([seed, rank]).normal(size=N).astype(dtype)


@pytest.fixture
def reducer(world):
    """reducer(flat) -> BucketReducer over the world; closed at the end."""
    made = []

    def make(flat: np.ndarray, limit_s: float = 60) -> BucketReducer:
        made.append(BucketReducer(world.comm, flat, limit_s))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
def test_slices_in_any_order_sum_to_the_serial_sum(world, reducer, dtype, seed):
    draw = np.random.default_rng(seed)
    cuts = np.sort(draw.integers(0, N, size=7))
    slices = [(int(lo), int(hi)) for lo, hi in zip([0, *cuts], [*cuts, N], strict=True)]
    skipped = slices.pop(draw.integers(len(slices)))
    flat = values(world.rank, dtype, seed)
    sums = reducer(flat)
    for i in draw.permutation(len(slices)):
        sums.start(*slices[i])
        for _ in range(draw.integers(3)):
            sums.poke()
    sums.finish()

    expected = sum(values(rank, np.float64, seed) for rank in range(world.size))
    expected[slice(*skipped)] = values(world.rank, np.float64, seed)[slice(*skipped)]
    np.testing.assert_allclose(flat, expected, rtol=0, atol=8 * world.size * np.finfo(dtype).eps)


@pytest.mark.parallel([1, 2, 4])
def test_every_rank_has_the_same_bits_and_so_has_a_second_run(world, reducer):
    results = []
    for _ in range(2):
        flat = values(world.rank, np.float32, 0)
        sums = reducer(flat)
        sums.start(500, N)
        sums.start(0, 500)
        sums.finish()
        results.append(flat)
    assert results[0].tobytes() == results[1].tobytes()
    assert len(set(world.comm.allgather(results[0].tobytes()))) == 1


@pytest.mark.parallel([1, 2, 3])
def test_empty_slices_and_no_slices_are_fine(world, reducer):
    flat = np.ones(4)
    sums = reducer(flat)
    sums.poke()
    sums.finish()
    sums.start(2, 2)
    sums.start(0, 0)
    sums.finish()
    assert flat.tolist() == [1.0] * 4


@pytest.mark.parallel([2, 3])
def test_reducers_side_by_side_do_not_mix(world, reducer):
    a, b = np.full(3, 1.0), np.full(3, 10.0)
    first, second = reducer(a), reducer(b)
    for one in (first, second) if world.rank else (second, first):
        one.start(0, 3)
    first.finish()
    second.finish()
    assert (a[0], b[0]) == (world.size, 10 * world.size)


@pytest.mark.parallel([1, 2])
def test_close_finishes_and_may_come_twice(world):
    flat = np.ones(3)
    sums = BucketReducer(world.comm, flat, 60)
    sums.start(0, 3)
    sums.close()
    sums.close()
    assert flat.tolist() == [world.size] * 3


@pytest.mark.parallel(2)
def test_a_replica_that_stays_away_is_a_rank_error(world):
    flat = np.ones(3)
    sums = BucketReducer(world.comm, flat, 0.2)
    if world.rank == 0:
        sums.start(0, 3)
        with pytest.raises(RankError, match=r"waited 0\.2 s for the sum of the gradients over 2 ranks"):
            sums.finish()
    world.comm.barrier()
    if world.rank == 1:
        sums.start(0, 3)
    sums.close()
    assert flat.tolist() == [2.0] * 3


@pytest.mark.parallel(1)
@pytest.mark.parametrize("flat", [np.ones((2, 2)), np.ones(8)[::2], np.ones(3, np.int32), np.ones(3, np.float16)])
def test_only_flat_arrays_of_numbers_that_mpi_sums_are_taken(world, flat):
    with pytest.raises((TypeError, ValueError), match="sums are of"):
        BucketReducer(world.comm, flat, 60)
