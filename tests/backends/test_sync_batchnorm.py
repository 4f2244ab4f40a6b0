"""BatchSums and BatchNormalize on several replicas are one BatchNorm over all their rows."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dpnn import nn

SPLITS = [(6,), (4, 2), (3, 0, 3), (1, 1, 4)]


def split_over_replicas(backend: Any, bench: Any, split: tuple[int, ...], x: Any, dy: Any, **step: Any) -> Any:
    """y and dx of all rows; the sums over replicas of the gradients of parameters. Sums are made by hand."""
    c, shape, bounds = x.shape[1], x.shape[1:], np.cumsum((0, *split))
    sums = [bench(backend, nn.BatchSums(), shape, capacity=7) for _ in split]
    norms = [bench(backend, nn.BatchNormalize(), shape, (2, c), capacity=7) for _ in split]
    xs, dys = ([a[lo:hi] for lo, hi in pairwise(bounds)] for a in (x, dy))
    step = {"batch": len(x), "total": len(x), **step}
    collected = sum(s.put([part], **step).forward() for s, part in zip(sums, xs, strict=True))
    for s in sums:
        s.output_buffer[...] = collected
    ys, direct = [], []
    for norm, part, dy_part in zip(norms, xs, dys, strict=True):
        norm.put([part, collected], [dy_part], **step)
        norm.step.rows = len(part)
        ys.append(norm.forward())
        direct.append(norm.backward()[0])
    d_collected = sum(norm.d_inputs[1] for norm in norms)
    through = []
    for s in sums:
        s.dys[0][...] = d_collected
        through.append(s.backward()[0])
    dx = np.concatenate([a + b for a, b in zip(direct, through, strict=True)])
    return np.concatenate(ys), dx, {role: sum(norm.d_params[role] for norm in norms) for role in norms[0].params}


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 3), (5,)], ids=str)
def test_any_split_equals_the_whole_batch(exact_backend: Any, bench: Any, split: Any, shape: Any) -> None:
    whole = bench(exact_backend, nn.BatchNorm(), *[shape], capacity=6)
    (x,), (dy,) = whole.samples(6)
    y = whole.put([x], [dy]).forward()
    (dx,) = whole.backward()
    ours = split_over_replicas(exact_backend, bench, split, x, dy)
    np.testing.assert_allclose(ours[0], y, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours[1], dx, rtol=1e-10, atol=1e-10)
    for role, wanted in whole.d_params.items():
        np.testing.assert_allclose(ours[2][role], wanted, rtol=1e-10, atol=1e-10)


def test_a_large_mean_costs_little_precision(backend: Any, bench: Any, exact_backend: Any) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(100, 1, (6, 3, 8, 8)).astype(backend.dtype)
    dy = rng.standard_normal(x.shape)
    whole = bench(exact_backend, nn.BatchNorm(), (3, 8, 8), capacity=6)
    y = whole.put([x], [dy]).forward()
    (dx,) = whole.backward()
    ours = split_over_replicas(backend, bench, (2, 4), x, dy)
    np.testing.assert_allclose(ours[0], y, atol=1e-3)
    np.testing.assert_allclose(ours[1], dx, atol=1e-3)
    for role, wanted in whole.d_params.items():
        np.testing.assert_allclose(ours[2][role], wanted, rtol=1e-3, atol=1e-3)


def test_statistics_are_weighted_by_the_rows_of_the_step(exact_backend: Any, bench: Any) -> None:
    whole = bench(exact_backend, nn.BatchNorm(), (3, 2, 2), capacity=6)
    (x,), (dy,) = whole.samples(6)
    whole.put([x], [dy]).forward()
    _, _, ours = split_over_replicas(exact_backend, bench, (2, 4), x, dy, total=24)
    for role in ("running_mean", "running_var"):
        np.testing.assert_allclose(ours[role], whole.d_params[role] / 4, rtol=1e-10, atol=1e-12)


def test_an_input_that_is_not_trained_gets_no_gradient(exact_backend: Any, bench: Any) -> None:
    class FirstLayer(bench):
        def d_input(self, node: nn.Node, position: int = 0) -> None:
            return None

    it = FirstLayer(exact_backend, nn.BatchNormalize(), (2, 3, 3), (2, 2))
    (x, _), (dy,) = it.samples(2)
    sums = np.stack([x.sum((0, 2, 3)), (x**2).sum((0, 2, 3))])
    it.put([x, sums], [dy]).forward()
    it.backward()
    np.testing.assert_allclose(it.d_params["bias"], dy.sum((0, 2, 3)))
    assert all(np.isnan(dx).all() for dx in it.d_inputs)


def test_evaluation_reads_no_sums(backend: Any, bench: Any) -> None:
    it = bench(backend, nn.BatchNormalize(), (2, 3, 3), (2, 2), mode="eval")
    plain = bench(backend, nn.BatchNorm(), (2, 3, 3), mode="eval")
    (x,), _ = plain.samples(3)
    it.inputs[0][:], it.step.rows = x, 3
    np.testing.assert_allclose(it.forward(), plain.put([x]).forward(), rtol=1e-5, atol=1e-6)
