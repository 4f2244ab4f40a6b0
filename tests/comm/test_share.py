"""One rank's array reaches all, whatever the pieces it travels in."""

import numpy as np
import pytest

from dpnn.comm import share as module
from dpnn.comm.share import share
from dpnn.errors import RankError


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("piece", [1 << 24, 100, 7])
def test_shared_values_are_rank_0s_on_all(world, monkeypatch, dtype, piece):
    monkeypatch.setattr(module, "_PIECE", piece)
    flat = np.arange(250, dtype=dtype) + 1000 * world.rank
    share(world.comm, flat, 60)
    assert flat.tolist() == list(range(250))


@pytest.mark.parallel([1, 2])
def test_nothing_to_share_is_fine(world):
    share(world.comm, np.zeros(0), 60)


@pytest.mark.parallel(2)
def test_a_rank_0_that_does_not_share_is_a_rank_error(world):
    flat = np.full(3, float(world.rank))
    if world.rank == 1:
        with pytest.raises(RankError, match=r"waited 0\.2 s for"):
            share(world.comm, np.zeros(3), 0.2)
    world.comm.barrier()
    if world.rank == 0:
        share(world.comm, flat, 60)  # takes away the message that rank 1 asked for
    world.comm.barrier()
