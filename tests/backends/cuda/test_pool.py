"""kernels/pool.cu computes what the reference does in float64, in both orders of threads."""

from typing import Any

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.base import Array
from dpnn.backends.cuda import Cuda, pool
from dpnn.backends.reference import Reference

from ..conftest import Bench
from .shim import Shim

pytestmark = pytest.mark.usefixtures("machine")

LAYERS = [
    (nn.MaxPool(3, 2, padding=1), (4, 7, 6)),
    (nn.MaxPool(3, 2, ceil=True), (12, 6, 4)),
    (nn.MaxPool((1, 2), (3, 1)), (8, 7, 2)),
    (nn.MaxPool(3, 1, padding=1), (257, 2, 3)),
    (nn.MaxPool(2), (1032, 2, 2)),
    (nn.MaxPool(1), (1, 1, 1)),
    (nn.MaxPool(5, 2, padding=2, ceil=True), (3, 2, 1)),
    (nn.MaxPool((15, 17), 1, padding=(0, 8)), (2, 15, 18)),
    (nn.MaxPool(16, 3), (4, 17, 19)),
    (nn.AvgPool(3, 2, padding=1, ceil=True), (4, 7, 6)),
    (nn.AvgPool((2, 3), (3, 1), padding=(1, 0), ceil=True), (5, 8, 4)),
    (nn.AvgPool(7), (8, 7, 7)),
    (nn.AvgPool(3, 2, padding=1), (1032, 2, 3)),
    (nn.AvgPool(2, 1), (259, 2, 2)),
    (nn.GlobalAvgPool(), (1, 1, 1)),
    (nn.GlobalAvgPool(), (1, 9, 33)),
    (nn.GlobalAvgPool(), (7, 5, 5)),
    (nn.GlobalAvgPool(), (12, 7, 7)),
    (nn.GlobalAvgPool(), (132, 3, 3)),
]
TIES = [
    (nn.MaxPool(3, 2, padding=1), (4, 7, 6)),
    (nn.MaxPool(3, 1, ceil=True), (3, 5, 5)),
    (nn.MaxPool(17, 2), (2, 19, 19)),
]


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def cuda(request: pytest.FixtureRequest) -> Cuda:
    return Cuda(Shim(reverse=request.param))


def both(backend: Cuda, layer: nn.Layer, shape: nn.Shape, x: Array, dy: Array) -> list[tuple[Any, Any]]:
    """Output and gradient of the input: ours, and the reference's in float64."""
    results = []
    for one in (backend, Reference(np.float64)):
        it = Bench(one, layer, shape)
        y = it.put([x], [dy]).forward().copy()
        results.append((y, it.backward()[0]))
    return list(zip(*results, strict=True))


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_windows_of_all_kinds(cuda: Cuda, layer: nn.Layer, shape: nn.Shape, rows: int):
    inputs, dys = Bench(cuda, layer, shape).samples(rows)
    for ours, wanted in both(cuda, layer, shape, inputs[0].astype(np.float32), dys[0].astype(np.float32)):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("values", [[0, 1, 2], [0, 1, np.nan], [np.inf, 1, np.nan]], ids=str)
@pytest.mark.parametrize(("layer", "shape"), TIES, ids=str)
def test_the_first_of_equal_numbers_gets_the_gradient_and_what_is_no_number_none(
    cuda: Cuda, layer: nn.Layer, shape: nn.Shape, values: list[float]
):
    rng = np.random.default_rng(1)
    x, dy = rng.choice(values, (2, *shape)), rng.integers(1, 99, (2, *layer.infer(shape)))
    for ours, wanted in both(cuda, layer, shape, x, dy):
        np.testing.assert_array_equal(ours, wanted)


def test_of_nothing_but_minus_infinities_the_first_in_the_image_gets_the_gradient(cuda: Cuda):
    it = Bench(cuda, nn.MaxPool(3, 3, padding=1), (1, 2, 2))
    y = it.put([np.full((1, 1, 2, 2), -np.inf)], [np.full((1, 1, 1, 1), 5)]).forward()
    np.testing.assert_array_equal(y, -np.inf)
    np.testing.assert_array_equal(it.backward()[0][0, 0], [[5, 0], [0, 0]])


@pytest.mark.parametrize("layer", [nn.MaxPool(2), nn.AvgPool(2), nn.GlobalAvgPool()], ids=str)
def test_blocks_go_round_where_pixels_and_images_are_more_than_a_grid_may_hold(
    cuda: Cuda, layer: nn.Layer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pool, "MOST", 2)
    inputs, dys = Bench(cuda, layer, (4, 4, 5)).samples(3)
    for ours, wanted in both(cuda, layer, (4, 4, 5), inputs[0].astype(np.float32), dys[0].astype(np.float32)):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.MaxPool(2), nn.AvgPool(2), nn.GlobalAvgPool()], ids=str)
def test_what_is_no_number_is_passed_on(cuda: Cuda, layer: nn.Layer):
    it = Bench(cuda, layer, (8, 4, 4))
    inputs, dys = it.samples(2)
    inputs[0][1, 5, 1, 2] = np.nan
    y = it.put(inputs, dys).forward()
    assert np.isnan(y[1, 5]).any()
    assert np.isnan(y).sum() == 1


def test_places_take_a_byte_each_where_the_window_is_small_and_none_in_evaluation(cuda: Cuda):
    for layer, nbytes in ((nn.MaxPool((15, 17)), 1), (nn.MaxPool(16), 4)):
        p, q = layer.infer((4, 40, 40))[1:]
        group = Bench(cuda, layer, (4, 40, 40)).group
        assert cuda.room(group, 3, "train").kept == 3 * 4 * p * q * nbytes
        assert cuda.room(group, 3, "eval").kept == 0
