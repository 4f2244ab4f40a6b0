"""A ReLU by itself on the device, in every order of threads."""

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.cuda import Cuda

pytestmark = pytest.mark.usefixtures("machine")


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 7), (8, 6, 6), (1030,)])
def test_relu_and_its_gradient(shim, bench, shape):
    it = bench(Cuda(shim), nn.ReLU(), shape, capacity=3)
    inputs, dys = it.samples(2)
    inputs[0].flat[0] = 0
    y = it.put(inputs, dys).forward()
    assert np.array_equal(y, np.maximum(inputs[0], 0).astype(np.float32))
    assert np.isnan(it.output_buffer[2]).all()
    (dx,) = it.backward()
    assert np.array_equal(dx, np.where(inputs[0] > 0, dys[0], 0).astype(np.float32))
    assert np.isnan(it.d_inputs[0][2]).all()
