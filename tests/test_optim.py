"""Updates equal PyTorch's and the formulas, wherever the walk is cut; learning rates are known at known steps."""

import math
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpnn import config, optim
from dpnn.backends.cuda import Cuda
from dpnn.native import Kernels, address
from dpnn.optim import STATES, Arithmetic, Optimizer, Segment, cut, merge, schedule
from dpnn.team import Team

from .backends.cuda.shim import Shim

Array = NDArray[Any]

N = 300_000
SEGMENTS = (
    Segment(0, 70_001, True, 0.0),
    Segment(70_001, 70_101, False, 0.0),
    Segment(70_101, 200_000, True, 0.0),
    Segment(200_000, 299_000, False, 0.0),
    Segment(299_000, 299_700, False, 0.1),
    Segment(299_700, N, False, 0.25),
)
TRAINED = 299_000
KINDS = {
    "sgd": config.Optimizer(name="sgd", lr=0.1),
    "decay": config.Optimizer(name="sgd", lr=0.1, weight_decay=0.01),
    "momentum": config.Optimizer(name="momentum", lr=0.1, weight_decay=0.01),
    "nesterov": config.Optimizer(name="momentum", lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "adagrad": config.Optimizer(name="adagrad", lr=0.1, weight_decay=0.01),
}
LIMITS = {"SSE41": "baseline", "AVX2": "avx2", "": "avx512"}
"""By the limit for oneDNN: the kernels that it leaves."""
COMPILED = [*LIMITS, "device"]


@pytest.fixture
def kernels(request, monkeypatch) -> Arithmetic | None:
    """The variant that a limit leaves; those of a device, and None for "numpy"."""
    if request.param == "numpy":
        return None
    if request.param == "device":
        return Cuda(Shim()).arithmetic
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", request.param)
    found = Kernels(2)
    if found.level != LIMITS[request.param]:
        pytest.skip(f"this processor has nothing above {found.level}")
    return found


def numbers(seed: int, dtype: str = "float32", n: int = N) -> Array:
    return np.random.default_rng(seed).standard_normal(n).astype(dtype)


def expected(options: config.Optimizer, p: Array, kept: Array, g: Array, rate: float, scale: float) -> list[Array]:
    """One step by the formulas, in float64: parameters, and what is kept (momentum or squares)."""
    decay, statistic = np.zeros(N), np.zeros(N)
    for segment in SEGMENTS:
        decay[segment.lo : segment.hi] = options.weight_decay * segment.decay
        statistic[segment.lo : segment.hi] = segment.statistic
    v = scale * g + decay * p
    if options.name == "momentum":
        kept = np.where(statistic > 0, 0, options.momentum * kept + v)
        v = v + options.momentum * kept if options.nesterov else kept
    if options.name == "adagrad":
        kept = np.where(statistic > 0, 0, kept + v * v)
        v = v / (np.sqrt(kept) + 1e-10)
    return [np.where(statistic > 0, (1 - statistic) * p + statistic * g, p - rate * v), kept]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_three_steps_follow_the_formulas(kind: str, scale: float):
    options = KINDS[kind]
    params = numbers(0, "float64")
    grads = np.empty_like(params)
    optimizer = Optimizer(options, SEGMENTS, params, grads, Team(2))
    p, kept = params.copy(), np.zeros(N)
    for step in range(3):
        grads[:] = numbers(step + 1, "float64")
        optimizer.apply(0, N, 0.1 / (step + 1), scale)
        p, kept = expected(options, p, kept, grads, 0.1 / (step + 1), scale)
    np.testing.assert_allclose(params, p, rtol=1e-12, atol=1e-14)
    assert tuple(optimizer.state) == STATES[options.name]
    for state in optimizer.state.values():
        np.testing.assert_allclose(state, kept, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_kernels_follow_the_formulas_to_rounding(kernels: Arithmetic, kind: str, scale: float):
    params, grads = numbers(0), numbers(1)
    optimizer = Optimizer(KINDS[kind], SEGMENTS, params, grads, Team(2), kernels)
    p, kept = params.astype(np.float64), np.zeros(N)
    for step in range(3):
        grads[:] = numbers(step + 1)
        optimizer.apply(0, N, 0.1 / (step + 1), scale)
        p, kept = expected(KINDS[kind], p, kept, grads.astype(np.float64), 0.1 / (step + 1), scale)
    np.testing.assert_allclose(params, p, rtol=1e-6, atol=1e-6)
    for state in optimizer.state.values():
        np.testing.assert_allclose(state, kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_equal_those_of_pytorch(kind: str):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: updates are held to the formulas only")
    options = KINDS[kind]
    params, grads = numbers(0, "float64"), np.empty(N)
    optimizer = Optimizer(options, [Segment(0, N, True, 0.0)], params, grads, Team(2))
    theirs = torch.nn.Parameter(torch.from_numpy(params.copy()))
    how: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.name == "momentum":
        how |= {"momentum": options.momentum, "nesterov": options.nesterov}
    peer = (torch.optim.Adagrad if options.name == "adagrad" else torch.optim.SGD)([theirs], **how)
    for step in range(4):
        grads[:] = numbers(step + 1, "float64")
        theirs.grad = torch.from_numpy(grads.copy())
        peer.step()
        optimizer.apply(0, N, options.lr)
    np.testing.assert_allclose(params, theirs.detach().numpy(), rtol=1e-12, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=12), kind=st.sampled_from(sorted(KINDS)), reverse=st.booleans())
def test_any_split_gives_the_same_bits(cuts: list[int], kind: str, reverse: bool):
    def steps(bounds: list[tuple[int, int]]) -> tuple[bytes, list[bytes]]:
        params, grads = numbers(0), numbers(1)
        optimizer = Optimizer(KINDS[kind], SEGMENTS, params, grads, Team(2))
        for rate in (0.1, 0.07):
            for lo, hi in bounds:
                optimizer.apply(lo, hi, rate, 0.7)
        return params.tobytes(), [state.tobytes() for state in optimizer.state.values()]

    bounds = list(pairwise([0, *sorted(cuts), N]))
    assert steps(bounds[::-1] if reverse else bounds) == steps([(0, N)])


@pytest.mark.parametrize("kernels", LIMITS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_stores_past_the_caches_give_the_same_bits_wherever_the_numbers_lie(kernels: Kernels, kind: str):
    def steps(streams: bool, shift: int) -> list[bytes]:
        start = (-address(params) // 4 + shift) % 16
        mine = params[start : start + N]
        mine[:] = numbers(0)
        optimizer = Optimizer(KINDS[kind], SEGMENTS, mine, numbers(1), Team(2), kernels)
        for lo, hi in ((0, 5), (5, 5), (5, N)):
            optimizer.apply(lo, hi, 0.1, 0.7, streams)
        assert not params[:start].any()
        assert not params[start + N :].any()
        return [mine.tobytes(), *(state.tobytes() for state in optimizer.state.values())]

    params = np.zeros(N + 16, np.float32)
    for shift in (0, 1, 4, 15):
        params[:] = 0
        expected = steps(False, shift)
        params[:] = 0
        assert steps(True, shift) == expected


@pytest.mark.parametrize("kernels", [*COMPILED, "numpy"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_servers_that_hold_slices_get_the_bits_of_the_whole(kernels: Arithmetic | None, kind: str):
    bounds = [0, 1, 33_333, 70_050, 70_050, 70_101, 250_000, 299_300, 299_701, N]
    dtype = "float32" if kernels else "float64"

    def steps(lo: int, hi: int, segments: Iterable[Segment]) -> list[Array]:
        params, grads = numbers(0, dtype)[lo:hi].copy(), np.empty(hi - lo, dtype)
        optimizer = Optimizer(KINDS[kind], segments, params, grads, Team(2), kernels)
        for step in range(2):
            grads[:] = numbers(step + 1, dtype)[lo:hi]
            optimizer.apply(0, hi - lo, 0.1 / (step + 1), 0.7)
        return [params, *optimizer.state.values()]

    slices = [steps(lo, hi, cut(SEGMENTS, lo, hi)) for lo, hi in pairwise(bounds)]
    for whole, *parts in zip(steps(0, N, SEGMENTS), *slices, strict=True):
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_a_cut_counts_from_its_own_start():
    assert cut(SEGMENTS, 70_100, 299_100) == (
        Segment(0, 1, False, 0.0),
        Segment(1, 129_900, True, 0.0),
        Segment(129_900, 228_900, False, 0.0),
        Segment(228_900, 229_000, False, 0.1),
    )
    assert cut(SEGMENTS, 0, N) == SEGMENTS
    assert cut(SEGMENTS, 70_001, 70_101) == (Segment(0, 100, False, 0.0),)
    assert cut(SEGMENTS, 100, 100) == cut(SEGMENTS, N, N) == cut([], 0, 0) == ()


@pytest.mark.parametrize("kernels", [*COMPILED, "numpy"], indirect=True)
def test_adagrad_leaves_a_number_without_gradients_where_it_is(kernels: Arithmetic | None):
    params, grads = numbers(0), numbers(1)
    grads[::3] = 0
    options = config.Optimizer(name="adagrad", lr=0.1)
    optimizer = Optimizer(options, [Segment(0, N, True, 0.0)], params, grads, Team(2), kernels)
    optimizer.apply(0, N, 0.1)
    np.testing.assert_array_equal(params[::3], numbers(0)[::3])
    np.testing.assert_allclose(abs(params - numbers(0))[1::3], 0.1, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nesterov", "adagrad"])
def test_gradients_are_left_as_they_are(kind: str):
    grads = numbers(1)
    optimizer = Optimizer(KINDS[kind], SEGMENTS, numbers(0), grads, Team(2))
    optimizer.apply(0, N, 0.1, 0.5)
    optimizer.sum_of_squares(0, N)
    assert np.array_equal(grads, numbers(1))


def test_nothing_outside_the_slice_is_touched():
    params = numbers(0)
    optimizer = Optimizer(KINDS["momentum"], SEGMENTS, params, numbers(1), Team(2))
    optimizer.apply(70_050, 299_500, 0.1)
    untouched = np.r_[0:70_050, 299_500:N]
    assert np.array_equal(params[untouched], numbers(0)[untouched])
    assert not optimizer.state["momentum"][untouched].any()
    assert (params[70_050:299_500] != numbers(0)[70_050:299_500]).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_allocates_no_arrays(kind: str):
    optimizer = Optimizer(KINDS[kind], SEGMENTS, numbers(0), numbers(1), Team(2))
    optimizer.apply(0, N, 0.1, 0.5)
    tracemalloc.start()
    try:
        optimizer.apply(0, N, 0.1, 0.5)
        optimizer.sum_of_squares(0, N)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8192, "bytes; a block of scratch would be 131,072"


@pytest.mark.parametrize("kernels", [*COMPILED, "numpy"], indirect=True)
def test_the_norm_is_of_the_trained_gradients_in_float64(kernels: Arithmetic | None):
    grads = np.full(N, 1e25, np.float32)  # its square is no float32
    optimizer = Optimizer(KINDS["sgd"], SEGMENTS, numbers(0), grads, Team(2), kernels)
    assert optimizer.sum_of_squares(0, N) == pytest.approx(TRAINED * float(grads[0]) ** 2, rel=1e-12)
    assert optimizer.sum_of_squares(TRAINED - 10, N) == pytest.approx(10 * float(grads[0]) ** 2, rel=1e-12)
    assert optimizer.sum_of_squares(5, 5) == 0.0


def test_clipping_scales_the_norm_to_the_limit_and_never_up():
    def scale(clip: float, squares: float) -> float:
        options = config.Optimizer(lr=0.1, clip=clip)
        return Optimizer(options, [Segment(0, 1, False, 0.0)], np.zeros(1), np.zeros(1), Team(2)).clip_scale(squares)

    assert scale(2.0, 16.0) == 0.5
    assert scale(2.0, 4.0) == scale(2.0, 1.0) == scale(2.0, 0.0) == 1.0
    assert scale(0.0, 1e12) == 1.0, "0: any norm"


def test_neighbours_of_one_kind_are_merged():
    a, b, c = Segment(0, 5, True, 0.0), Segment(5, 9, True, 0.0), Segment(9, 12, False, 0.0)
    empty, mean, variance = Segment(12, 12, True, 0.0), Segment(12, 15, False, 0.1), Segment(15, 18, False, 0.2)
    assert merge([a, b, c, empty, mean, variance]) == (Segment(0, 9, True, 0.0), c, mean, variance)
    assert merge([c, Segment(12, 20, False, 0.0)]) == (Segment(9, 20, False, 0.0),)
    assert merge([]) == ()


@pytest.mark.parametrize("segments", [[Segment(0, 5, True, 0.0)], [Segment(1, 10, True, 0.0)], []])
def test_segments_that_do_not_cover_the_arrays_are_refused(segments: list[Segment]):
    with pytest.raises(ValueError, match="don't fit"):
        Optimizer(KINDS["sgd"], segments, np.zeros(10), np.zeros(10), Team(2))


def test_segments_with_a_gap_are_refused():
    with pytest.raises(ValueError, match="starts at 6"):
        merge([Segment(0, 5, True, 0.0), Segment(6, 10, True, 0.0)])


def test_a_network_without_parameters_has_nothing_to_update():
    optimizer = Optimizer(KINDS["momentum"], [], np.zeros(0), np.zeros(0), Team(2))
    optimizer.apply(0, 0, 0.1)
    assert optimizer.sum_of_squares(0, 0) == 0.0


SCHEDULES = {
    "constant": config.Schedule(name="constant"),
    "step": config.Schedule(name="step", milestones=(3.0, 5.5)),
    "cosine": config.Schedule(name="cosine"),
    "poly": config.Schedule(name="poly", power=2.0),
}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("constant", {0: 0.4, 50: 0.4, 99: 0.4}),
        ("step", {0: 0.4, 29: 0.4, 30: 0.04, 54: 0.04, 55: 0.004, 99: 0.004}),
        ("cosine", {0: 0.4, 25: 0.2 * (1 + math.sqrt(0.5)), 50: 0.2, 75: 0.2 * (1 - math.sqrt(0.5)), 100: 0.0}),
        ("poly", {0: 0.4, 50: 0.1, 90: 0.004, 100: 0.0, 110: 0.0}),
    ],
)
def test_rates_at_known_steps_of_ten_epochs_of_ten(name: str, known: dict[int, float]):
    rate = schedule(SCHEDULES[name], 0.4, 10, 100)
    assert {step: rate(step) for step in known} == pytest.approx(known, abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [2.0, 0.55])
def test_the_warm_up_rises_in_a_line_and_meets_the_schedule(name: str, warmup: float):
    options = config.Schedule(
        name=SCHEDULES[name].name, warmup_epochs=warmup, milestones=SCHEDULES[name].milestones, factor=0.1
    )
    rate = schedule(options, 0.4, 10, 100)
    warm = warmup * 10
    rising = [rate(step) for step in range(int(warm))]
    assert rising == pytest.approx([0.4 * (step + 1) / warm for step in range(int(warm))])
    largest_change = max(abs(rate(step + 1) - rate(step)) for step in range(29))
    assert largest_change <= 0.4 / warm * 1.001, "before the first milestone there is no jump"
    assert max(map(rate, range(100))) <= 0.4


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_longer_than_the_run_stays_in_the_line(name: str):
    options = config.Schedule(name=SCHEDULES[name].name, warmup_epochs=20.0, milestones=(50.0,))
    rate = schedule(options, 0.4, 10, 100)
    assert [rate(step) for step in (0, 99)] == pytest.approx([0.4 / 200, 0.4 / 2])


def test_blocks_are_shorter_than_the_test_arrays():
    assert 2 * optim._BLOCK < TRAINED, "else the tests above see one block only"
