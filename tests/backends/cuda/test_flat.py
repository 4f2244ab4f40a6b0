"""Updates, sums and bfloat16 on a device equal the formulas wherever slices begin, and the C kernels bit by bit."""

import math

import numpy as np
import pytest

from dpnn.backends.base import Array
from dpnn.backends.cuda import Cuda
from dpnn.backends.cuda.flat import Flat
from dpnn.native import Kernels

from .shim import Shim

pytestmark = pytest.mark.usefixtures("machine")

STARTS = [(0, 0, 0), (1, 1, 1), (3, 3, 3), (1, 2, 3), (0, 0, 1), (2, 0, 2)]
"""Where the slices of three arrays begin: aligned, alike, not alike."""
LENGTHS = [1, 2, 3, 5, 1003, 2051]


@pytest.fixture(params=[False, True], ids=["forward", "reverse"])
def flat(request) -> Flat:
    return Cuda(Shim(reverse=request.param)).arithmetic


def numbers(n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def slices(starts: tuple[int, ...], n: int) -> tuple[list[Array], list[Array]]:
    """Aligned arrays with 9 numbers too many, and their slices of n numbers from `starts` on."""
    wholes = [Shim().empty(4 * (n + 9)).view(np.float32) for _ in starts]
    for seed, whole in enumerate(wholes):
        whole[:] = numbers(n + 9, seed)
    return wholes, [whole[start : start + n] for whole, start in zip(wholes, starts, strict=True)]


def check(wholes: list[Array], starts: tuple[int, ...], n: int, expected: list[Array]) -> None:
    """The slices are as expected, and around them nothing was written."""
    for seed, (whole, start, values) in enumerate(zip(wholes, starts, expected, strict=True)):
        before = numbers(n + 9, seed)
        np.testing.assert_allclose(whole[start : start + n], values, rtol=1e-6, atol=1e-6)
        assert np.array_equal(whole[:start], before[:start])
        assert np.array_equal(whole[start + n :], before[start + n :])


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum(flat: Flat, starts: tuple[int, ...], nesterov: bool):
    for n in LENGTHS:
        wholes, (p, g, m) = slices(starts, n)
        old, step, velocity = (array.astype(np.float64) for array in (p, g, m))
        step = 0.7 * step + 0.01 * old
        velocity = 0.9 * velocity + step
        flat.call("descend", n, p, g, m, 0.1, 0.7, 0.01, 0.9, nesterov)
        new = old - 0.1 * (step + 0.9 * velocity if nesterov else velocity)
        check(wholes, starts, n, [new, numbers(n + 9, 1)[starts[1] : starts[1] + n], velocity])


@pytest.mark.parametrize("starts", STARTS)
def test_plain_descent_adagrad_and_statistics(flat: Flat, starts: tuple[int, ...]):
    for n in LENGTHS:
        wholes, (p, g, s) = slices(starts, n)
        np.abs(wholes[2], out=wholes[2])
        old, slope, squares = (array.astype(np.float64) for array in (p, g, s))
        flat.call("descend", n, p, g, None, 0.1, 1.0, 0.0, 0.9, False)
        np.testing.assert_allclose(p, old - 0.1 * slope, rtol=1e-6, atol=1e-6)
        old = p.astype(np.float64)
        flat.call("adagrad", n, p, g, s, 0.1, 0.5, 0.01, 1e-10)
        step = 0.5 * slope + 0.01 * old
        squares += step * step
        np.testing.assert_allclose(s, squares, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(p, old - 0.1 * step / (np.sqrt(squares) + 1e-10), rtol=1e-5, atol=1e-6)
        old = p.astype(np.float64)
        flat.call("blend", n, p, g, 0.1)
        np.testing.assert_allclose(p, 0.9 * old + 0.1 * slope, rtol=1e-6, atol=1e-6)
        assert np.array_equal(g, numbers(n + 9, 1)[starts[1] : starts[1] + n])


@pytest.mark.parametrize("k", [1, 2, 8, 9, 17])
@pytest.mark.parametrize("alike", [False, True])
def test_add_sums_in_order(flat: Flat, k: int, alike: bool):
    for n in (3, 1003):
        starts = tuple(1 if alike else i % 4 for i in range(k))
        wholes, arrays = slices(starts, n)
        expected = arrays[0].copy()
        for array in arrays[1:]:
            expected += array
        flat.call("add", n, k, arrays, arrays[0])
        assert arrays[0].tobytes() == expected.tobytes()
        check(wholes[:1], starts[:1], n, [expected])
        for seed in range(1, k):
            assert wholes[seed].tobytes() == numbers(n + 9, seed).tobytes()


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_squares_of_several_runs_are_summed_in_float64(flat: Flat, start: int):
    whole = Shim().empty(4 * 9000).view(np.float32)
    whole[:] = numbers(9000) * np.float32(1e25)  # whose squares are beyond float32
    runs = [whole[start : start + n] for n in (1, 0, 2, 4099, 5)]
    expected = math.fsum(float(x) ** 2 for run in runs for x in run)
    assert flat.sum_of_squares(runs) == pytest.approx(expected, rel=1e-13)
    assert flat.sum_of_squares(runs) == flat.sum_of_squares(runs)
    assert flat.sum_of_squares([]) == 0.0
    whole[start] = np.inf
    assert flat.sum_of_squares(runs) == np.inf


def test_more_numbers_than_the_blocks_take_at_once(flat: Flat):
    n = 1024 * 1024 + 4099
    x = np.ones(n + 1, np.float32)[1:]
    assert flat.sum_of_squares([x]) == n


EVERY_EXPONENT = np.concatenate(
    [(np.arange(1 << 16, dtype=np.uint32) << 16) | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
).view(np.float32)
"""And every sign, infinity and what is no number, with what is rounded down, up, and to the even neighbour."""


def bfloat16_by_both(flat: Flat, starts: tuple[int, ...], x: Array, error: Array) -> list[tuple[Array, Array]]:
    """What was rounded, and what that left out: by the kernels of the CPU, and by those of the device."""
    found = []
    for kernels in (Kernels(1), flat):
        wholes = [Shim().empty(4 * (x.size + 9)) for _ in range(3)]
        given, rest, out = (
            whole.view(dtype)[start : start + x.size]
            for whole, start, dtype in zip(wholes, starts, (np.float32, np.float32, np.uint16), strict=True)
        )
        given[:], rest[:] = x, error
        kernels.call("to_bfloat16", x.size, given, rest, out)
        assert given.tobytes() == x.tobytes()
        assert (wholes[2].view(np.uint16)[: starts[2]] == 0xFFFF).all()
        assert (wholes[2].view(np.uint16)[starts[2] + x.size :] == 0xFFFF).all()
        found.append((out, rest))
    return found


@pytest.mark.parametrize("starts", STARTS)
def test_bfloat16_has_the_bits_of_the_cpu(flat: Flat, starts: tuple[int, ...]):
    for n in LENGTHS:
        (out, rest), (theirs, their_rest) = bfloat16_by_both(flat, starts, numbers(n), numbers(n, 1) * np.float32(0.01))
        assert np.array_equal(out, theirs)
        assert rest.tobytes() == their_rest.tobytes()


def test_bfloat16_has_the_bits_of_the_cpu_for_every_exponent(flat: Flat):
    zeros = np.zeros_like(EVERY_EXPONENT)
    for x, error in ((EVERY_EXPONENT, zeros), (EVERY_EXPONENT[::97].copy(), EVERY_EXPONENT[::-97].copy())):
        (out, rest), (theirs, their_rest) = bfloat16_by_both(flat, (0, 0, 0), x, error)
        assert np.array_equal(out, theirs)
        assert rest.tobytes() == their_rest.tobytes()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize(("gap", "start"), [(0, 0), (1, 0), (1, 2), (4, 3)])
def test_sums_of_bfloat16_have_the_bits_of_the_cpu(flat: Flat, k: int, gap: int, start: int):
    for n in (4, 7, 1004):
        stride = n + gap
        halves = (EVERY_EXPONENT[: k * stride * 13 : 13].view(np.uint32) >> 16).astype(np.uint16)
        halves[::3] = numbers(halves[::3].size).view(np.uint32) >> 16
        found = []
        for kernels in (Kernels(1), flat):
            sums = np.full(n + 9, 7, np.float32)
            kernels.call("add_bfloat16", n, k, stride, halves, sums[start : start + n])
            assert (sums[:start] == 7).all()
            assert (sums[start + n :] == 7).all()
            found.append(sums)
        assert found[0].tobytes() == found[1].tobytes()
