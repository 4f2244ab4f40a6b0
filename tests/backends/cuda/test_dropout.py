"""Dropout on a device drops the numbers that the reference drops, whatever their order in memory."""

from typing import Any

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.cuda import Cuda
from dpnn.backends.reference import Reference

from .shim import Shim

pytestmark = pytest.mark.usefixtures("machine")

SHAPES = [(1,), (7,), (1024,), (1030,), (1, 1, 1), (1, 3, 3), (5, 3, 3), (3, 5, 7), (4, 2, 2), (130, 1, 1), (33, 4, 6)]


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_are_the_references_bit_for_bit(bench: Any, shape: nn.Shape, reverse: bool) -> None:
    ours, wanted = (
        bench(kind, nn.Dropout(0.3), shape, capacity=4) for kind in (Cuda(Shim(reverse)), Reference(np.float32))
    )
    (x, ids), dys = ours.samples(4)
    ids[0] = 2**64 - 1
    for it in (ours, wanted):
        it.put([x, ids], dys, seed=2**32 - 1, epoch=7).forward()
    np.testing.assert_array_equal(ours.output_buffer, wanted.output_buffer)
    np.testing.assert_array_equal(ours.backward()[0], wanted.backward()[0])


@pytest.mark.parametrize("rate", [0.0, 0.5, 1 - 2**-53])
def test_rates_from_nothing_to_almost_everything(bench: Any, rate: float) -> None:
    it = bench(Cuda(Shim()), nn.Dropout(rate), (3, 10, 10), capacity=5)
    _, ids = it.samples(5)[0]
    x = np.ones((5, 3, 10, 10))
    y = it.put([x, ids], [x]).forward()
    np.testing.assert_array_equal(y, it.backward()[0])
    assert abs((y != 0).mean() - (1 - rate)) < 0.05
    assert set(np.unique(y)) <= {0, np.float32(1 / (1 - rate))}


def test_evaluation_copies(bench: Any) -> None:
    it = bench(Cuda(Shim()), nn.Dropout(0.5), (5, 3, 7), mode="eval")
    inputs, _ = it.samples(2)
    np.testing.assert_array_equal(it.put(inputs).forward(), inputs[0].astype(np.float32))
    assert np.isnan(it.output_buffer[2:]).all()
