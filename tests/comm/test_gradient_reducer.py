"""Sums of gradients equal the serial sum on one node and on several, whoever is late; nobody is waited for for ever."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from dpnn.comm import reduce as module
from dpnn.comm.faults import wait
from dpnn.comm.node import Node
from dpnn.comm.reduce import GradientReducer, allreduce, measured_bucket
from dpnn.errors import RankError

N = 1000
WHERE = ["together", "halves", "one apart", "not shared"]
BUCKETS = [(900, N), (530, 900), (17, 530), (0, 17)]


def brought(rank: int, step: int = 0) -> np.ndarray:
    """What a rank brings: whole numbers, whose sums are exact in any order. Every rank can draw every other's."""
    return np.random.default_rng([step, rank]).integers(-1000, 1000, N).astype(np.float32)


class Steps:
    """Steps of a rank: it copies what arrives into the parameters, as an optimizer would.

    `wrong` counts numbers that weren't the serial sum when they arrived, `times` how often each one arrived here.
    """

    def __init__(self, world, node: Node, limit_s: float = 60) -> None:
        self.node, self._world = node, world
        self.wrong, self.times = 0, np.zeros(N, int)
        self.expected = np.zeros(N, np.float32)
        self.reducer = GradientReducer(node, self._arrived, limit_s)

    def prepare(self, step: int) -> np.ndarray:
        """What I am to bring; nothing of an earlier step is left in my gradients."""
        self.expected = np.sum([brought(rank, step) for rank in range(self._world.size)], axis=0)
        self.times[:] = 0
        self.node.grads[:] = np.nan
        return brought(self._world.rank, step)

    def start(self, step: int, buckets: Sequence[tuple[int, int]], pause: Callable[[], object] = int) -> None:
        mine = self.prepare(step)
        for lo, hi in buckets:
            pause()
            self.node.grads[lo:hi] = mine[lo:hi]
            self.reducer.start(lo, hi)
            pause()
            self.reducer.poke()

    def finish(self, pause: Callable[[], object] = int) -> None:
        pause()
        self.reducer.finish()
        pause()
        self.reducer.settle()

    def _arrived(self, lo: int, hi: int) -> None:
        sums = self.node.sums[lo:hi]
        self.wrong += int((sums != self.expected[lo:hi]).sum())
        self.times[lo:hi] += 1
        self.node.params[lo:hi] = sums


@pytest.fixture
def steps_of(world, node_of):
    """steps_of(where, limit_s=60) -> Steps; closed at the end."""
    made = []

    def make(where: str, **how) -> Steps:
        made.append(Steps(world, node_of(where, n=N), **how))
        return made[-1]

    yield make
    for steps in made:
        steps.reducer.close()


def sleepless(seed: int, rank: int) -> Callable[[], None]:
    """A pause that mostly is none, and at other points on every rank."""
    draw = np.random.default_rng([seed, rank])

    def pause() -> None:
        if draw.random() < 0.15:
            time.sleep(draw.random() * 4e-3)

    return pause


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("seed", range(2))
def test_every_number_of_a_bucket_arrives_at_one_owner_once_and_is_the_serial_sum(
    world, monkeypatch, steps_of, where, seed
):
    monkeypatch.setattr(module, "BLOCK", 48)
    draw = np.random.default_rng(seed)
    cuts = np.sort(draw.integers(0, N, size=7))
    buckets = [(int(lo), int(hi)) for lo, hi in zip([0, *cuts], [*cuts, N], strict=True)]
    skipped = buckets.pop(draw.integers(len(buckets)))
    steps = steps_of(where)
    steps.start(0, [buckets[i] for i in draw.permutation(len(buckets))])
    steps.reducer.finish()
    assert steps.reducer.poke()
    assert steps.wrong == 0

    node = steps.node
    times = np.ones(N)
    times[slice(*skipped)] = 0
    np.testing.assert_array_equal(node.comm.allreduce(steps.times), times)
    expected = np.where(times, steps.expected, np.nan).astype(np.float32)
    np.testing.assert_array_equal(node.sums, expected)
    world.comm.barrier()
    steps.reducer.settle()


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
def test_steps_never_mix_whoever_is_late(world, steps_of, where):
    """Whoever has settled spoils its gradients at once, and finds every update of its node done."""
    steps = steps_of(where)
    pause = sleepless(1, world.rank)
    for step in range(12):
        steps.start(step, BUCKETS, pause)
        steps.finish(pause)
        assert steps.wrong == 0, step
        np.testing.assert_array_equal(steps.node.params, steps.expected)


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("where", ["together", "not shared"])
@pytest.mark.parametrize("first", ["measurement", "reducer"])
def test_measuring_leaves_nothing_behind(world, node_of, where, first):
    """Before the reducer that trains is made, or, as train.py does, after that. Then the last rank comes late."""
    node = node_of(where, n=N)
    steps = Steps(world, node) if first == "reducer" else None
    assert measured_bucket(node, 60) == module._BUCKET_NBYTES[0]
    steps = steps or Steps(world, node)
    for step in range(3):
        pause = (lambda: time.sleep(5e-3)) if step == 0 and world.rank == world.size - 1 else int
        steps.start(step, BUCKETS, pause)
        steps.finish(pause)
        assert steps.wrong == 0, step
        np.testing.assert_array_equal(steps.node.params, steps.expected)
    steps.reducer.close()


