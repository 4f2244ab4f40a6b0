"""Batch normalisation on a device: odd shapes, several blocks, both orders of threads, with and without a ReLU."""

from typing import Any

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.cuda import Cuda
from dpnn.backends.reference import Reference

from .behind import WithReLU
from .shim import Shim

pytestmark = pytest.mark.usefixtures("machine")

SHAPES = [  # rows, and what one of them is
    (1, (1,)),
    (3, (1, 1, 1)),
    (9, (5,)),
    (37, (300,)),  # four channels a thread, three columns of blocks
    (5, (3, 20, 20)),  # several chunks of pixels
    (7, (16, 9, 11)),
    (2, (67, 3, 5)),
    (3, (1030, 1, 2)),  # one channel a thread, many columns
    (1, (1028, 1, 1)),
]


@pytest.fixture(params=[False, True], ids=["", "reverse"])
def device(request: pytest.FixtureRequest) -> Shim:
    return Shim(request.param)


def compare(device: Shim, bench: Any, layer: nn.Layer, shapes: Any, rows: int, relu: bool, x: Any = None, **step: Any):
    """Everything that a layer writes, against the reference in float64 that follows our ReLU."""
    backend = WithReLU(Cuda(device)) if relu else Cuda(device)
    ours = bench(backend, layer, *shapes, capacity=rows + 1)
    exact = bench(Reference(np.float64), layer, *shapes, capacity=rows + 1)
    inputs, dys = ours.samples(rows)
    inputs[0] = (inputs[0] if x is None else x).astype(np.float32)
    if len(shapes) > 1:  # sums of all replicas: of these rows and of others
        inputs[1] = np.stack([np.full(shapes[1][1], 3.0), np.linspace(300, 400, shapes[1][1])])
    y = ours.put(inputs, dys, **step).forward().copy()
    passed = y > 0 if relu else np.ones(y.shape, bool)
    dys = [dy.astype(np.float32) * passed for dy in dys] if layer.batched else dys
    wanted = exact.put(inputs, dys, **step).forward()
    same(y, np.maximum(wanted, 0) if relu else wanted)
    if not layer.batched:
        for it in (ours, exact):
            it.dys[0][...] = np.linspace(-1, 1, it.dys[0].size).reshape(it.dys[0].shape)
    for dx, other in zip(ours.backward(), exact.backward(), strict=True):
        same(dx, other)
    for role, d_param in ours.d_params.items():
        same(d_param, exact.d_params[role])


def same(ours: Any, wanted: Any) -> None:
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5 * max(1e-3, np.abs(wanted).max()))


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize(("rows", "shape"), SHAPES, ids=str)
def test_normalisation_over_this_ranks_rows(device: Shim, bench: Any, rows: int, shape: Any, relu: bool) -> None:
    x = np.random.default_rng(1).normal(0.5, 2, (rows, *shape))
    compare(device, bench, nn.BatchNorm(eps=1e-3), [shape], rows, relu, x, total=2 * rows)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize(("rows", "shape"), SHAPES[2:7], ids=str)
def test_normalisation_by_the_sums_of_all(device: Shim, bench: Any, rows: int, shape: Any, relu: bool) -> None:
    shapes = [shape, (2, shape[0])]
    compare(device, bench, nn.BatchNormalize(), shapes, rows, relu, batch=rows + 4, total=3 * rows)


@pytest.mark.parametrize(("rows", "shape"), SHAPES, ids=str)
def test_sums_over_a_batch(device: Shim, bench: Any, rows: int, shape: Any) -> None:
    compare(device, bench, nn.BatchSums(), [shape], rows, False, batch=rows + 4)


def test_sums_are_taken_in_float64(device: Shim, bench: Any) -> None:
    it = bench(Cuda(device), nn.BatchSums(), (4, 20, 30), capacity=5)
    x = np.random.default_rng(0).normal(1000, 1, (5, 4, 20, 30)).astype(np.float32).astype(np.float64)
    wanted = [x.sum((0, 2, 3)), (x**2).sum((0, 2, 3))]
    np.testing.assert_allclose(it.put([x]).forward(), wanted, rtol=1e-14)


def test_sums_of_nothing_are_zeros(device: Shim, bench: Any) -> None:
    sums = bench(Cuda(device), nn.BatchSums(), (5, 2, 2))
    assert not sums.put([np.zeros((0, 5, 2, 2))], batch=3).forward().any()
    norm = bench(Cuda(device), nn.BatchNormalize(), (5, 2, 2), (2, 5))
    norm.put([np.zeros((0, 5, 2, 2)), np.ones((2, 5))], batch=3, total=3).forward()
    norm.backward()
    for gradient in (norm.d_inputs[1], *norm.d_params.values()):
        assert not gradient.any()


def test_a_large_mean_costs_little_precision(device: Shim, bench: Any) -> None:
    ours, exact = (bench(kind, nn.BatchNorm(), (4, 7, 9), capacity=6) for kind in (Cuda(device), Reference(np.float64)))
    x = np.random.default_rng(2).normal(1000, 1, (6, 4, 7, 9)).astype(np.float32)
    for it in (ours, exact):
        it.put([x], [np.sin(x)]).forward()
    for a, b in zip(ours.backward(), exact.backward(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    np.testing.assert_allclose(ours.output_buffer, exact.output_buffer, atol=1e-3)
    np.testing.assert_allclose(ours.d_params["running_var"], exact.d_params["running_var"], rtol=1e-6)


def test_a_constant_channel_becomes_its_bias(device: Shim, bench: Any) -> None:
    it = bench(Cuda(device), nn.BatchNorm(), (3, 5, 5), capacity=3)
    x = np.broadcast_to(np.array([0.1, -7.3, 1e3])[:, None, None], (3, 3, 5, 5))
    y = it.put([x], [np.ones(x.shape)]).forward()
    np.testing.assert_allclose(y, np.broadcast_to(it.params["bias"][:, None, None], y.shape), rtol=1e-4)
    assert np.isfinite(it.backward()[0]).all()


@pytest.mark.parametrize("shape", [(3, 20, 20), (8, 15, 15)], ids=str)
def test_sums_have_one_order(bench: Any, shape: Any) -> None:
    written = []
    for reverse in (False, True):
        it = bench(WithReLU(Cuda(Shim(reverse))), nn.BatchNorm(), shape, capacity=6)
        inputs, dys = it.samples(6)
        y = it.put(inputs, dys).forward()
        written.append([y, *it.backward(), *it.d_params.values()])
    for a, b in zip(*written, strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluation_takes_the_running_statistics_with_a_relu_too(device: Shim, bench: Any) -> None:
    ours = bench(WithReLU(Cuda(device)), nn.BatchNorm(), (12, 3, 5), mode="eval")
    exact = bench(Reference(np.float64), nn.BatchNorm(), (12, 3, 5), mode="eval")
    inputs, _ = ours.samples(3)
    same(ours.put(inputs).forward(), np.maximum(exact.put(inputs).forward(), 0))


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
def test_what_is_not_a_number_is_passed_on(device: Shim, bench: Any, relu: bool) -> None:
    it = bench(WithReLU(Cuda(device)) if relu else Cuda(device), nn.BatchNorm(), (3, 2, 2))
    (x,), dys = it.samples(2)
    x[1, 2, 0, 1] = np.nan
    y = it.put([x], dys).forward()
    assert np.isnan(y[:, 2]).all()
    assert np.isfinite(y[:, :2]).all()
    assert np.isnan(it.d_params["running_var"]).tolist() == [False, False, True]
