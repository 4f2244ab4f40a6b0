"""Initial parameters depend on (seed, name, index) alone."""

import numpy as np
import pytest

from dpnn.nn.init import draw
from dpnn.nn.layer import ParamSpec

HE = ParamSpec((100_003,), "he", fan_in=50)
FIRST = [0.2404735198096998, -0.14612548357018107, -0.24119115325888596]


def test_he_is_normal_with_the_variance_2_by_fan_in():
    values = draw(0, "conv1.weight", HE, dtype=np.float64) / np.sqrt(2 / 50)
    error = 1 / np.sqrt(values.size)
    assert abs(values.mean()) < 4 * error
    assert abs(values.var() - 1) < 4 * np.sqrt(2) * error
    assert abs((values**3).mean()) < 4 * np.sqrt(15) * error
    assert abs((values**4).mean() - 3) < 4 * np.sqrt(96) * error


def test_zeros_and_ones():
    assert draw(0, "bias", ParamSpec((2, 3), "zeros")).tolist() == [0] * 6
    assert draw(0, "gamma", ParamSpec((2, 3), "ones"), 1, 3).tolist() == [1] * 2


@pytest.mark.parametrize("spec", [HE])
@pytest.mark.parametrize(("lo", "hi"), [(0, 1), (1, 2), (3, 70_001), (65_537, 100_003), (100_002, 100_003), (7, 7)])
def test_a_piece_is_the_slice_of_the_whole_bit_for_bit(spec, lo, hi, monkeypatch):
    whole = draw(5, "dense1.weight", spec)
    monkeypatch.setattr("dpnn.nn.init._BLOCK", 1 << 12)
    piece = draw(5, "dense1.weight", spec, lo, hi)
    assert piece.tobytes() == whole[lo:hi].tobytes()


def test_float32_is_float64_rounded():
    assert np.array_equal(draw(1, "w", HE), draw(1, "w", HE, dtype=np.float64).astype(np.float32))
    assert draw(1, "w", HE).dtype == np.float32


def test_values_depend_on_seed_and_name_and_not_on_what_was_drawn_before():
    first = draw(1, "a", HE)
    others = [draw(2, "a", HE), draw(1, "b", HE)]
    assert not any((other == first).mean() > 0.01 for other in others)
    assert np.array_equal(draw(1, "a", HE), first)


def test_the_first_values_are_the_same_for_ever():
    assert draw(1, "conv1.weight", HE, 0, 3, np.float64) == pytest.approx(FIRST, rel=1e-12)
