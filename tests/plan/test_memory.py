"""Where buffers lie: nothing that is alive at once overlaps, and little is wasted."""

import numpy as np
import pytest

from dpnn.plan import Arena
from dpnn.plan.memory import ALIGNMENT, Life, pack

from .conftest import wide


def test_buffers_that_live_at_once_never_overlap():
    rng = np.random.default_rng(0)
    for _ in range(30):
        lives = {}
        for i in range(40):
            first = int(rng.integers(0, 50))
            lives[i, -1] = Life(int(rng.integers(1, 5000)), first, first + int(rng.integers(0, 20)))
        offsets, total = pack(lives)
        for a, life in lives.items():
            assert offsets[a] % ALIGNMENT == 0
            assert offsets[a] + life.nbytes <= total
            for b, other in lives.items():
                if a != b and life.first <= other.last and other.first <= life.last:
                    assert offsets[a] + life.nbytes <= offsets[b] or offsets[b] + other.nbytes <= offsets[a]


def test_buffers_that_follow_on_one_another_share_their_place():
    lives = {(i, -1): Life(1000, 2 * i, 2 * i + 1) for i in range(10)}
    _, total = pack(lives)
    assert total == 1024


def test_evaluation_needs_less_memory_than_training(build):
    assert build(wide(), mode="eval").layout.nbytes < build(wide()).layout.nbytes


def test_room_is_asked_for_before_any_is_taken():
    arena = Arena()
    arena.reserve(256)
    array = arena.take(64, (4, 4), np.dtype(np.float32))
    assert array.ctypes.data % ALIGNMENT == 0
    with pytest.raises(RuntimeError, match="reserve all room before"):
        arena.reserve(512)