@pytest.mark.parallel([1, 2, 4])
@pytest.mark.parametrize("where", ["together", "halves", "not shared"])
def test_a_measured_bucket_is_within_bounds(node_of, where):
    lowest, highest = module._BUCKET_NBYTES
    assert lowest <= measured_bucket(node_of(where, n=50_000), 60) <= highest
    assert measured_bucket(node_of(where, n=7), 60) == lowest  # nothing to tell latency by


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
def test_all_replicas_see_the_same_bits_and_so_does_a_second_run(world, node_of, where):
    results = []
    for _ in range(2):
        node = node_of(where, n=N)
        node.grads[:] = np.random.default_rng(world.rank).normal(size=N)
        reducer = GradientReducer(node, lambda lo, hi: None, 60)
        for lo, hi in BUCKETS:
            reducer.start(lo, hi)
        reducer.finish()
        reducer.settle()
        world.comm.barrier()
        results.append(node.sums.tobytes())
        reducer.close()
    assert set(world.comm.allgather(results[0])) == set(world.comm.allgather(results[1])) == {results[0]}
    exact = np.sum([np.random.default_rng(rank).normal(size=N).astype(np.float32) for rank in range(world.size)], 0)
    np.testing.assert_allclose(np.frombuffer(results[0], np.float32), exact, rtol=0, atol=1e-5)


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
def test_empty_buckets_and_steps_without_any_are_fine(steps_of, where):
    steps = steps_of(where)
    steps.finish()
    for step in range(2):
        steps.start(step, [(3, 3), (0, N), (0, 0), (N, N)])
        steps.finish()
        np.testing.assert_array_equal(steps.node.params, steps.expected)
    assert steps.wrong == 0


@pytest.mark.parallel([1, 2, 3])
def test_float64_is_summed_by_mpi(world, node_of):
    node = node_of(n=N, dtype="float64", native=False)
    node.grads[:] = np.random.default_rng(world.rank).normal(size=N)
    arrived: list[tuple[int, int]] = []
    reducer = GradientReducer(node, lambda *piece: arrived.append(piece), 60)
    reducer.start(10, N)
    reducer.finish()
    reducer.settle()
    reducer.close()
    reducer.close()  # harmless
    exact = np.sum([np.random.default_rng(rank).normal(size=N) for rank in range(world.size)], axis=0)
    np.testing.assert_allclose(node.sums[10:], exact[10:], rtol=0, atol=1e-14 * world.size)
    assert arrived == [(10, N)]


@pytest.mark.parallel(2)
@pytest.mark.parametrize("where", ["together", "not shared"])
def test_a_replica_that_brings_nothing_is_a_rank_error(world, steps_of, where):
    steps = steps_of(where, limit_s=0.5)
    if world.rank == 0:
        steps.start(0, BUCKETS)
        with pytest.raises(RankError, match=r"waited 0\.5 s for the sum of the gradients over 2 ranks"):
            steps.reducer.finish()
    world.comm.barrier()
    if world.rank == 1:
        steps.start(0, BUCKETS)
    steps.finish()
    assert steps.wrong == 0


@pytest.mark.parallel(4)
def test_a_replica_of_another_node_that_brings_nothing_is_a_rank_error(world, steps_of):
    """Rank 3 keeps rank 2 waiting, on its node, and so those that ranks 0 and 1 sum with."""
    steps = steps_of("halves", limit_s=0.5)
    if world.rank != 3:
        steps.start(0, BUCKETS)
        with pytest.raises(RankError, match=r"waited 0\.5 s for the sum of the gradients over 4 ranks"):
            steps.reducer.finish()
    world.comm.barrier()
    if world.rank == 3:
        steps.start(0, BUCKETS)
    steps.finish()
    assert steps.wrong == 0


@pytest.mark.parallel([2, 3])
def test_a_replica_that_does_not_settle_is_a_rank_error(world, steps_of):
    steps = steps_of("together", limit_s=0.5)
    steps.start(0, BUCKETS)
    steps.reducer.finish()
    if world.rank == 0:
        with pytest.raises(RankError, match=r"waited 0\.5 s for the sum of the gradients over"):
            steps.reducer.settle()
    world.comm.barrier()
    if world.rank != 0:
        steps.reducer.settle()
    assert steps.wrong == 0


@pytest.mark.parallel([2, 3])
def test_a_replica_that_does_not_prepare_is_a_rank_error(world, node_of):
    node = node_of("not shared", n=N)
    late = world.size - 1
    if world.rank != late:
        # What is raised holds what MPI is still at.
        with pytest.raises(RankError, match=r"waited 0\.2 s for \d nodes to prepare their sums") as raised:
            GradientReducer(node, lambda lo, hi: None, 0.2)
    world.comm.barrier()
    if world.rank == late:
        wait(node.across.Ibarrier().Test, "the others, who have begun", 60)  # what they began is ended: to meet
    else:
        assert raised.value.exit_code == 4
    world.comm.barrier()


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
def test_random_numbers_sum_to_what_a_blocking_allreduce_makes(world, node_of, where):
    node = node_of(where, n=N)
    mine = np.random.default_rng(world.rank).normal(size=N).astype(np.float32)
    expected = mine.copy()
    allreduce(world.comm, expected)
    reducer = GradientReducer(node, lambda lo, hi: None, 60)
    node.grads[:] = mine
    for bucket in BUCKETS:
        reducer.start(*bucket)
    reducer.finish()
    reducer.settle()
    np.testing.assert_allclose(node.sums, expected, rtol=0, atol=1e-6 * world.size)
    reducer.settle()
    reducer.close()
