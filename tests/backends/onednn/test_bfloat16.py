"""Convolutions whose inputs are rounded to bfloat16, where the processor has it."""

import numpy as np
import pytest

from dpnn.backends.onednn import OneDNN, Unavailable
from dpnn.nn import Conv
from dpnn.team import Team

from ..conftest import ONEDNN, Bench


@pytest.fixture(scope="module")
def rounding() -> OneDNN:
    try:
        return OneDNN(Team(2), bfloat16=True)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("layer", [Conv(32, 3, padding=1), Conv(48, 1), Conv(16, 5, 2, groups=2)])
def test_results_are_rounded_no_more_than_bfloat16_does(rounding, layer):
    rng = np.random.default_rng(0)
    sides = [Bench(backend, layer, (16, 14, 14), capacity=4) for backend in (rounding, ONEDNN)]
    x = rng.standard_normal((4, 16, 14, 14), np.float32)
    dy = rng.standard_normal((4, *sides[0].node.shape), np.float32)
    for role, value in sides[0].params.items():
        value[...] = rng.standard_normal(value.shape)
        sides[1].params[role][...] = value
    outcomes = []
    for side in sides:
        y = side.put([x], [dy]).forward().copy()
        outcomes.append([y, side.backward()[0].copy(), side.d_params["weight"].copy()])
    off = [np.abs(ours - exact).max() / np.abs(exact).max() for ours, exact in zip(*outcomes, strict=True)]
    assert max(off) < 2e-2  # 8 bits of 24 are left
    if layer.size == 3:  # not everything is rounded: oneDNN 3.2 makes the filters' gradient, and 1 x 1, in float32
        assert min(off[:2]) > 1e-5
