"""What the ranks of a world do together. Every rank checks it."""

import numpy as np
import pytest

from dpnn.comm import ranks
from dpnn.comm.world import World, share_of_cores
from dpnn.errors import DataError, JobError, RankError


@pytest.mark.parametrize(
    ("cores", "shares"),
    [
        ([{0, 1, 2, 3}], [4]),
        ([{0, 1, 2, 3}] * 2, [2, 2]),
        ([{0, 1, 2}] * 3, [1, 1, 1]),
        ([{0, 1}] * 4, [1, 1, 1, 1]),
        ([set(range(8))] * 3, [2, 2, 2]),
        ([{0, 1}, {2, 3}], [2, 2]),
        ([{0, 1, 2, 3}, {2, 3}], [3, 1]),
    ],
)
def test_threads_are_a_ranks_share_of_its_nodes_cores(cores, shares):
    assert [share_of_cores(cores, rank) for rank in range(len(cores))] == shares


@pytest.mark.parallel([1, 2, 4])
def test_a_rank_knows_its_threads(world):
    import os

    cores = len(os.sched_getaffinity(0))
    assert world.threads() == max(1, cores // world.size)


@pytest.mark.parallel([1, 2, 3])
def test_a_world_is_a_duplicate_of_its_communicator(world):
    from mpi4py import MPI

    assert (world.rank, world.size) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    assert MPI.Comm.Compare(world.comm, MPI.COMM_WORLD) == MPI.CONGRUENT
    assert world.node.size == world.size


@pytest.mark.parallel([1, 2, 3, 4])
def test_what_the_first_rank_makes_reaches_all(world):
    made = world.first(lambda: {"rank": world.rank, "many": list(range(100_000))})
    assert made == {"rank": 0, "many": list(range(100_000))}
    assert world.first(lambda: None) is None


@pytest.mark.parallel([2])
def test_what_is_longer_than_a_message_may_be_comes_in_pieces(world, monkeypatch):
    monkeypatch.setattr(ranks, "_PIECE", 1000)
    assert world.first(lambda: list(range(10_000))) == list(range(10_000))


@pytest.mark.parallel([1, 2, 3, 4])
def test_what_the_first_rank_refuses_all_refuse(world):
    def refuse() -> None:
        raise JobError("lr = -1: use a number above 0")

    with pytest.raises(JobError, match=r"^lr = -1: use a number above 0$"):
        world.first(refuse)


@pytest.mark.parallel([1, 2, 3, 4])
def test_an_error_of_some_ranks_is_the_lowest_ones_on_all(world):
    world.agree(None)
    culprit = world.size // 2
    with pytest.raises(DataError) as raised:
        world.agree(DataError(f"shard {world.rank}") if world.rank >= culprit else None)
    assert type(raised.value) is DataError
    assert str(raised.value) == (f"rank {culprit}: shard {culprit}" if world.size > 1 else "shard 0")


@pytest.mark.parallel([1, 2, 3, 4])
def test_what_is_so_on_any_rank_all_know(world):
    assert [world.any(world.rank == rank) for rank in range(-1, world.size)] == [False, *[True] * world.size]


@pytest.mark.parallel([2, 4])
def test_a_rank_that_does_not_come_is_named_at_the_limit(world):
    from mpi4py import MPI

    here = World(MPI.COMM_WORLD, timeout_s=60)  # meeting may take its time
    if here.rank > 0:
        here.timeout_s = 0.2
        with pytest.raises(RankError, match=r"waited 0\.2 s for the other"):
            here.first(lambda: None)
    # A message that nobody waits for any more: a job would have ended, this test has to take it away.
    world.comm.barrier()
    if here.rank == 0:
        here.first(lambda: None)


@pytest.mark.parallel([1, 2, 3])
def test_one_rank_of_a_node_may_speak(world):
    from mpi4py import MPI

    here = World(MPI.COMM_WORLD, timeout_s=60)
    spoke = world.comm.allgather(here.claim("dpnn: it failed", 1))
    assert spoke.count(True) == 1


@pytest.mark.parallel([1, 2, 3])
def test_a_world_is_left_together(world):
    from mpi4py import MPI

    arrived = np.zeros(world.size)
    with World(MPI.COMM_WORLD, timeout_s=60) as here:
        here.comm.Allgather(np.ones(1), arrived)
    here.close()
    assert arrived.sum() == world.size
