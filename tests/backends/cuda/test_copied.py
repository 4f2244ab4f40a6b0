"""What tests of kernels get back from a GPU, with the stand-in in its place."""

import numpy as np
import pytest

from . import copied
from .copied import Copied
from .shim import Shim


@pytest.mark.parametrize("made", ["views of one", "in an order of its own"])
def test_what_a_kernel_wrote_comes_back_however_arrays_lie(monkeypatch, made):
    there = Shim()
    monkeypatch.setattr(copied, "gpu", lambda: there)
    monkeypatch.setattr(copied, "DONE", set())  # nothing runs on a GPU here
    x = np.linspace(-1, 1, 120, dtype=np.float32).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    y = np.full_like(x, np.nan)  # has channels last, and no base
    if made == "views of one":
        y = np.full((4, 4, 5, 3), np.nan, np.float32)[1:3].transpose(0, 3, 1, 2)
    Copied().kernel("pointwise.cu", "relu")((1,), (256,), x, y, np.int64(60))
    assert np.array_equal(y[0], np.maximum(x[0], 0))
    assert np.isnan(y[1]).all()
