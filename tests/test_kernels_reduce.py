"""The kernels that sum gradients equal NumPy bit by bit, at every instruction set that this processor has."""

import math

import numpy as np
import pytest

from dpnn.native import LEVELS, Kernels

LEVELS_BY_LIMIT = {"SSE41": LEVELS[0], "AVX2": LEVELS[1], "": LEVELS[2]}
LENGTHS = [1, 2, 7, 8, 15, 16, 17, 31, 1003, 16384 + 16, 16384 + 37]
"""Tails of every vector width, one number, and enough for two threads."""
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0]


@pytest.fixture(params=LEVELS_BY_LIMIT)
def kernels(request, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", request.param)
    found = Kernels(2)
    if found.level != LEVELS_BY_LIMIT[request.param]:
        pytest.skip(f"this processor has nothing above {found.level}")
    return found


def numbers(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearer of the two neighbours, of two equally near ones the even; what lies beyond the last is 2^128."""
    bits = x.view(np.uint32)
    down = bits >> 16
    with np.errstate(invalid="ignore"):
        down_value, up_value = (
            np.nan_to_num((upper << 16).view(np.float32).astype(np.float64), posinf=2.0**128, neginf=-(2.0**128))
            for upper in (down, down + 1)
        )
    to_down, to_up = np.abs(x - down_value), np.abs(up_value - x)
    up = (to_up < to_down) | ((to_up == to_down) & (down % 2 == 1))
    return np.where(np.isinf(x), down, down + up).astype(np.uint16)


def from_bfloat16(half: np.ndarray) -> np.ndarray:
    return (half.astype(np.uint32) << 16).view(np.float32)


def left_out(x: np.ndarray, half: np.ndarray) -> np.ndarray:
    """What rounding left out; nothing of what is not finite."""
    with np.errstate(invalid="ignore"):
        left = x - from_bfloat16(half)
    return np.where(np.isfinite(left), left, 0)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_add_sums_in_order_and_writes_nothing_else(kernels, k):
    for n in LENGTHS:
        for into in {0, k - 1, k}:  # the first or the last of the sources, or another array
            blocks = [np.full(n + 40, 77.0, np.float32) for _ in range(k + 1)]
            arrays = [block[3 : 3 + n] for block in blocks]  # not aligned
            for i, array in enumerate(arrays):
                array[:] = numbers(n, seed=i)
            expected = arrays[0].copy()
            for source in arrays[1:k]:
                expected += source
            kernels.bind("add", n, k, arrays[:k], arrays[into])()
            assert arrays[into].tobytes() == expected.tobytes()
            for i, (block, array) in enumerate(zip(blocks, arrays, strict=True)):
                assert i == into or array.tobytes() == numbers(n, seed=i).tobytes()
                assert (block[:3] == 77).all()
                assert (block[3 + n :] == 77).all()


def test_add_passes_on_what_is_not_a_number(kernels):
    a, b = (grid.ravel().astype(np.float32) for grid in np.meshgrid([*SPECIAL, 1.0], [*SPECIAL, -1.0]))
    with np.errstate(invalid="ignore"):
        expected = a + b
    to = np.empty_like(a)
    kernels.bind("add", a.size, 2, [a, b], to)()
    np.testing.assert_array_equal(to, expected)


@pytest.mark.parametrize("n", [0, 1, 7, 17, 1003, 16384 + 37, 100_001])
def test_squares_are_summed_in_double(kernels, n):
    x = numbers(n) * np.float32(1e25)  # whose squares are beyond float32
    expected = math.fsum(x.astype(np.float64) ** 2)
    found = kernels.call("squares", n, x.ctypes.data)
    assert found == pytest.approx(expected, rel=1e-13)
    assert found == kernels.call("squares", n, x.ctypes.data)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_squares_of_what_is_not_finite_are_not_finite(kernels, bad):
    x = np.ones(1003, np.float32)
    x[500] = bad
    assert not math.isfinite(kernels.call("squares", x.size, x.ctypes.data))


def test_the_least_of_counters_that_lie_apart(kernels):
    stride, lowest = 5, [1 << 40, 3, -7]
    counters = np.full((4, stride), -100)
    for rank, value in enumerate([1 << 41, 1 << 40, 3, -7]):
        kernels.call("publish", counters[rank].ctypes.data, value)
    assert [kernels.call("least", counters.ctypes.data, n, stride) for n in (2, 3, 4)] == lowest
    assert (counters[:, 1:] == -100).all()


def test_bfloat16_is_rounded_to_the_nearest_even_for_all_exponents_and_signs(kernels):
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    x = np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    x = x[~np.isnan(x)] + np.float32(0)  # -0 and no error is 0
    expected, error, out = to_bfloat16(x), np.zeros_like(x), np.empty(x.size, np.uint16)
    for lo in range(0, x.size, 1 << 14):  # by the calling thread alone: the others take denormal numbers for 0
        part = slice(lo, lo + (1 << 14))
        kernels.bind("to_bfloat16", x[part].size, x[part], error[part], out[part])()
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(error, left_out(x, expected))


def test_bfloat16_by_two_threads(kernels):
    x = numbers(50_001)
    expected, error, out = to_bfloat16(x), np.zeros_like(x), np.empty(x.size, np.uint16)
    kernels.bind("to_bfloat16", x.size, x, error, out)()
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(error, left_out(x, expected))


@pytest.mark.parametrize("n", [1, 7, 17, 1003])
def test_the_error_of_the_last_time_counts_and_nothing_beyond_is_written(kernels, n):
    x, error, out = numbers(n + 5), numbers(n + 5, seed=1) * np.float32(0.01), np.full(n + 5, 7, np.uint16)
    value, before = x + error, error.copy()
    expected = to_bfloat16(value)
    kernels.bind("to_bfloat16", n, x, error, out)()
    np.testing.assert_array_equal(out, [*expected[:n], *[7] * 5])
    np.testing.assert_array_equal(error, [*(value - from_bfloat16(expected))[:n], *before[n:]])


def test_with_its_error_fed_back_a_running_sum_stays_within_one_unit(kernels):
    """1.001 is rounded to 1 each time: without feedback 50 steps would lose 0.05."""
    ulp = 2.0**-7
    x = np.concatenate([np.full(3, 1.001), np.full(3, -1.001), 1 + np.arange(30) / 1000]).astype(np.float32)
    error, out, sums = np.zeros_like(x), np.empty(x.size, np.uint16), np.zeros(x.size)
    convert = kernels.bind("to_bfloat16", x.size, x, error, out)
    for step in range(1, 51):
        convert()
        sums += from_bfloat16(out)
        assert np.abs(sums - step * x.astype(np.float64)).max() <= ulp
        np.testing.assert_allclose(sums + error, step * x.astype(np.float64), rtol=0, atol=step * 1e-7)
    error[:] = 0
    convert()
    assert from_bfloat16(out)[0] == 1.0


def test_what_is_not_a_number_stays_so_in_bfloat16_and_leaves_no_error(kernels):
    quiet, loud = np.float32("nan"), np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    x = np.array([quiet, -quiet, np.inf, -np.inf, 3.4e38, -3.4e38, *loud.view(np.float32)], np.float32)
    error, out = np.full(x.size, 0.25, np.float32), np.empty(x.size, np.uint16)
    kernels.bind("to_bfloat16", x.size, x, error, out)()
    back = from_bfloat16(out)
    assert np.isnan(back).tolist() == np.isnan(x).tolist()
    np.testing.assert_array_equal(back[2:6], [np.inf, -np.inf, np.inf, -np.inf])
    assert not error.any()


@pytest.mark.parametrize("n", [1, 7, 17, 1003, 16384 + 37])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_add_bfloat16_sums_in_float32_in_order(kernels, n, k):
    stride = n + 9
    x = np.zeros((k, stride), np.uint16)
    for i in range(k):
        x[i] = to_bfloat16(numbers(stride, seed=i))
        x[i, : min(n, 6)] = to_bfloat16(np.roll(np.array([*SPECIAL[2:], 1e38, 3e38], np.float32), i))[:n]
    expected = np.zeros(n, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for row in x:
            expected += from_bfloat16(row[:n])
    to = np.full(n + 5, 7, np.float32)
    kernels.bind("add_bfloat16", n, k, stride, x, to)()
    np.testing.assert_array_equal(to, [*expected, *[7] * 5])


def test_add_bfloat16_passes_on_what_is_not_a_number(kernels):
    x = np.array([[0x7FC0, 0x7F81, 0x3F80], [0x3F80, 0x3F80, 0xFFC1]], np.uint16)
    to = np.zeros(3, np.float32)
    kernels.bind("add_bfloat16", 3, 2, 3, x, to)()
    assert np.isnan(to).all()
