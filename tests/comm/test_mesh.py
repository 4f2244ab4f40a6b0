"""The mesh numbers replicas and parts, and joins them."""

import pytest

from dpnn.comm.mesh import Mesh
from dpnn.errors import JobError


@pytest.mark.parallel([1, 2, 3, 4])
def test_with_one_part_every_rank_is_a_replica(world):
    mesh = Mesh(world)
    assert (mesh.replicas, mesh.replica, mesh.parts, mesh.part) == (world.size, world.rank, 1, 0)
    assert (mesh.data.size, mesh.data.rank) == (world.size, world.rank)
    assert (mesh.model.size, mesh.model.rank) == (1, 0)


@pytest.mark.parallel([2, 4])
def test_the_parts_of_a_replica_are_neighbours(world):
    mesh = Mesh(world, parts=2)
    assert (mesh.replicas, mesh.replica, mesh.part) == (world.size // 2, world.rank // 2, world.rank % 2)
    assert mesh.data.allgather(world.rank) == list(range(mesh.part, world.size, 2))
    assert mesh.model.allgather(world.rank) == [mesh.replica * 2, mesh.replica * 2 + 1]


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("parts", [0, 5])
def test_parts_that_do_not_divide_the_ranks_are_refused(world, parts):
    with pytest.raises(JobError, match=f"{world.size} ranks can't be divided into replicas of {parts} parts; use"):
        Mesh(world, parts)


@pytest.mark.parallel(3)
def test_what_would_divide_the_ranks_is_named(world):
    with pytest.raises(JobError, match="use parts = 1, 3, or a number of ranks that 2 divides"):
        Mesh(world, 2)
