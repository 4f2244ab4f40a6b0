"""kernels/loss.cu computes what the reference does in float64, in both orders of threads."""

import numpy as np
import pytest

from dpnn.backends.base import Array
from dpnn.backends.cuda import Cuda
from dpnn.backends.reference import Reference
from dpnn.nn import Layer, SigmoidCrossEntropy, SoftmaxCrossEntropy

from ..conftest import Bench
from .shim import Shim

pytestmark = pytest.mark.usefixtures("machine")

LAYERS = [SoftmaxCrossEntropy(), SoftmaxCrossEntropy(weight=0.3, smoothing=0.1), SigmoidCrossEntropy(weight=0.5)]


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def cuda(request: pytest.FixtureRequest) -> Cuda:
    return Cuda(Shim(reverse=request.param))


def agree(cuda: Cuda, layer: Layer, scores: Array, labels: Array) -> None:
    """Loss and gradient are close to the reference's."""
    rows, classes = scores.shape
    shapes = ((classes,), labels.shape[1:])
    it, exact = (Bench(one, layer, *shapes, capacity=rows) for one in (cuda, Reference(np.float64)))
    for one in (it, exact):
        one.put([scores.astype(np.float32), labels], total=2 * rows)
    wanted = exact.forward()
    np.testing.assert_allclose(it.forward(), wanted, rtol=1e-6, atol=1e-7)
    gradient = exact.backward()[0]
    np.testing.assert_allclose(it.backward()[0], gradient, rtol=1e-5, atol=2e-6 * np.abs(gradient).max())


def drawn(layer: Layer, rows: int, classes: int) -> tuple[Array, Array]:
    """Scores and labels."""
    rng = np.random.default_rng(rows)
    several = isinstance(layer, SigmoidCrossEntropy)
    labels = rng.integers(0, 2, (rows, classes)) if several else rng.integers(0, classes, rows)
    return 5 * rng.standard_normal((rows, classes)), labels


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(
    ("rows", "classes"), [(1, 1), (2, 31), (3, 33), (2, 127), (3, 128), (5, 300), (2, 1025), (1, 22003), (300, 2)]
)
def test_any_number_of_classes(cuda: Cuda, layer: Layer, rows: int, classes: int):
    agree(cuda, layer, *drawn(layer, rows, classes))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("classes", [5, 200])
@pytest.mark.parametrize("size", [1e4, 3e37])
def test_extreme_scores(cuda: Cuda, layer: Layer, classes: int, size: float):
    scores, labels = drawn(layer, 4, classes)
    scores = np.clip(scores, -10, 10) * size
    agree(cuda, layer, scores, labels)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_large_common_part_of_the_scores_costs_no_digits(cuda: Cuda, layer: Layer):
    scores, labels = drawn(layer, 3, 40)
    agree(cuda, layer, scores.astype(np.float16) + 4096, labels)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("classes", [5, 200])
def test_what_is_no_number_is_passed_on(cuda: Cuda, layer: Layer, classes: int):
    scores, labels = drawn(layer, 3, classes)
    scores[1, 2] = np.nan
    it = Bench(cuda, layer, (classes,), labels.shape[1:])
    assert np.isnan(it.put([scores, labels]).forward())
    assert np.isnan(it.backward()[0][1, 2])


def test_the_threads_order_changes_no_bit(cuda: Cuda):
    for layer in LAYERS:
        scores, labels = drawn(layer, 3, 700)
        here, there = (Bench(one, layer, (700,), labels.shape[1:]) for one in (cuda, Cuda(Shim())))
        for one in (here, there):
            one.put([scores, labels])
        np.testing.assert_array_equal(here.forward(), there.forward())
        np.testing.assert_array_equal(here.backward()[0], there.backward()[0])
