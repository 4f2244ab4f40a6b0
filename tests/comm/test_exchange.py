"""bfloat16 between nodes: half the bytes, and nothing lost for good."""

import numpy as np
import pytest

from dpnn.comm.reduce import GradientReducer

N, STEPS = 2003, 30


@pytest.fixture(autouse=True, params=[(1 << 18, 64), (100, 2)], ids=["whole", "in runs"])
def _pieces_of_any_size(monkeypatch, request):
    monkeypatch.setattr("dpnn.comm.reduce._LEAST_PIECE", 1)
    monkeypatch.setattr("dpnn.comm.reduce._AT_ONCE", request.param[0])
    monkeypatch.setattr("dpnn.comm.reduce._UNDER_WAY", request.param[1])


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("where", ["halves", "one apart", "not shared"])
def test_rounded_sums_are_right_on_the_average_and_equal_on_all_ranks(world, node_of, where):
    node = node_of(where, n=N)
    sums = GradientReducer(node, lambda lo, hi: None, 60, rounds=True)
    total, worst = np.zeros(N), 0.0
    brought = [np.random.default_rng(rank).normal(size=N).astype(np.float32) for rank in range(world.size)]
    exact = np.sum(brought, axis=0, dtype=np.float64)
    for _ in range(STEPS):
        node.grads[:] = brought[world.rank]
        for lo, hi in ((1000, N), (0, 1000)):
            sums.start(lo, hi)
        sums.finish()
        sums.settle()
        total += node.sums
        worst = max(worst, np.abs(node.sums - exact).max())
        assert len(set(world.comm.allgather(node.sums.tobytes()))) == 1
        sums.settle()
    sums.close()
    largest = np.abs(exact).max()
    assert 1e-4 * largest < worst < 2e-2 * largest  # it was rounded, no more than that
    assert np.abs(total / STEPS - exact).max() < 2 * worst / STEPS * 2


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("where", ["halves", "one apart", "not shared"])
@pytest.mark.parametrize(("dtype", "native"), [("float32", True), ("float64", False)])
def test_plain_sums_are_those_of_the_nodes_in_their_order(world, node_of, where, dtype, native):
    node = node_of(where, n=N, dtype=dtype, native=native)
    sums = GradientReducer(node, lambda lo, hi: None, 60)
    brought = [np.random.default_rng(rank).normal(size=N).astype(dtype) for rank in range(world.size)]
    by_node = [np.sum([brought[replica] for replica in group], axis=0) for group in node.groups]
    for _ in range(3):
        node.grads[:] = brought[world.rank]
        for lo, hi in ((1000, N), (3, 1000), (0, 3)):
            sums.start(lo, hi)
        sums.finish()
        sums.settle()
        np.testing.assert_allclose(node.sums, np.sum(by_node, axis=0), rtol=0, atol=1e-6 if native else 1e-14)
        assert len(set(world.comm.allgather(node.sums.tobytes()))) == 1
        sums.settle()
    sums.close()


@pytest.mark.parallel([2])
def test_on_one_node_nothing_is_rounded(world, node_of):
    node = node_of("together", n=N)
    sums = GradientReducer(node, lambda lo, hi: None, 60, rounds=True)
    node.grads[:] = 1.0001
    sums.start(0, N)
    sums.finish()
    sums.settle()
    assert set(node.sums.tolist()) == {np.float32(1.0001) * 2}
    sums.close()
