"""kernels/lrn.cu computes what the reference does in float64, in both orders of threads."""

import numpy as np
import pytest

from dpnn.backends.cuda import Cuda
from dpnn.backends.reference import Reference
from dpnn.nn import LocalResponseNorm, Shape

from ..conftest import Bench
from .shim import Shim

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def cuda(request: pytest.FixtureRequest) -> Cuda:
    return Cuda(Shim(reverse=request.param))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (LocalResponseNorm(5, alpha=0.3, beta=0.75, k=2.0), (96, 3, 5)),
        (LocalResponseNorm(5, alpha=0.3), (1, 2, 3)),
        (LocalResponseNorm(5, alpha=0.3, beta=0.6), (4, 2, 3)),
        (LocalResponseNorm(5, alpha=0.3), (1032, 1, 2)),
        (LocalResponseNorm(1, alpha=2.0, beta=1.0), (5, 3, 3)),
        (LocalResponseNorm(2, alpha=0.7, beta=0.5), (37, 1, 3)),
        (LocalResponseNorm(4, alpha=0.7, beta=0.6), (256, 1, 2)),
        (LocalResponseNorm(6, alpha=0.7), (257, 1, 2)),
        (LocalResponseNorm(5, alpha=0.7), (600, 1, 2)),
        (LocalResponseNorm(301, alpha=9.0), (600, 1, 1)),
        (LocalResponseNorm(2000, alpha=9.0), (270, 1, 1)),
        (LocalResponseNorm(3, alpha=0.0), (3, 2, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 3])
def test_windows_of_channels(cuda: Cuda, layer: LocalResponseNorm, shape: Shape, rows: int):
    it, exact = Bench(cuda, layer, shape), Bench(Reference(np.float64), layer, shape)
    inputs, dys = it.samples(rows)
    inputs, dys = [inputs[0].astype(np.float32)], [dys[0].astype(np.float32)]
    for one in (it, exact):
        one.put(inputs, dys)
    np.testing.assert_allclose(it.forward(), exact.forward(), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(it.backward()[0], exact.backward()[0], rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("size", [1e-18, 1e4, 1e15])
def test_small_and_large_numbers(cuda: Cuda, size: float):
    layer = LocalResponseNorm(5, alpha=1e-4, k=2.0)
    it, exact = Bench(cuda, layer, (9, 2, 2)), Bench(Reference(np.float64), layer, (9, 2, 2))
    inputs, dys = it.samples(2)
    inputs[0] = (inputs[0] * size).astype(np.float32)
    results = []
    for one in (it, exact):
        y = one.put(inputs, dys).forward()
        results.append((y, one.backward()[0]))
    for ours, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_passed_on(cuda: Cuda, value: float):
    it = Bench(cuda, LocalResponseNorm(5, alpha=0.1), (9, 3, 3))
    inputs, dys = it.samples(2)
    inputs[0][1, 4, 1, 2] = value
    wrong = np.isnan(it.put(inputs, dys).forward())
    assert wrong[1, 4, 1, 2]
    assert not wrong[0].any()
