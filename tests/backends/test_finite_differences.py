"""Every gradient is the slope of the loss, by central differences in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

STEP = 1e-5


@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_are_the_slopes_of_the_loss(exact_backend: Any, bench: Any, case: Any, rows: int) -> None:
    it = bench(exact_backend, case.layer, *case.shapes)
    inputs, dys = it.samples(rows)
    it.put(inputs, dys, total=5)
    upstream = np.sum(dys, axis=0) if dys else np.float64(1)

    def loss() -> float:
        return float(np.sum(it.forward() * upstream))

    loss()
    backward = it.backward()
    gradients = [(it.inputs[i], np.array(dx)) for i, dx in enumerate(backward) if dx is not None]
    trained = [p.role for p in it.node.params if p.spec.statistic == 0]
    gradients += [(it.params[role], it.d_params[role].copy()) for role in trained]
    assert gradients
    for array, gradient in gradients:
        slope = slopes(loss, array[: len(gradient)])
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-6 * max(1e-3, np.abs(slope).max()))


def slopes(loss: Callable[[], float], array: Any) -> Any:
    """(loss(array + step) - loss(array - step)) / (2 step), number by number; `array` is a view of what loss reads."""
    slope = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + STEP
        above = loss()
        array[index] = kept - STEP
        below = loss()
        array[index] = kept
        slope[index] = (above - below) / (2 * STEP)
    return slope
