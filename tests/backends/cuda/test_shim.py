"""The stand-in for a GPU finds what is wrong in kernels."""

import re
from collections.abc import Callable
from importlib.resources import files

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.base import Array
from dpnn.backends.cuda import Cuda
from dpnn.backends.cuda.source import source

from .shim import Shim

KERNELS = """
// y[b, t] = x[b, THREADS - 1 - t]
KERNEL(64) turn(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x];
}

// The same with tiles of two blocks on their way at once.
KERNEL(64) turn_async(const float* x, float* y, int blocks) {
    __shared__ float tiles[2][64];
    dpnn::copy_async<4>(&tiles[0][threadIdx.x], x + threadIdx.x, true);
    dpnn::close_copies();
    for (int b = 0; b < blocks; ++b) {
        if (b + 1 < blocks) dpnn::copy_async<4>(&tiles[(b + 1) % 2][threadIdx.x], x + (b + 1) * 64 + threadIdx.x, true);
        dpnn::close_copies();
        dpnn::copies_arrived<1>();
        __syncthreads();
        y[b * 64 + threadIdx.x] = tiles[b % 2][63 - threadIdx.x];
        __syncthreads();  // the tile is read
    }
}

// y[b] = sum of x[b] / mean of x[b]
KERNEL(128) sums(const float* x, double* y) {
    DYNAMIC_SHARED(double, total);
    const double value = x[blockIdx.x * 128 + threadIdx.x];
    const double mean = dpnn::block_sum<128>(value) / 128;
    const double sum = dpnn::block_sum<128>(value / mean);
    if (threadIdx.x == 0) total[0] = sum;
    __syncwarp();
    if (threadIdx.x == 1) y[blockIdx.x] = total[0];
}

// Lanes by number, each warp: y = (rotated, from above, from below, xor 5, votes of odd lanes)
KERNEL(64) shuffles(const double* x, double* y) {
    const double value = x[threadIdx.x];
    const int lane = threadIdx.x % 32;
    y[threadIdx.x] = __shfl_sync(~0u, value, lane + 3);
    y[64 + threadIdx.x] = __shfl_down_sync(~0u, value, 2);
    y[128 + threadIdx.x] = __shfl_up_sync(~0u, value, 2);
    y[192 + threadIdx.x] = __shfl_xor_sync(~0u, value, 5);
    y[256 + threadIdx.x] = __ballot_sync(~0u, lane % 2);
}

KERNEL(256) types(float* y, char c, unsigned short s, int i, unsigned u, long long l, float f, double d, bool b) {
    y[0] = c + s + i + u + l + f + d + b;
}

KERNEL(32) where(int* y) {
    y[((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * 24 +
      (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x] = 1;
}
"""
FLOATS = np.random.default_rng(3).uniform(1, 2, (3, 128)).astype(np.float32)


class Edited(Shim):
    """A stand-in that compiles another text."""

    def __init__(self, text: str, **how: object) -> None:
        super().__init__(**how)
        self._text = source("device.cuh") + text

    def text(self, file: str) -> str:
        return self._text


def without(text: str, line: str, which: int = 0) -> str:
    """A text without one of the places where `line` stands."""
    begin = [found.start() for found in re.finditer(re.escape(line), text)][which]
    return text[:begin] + text[begin + len(line) :]


def turn(device: Shim) -> Array:
    y = np.full(384, np.nan, np.float32)
    device.kernel("it", "turn")((6,), (64,), FLOATS, y)
    return y


def turn_async(device: Shim) -> Array:
    y = np.full(384, np.nan, np.float32)
    device.kernel("it", "turn_async")((1,), (64,), FLOATS, y, 6)
    return y


def sums(device: Shim) -> Array:
    y = np.full(3, np.nan)
    device.kernel("it", "sums")((3,), (128,), FLOATS, y, shared=8)
    return y


FORWARD, BACKWARD, SHUFFLED, WATCHED = {}, {"reverse": True}, {"seed": 3}, {"watch": True}


def wrong(run: Callable[[Shim], Array], text: str, way: dict[str, object]) -> bool:
    """Whether a run of an edited text shows that something is wrong."""
    good = run(Edited(KERNELS))
    try:
        return not np.array_equal(run(Edited(text, **way)), good)
    except AssertionError:
        return True


@pytest.mark.parametrize("way", [FORWARD, BACKWARD, SHUFFLED, WATCHED])
def test_right_kernels_pass_in_every_order(way):
    device = Edited(KERNELS, **way)
    turned = FLOATS.reshape(6, 64)[:, ::-1].ravel()
    assert np.array_equal(turn(device), turned)
    assert np.array_equal(turn_async(device), turned)
    assert np.allclose(sums(device), FLOATS.sum(1, np.float64) / FLOATS.mean(1, np.float64), rtol=1e-14)

    x, y = np.arange(64.0), np.full((5, 64), np.nan)
    device.kernel("it", "shuffles")((1,), (64,), x, y)
    lanes = np.arange(32)
    expected = [
        (lanes + 3) % 32,
        np.where(lanes < 30, lanes + 2, lanes),
        np.where(lanes >= 2, lanes - 2, lanes),
        lanes ^ 5,
    ]
    for got, lane in zip(y, expected, strict=False):
        assert np.array_equal(got, np.concatenate([x[:32][lane], x[32:][lane]]))
    assert (y[4] == 0xAAAAAAAA).all()


@pytest.mark.parametrize("n", [1, 255, 256, 1000])
def test_a_kernel_of_our_own_passes_in_every_way(shim, n):
    x, y = (shim.empty(4 * n).view(np.float32) for _ in range(2))
    x[...] = np.random.default_rng(n).standard_normal(n)
    shim.kernel("pointwise.cu", "relu")((2,), (256,), x, y, np.int64(n))
    assert np.array_equal(y, np.maximum(x, 0))


def test_every_thread_of_every_block_runs():
    y = np.zeros(2 * 3 * 4 * 24, np.int32)
    Edited(KERNELS).kernel("it", "where")((2, 3, 4), (2, 3, 4), y)
    assert y.all()


def test_arguments_are_passed_as_what_they_are():
    y = np.zeros(1, np.float32)
    kernel = Edited(KERNELS).kernel("it", "types")
    numbers = (
        np.int8(-1),
        np.uint16(65535),
        -7,
        np.uint32(3),
        np.int64(-(2**40)),
        0.5,
        np.float64(2**-3),
        np.bool_(True),
    )
    kernel((1,), (1,), y, *numbers)
    assert y[0] == np.float32(sum(float(number) for number in numbers))
    for i, number in enumerate(numbers):
        other = 1.5 if isinstance(number, int | np.integer | np.bool_) else 1
        with pytest.raises(AssertionError, match=f"argument {i + 1} is "):
            kernel((1,), (1,), y, *numbers[:i], other, *numbers[i + 1 :])
    with pytest.raises(AssertionError, match="argument 0 is P64, not i64"):
        kernel((1,), (1,), np.int64(5), *numbers)
    with pytest.raises(AssertionError, match="it takes 9 arguments, not 8"):
        kernel((1,), (1,), y, *numbers[:-1])


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((0,), (32,), 0, "no such grid: 0 x 1 x 1"),
        ((1, 65536), (32,), 0, "no such grid: 1 x 65536 x 1"),
        ((1,), (0,), 0, "no such block: 0 x 1 x 1"),
        ((1,), (1, 1, 65), 0, "no such block: 1 x 1 x 65"),
        ((1,), (2048,), 0, "no such block: 2048 x 1 x 1"),
        ((1,), (33,), 0, "33 threads, but launch bounds of 32"),
        ((1,), (32,), 227 * 1024 + 1, "232449 bytes of shared memory; there are 232448"),
    ],
)
def test_what_a_gpu_would_refuse_is_refused(grid, block, shared, message):
    with pytest.raises(AssertionError, match=message):
        Edited(KERNELS).kernel("it", "where")(grid, block, np.zeros(1000, np.int32), shared=shared)


@pytest.mark.parametrize(
    ("run", "line", "which"),
    [
        (turn, "__syncthreads();", 0),
        (turn_async, "__syncthreads();", 1),
        (turn_async, "__syncthreads();  // the tile is read", 0),
        (turn_async, "dpnn::copies_arrived<1>();", 0),
        (turn_async, "dpnn::close_copies();", 1),
        (sums, "__syncwarp();", 0),
    ],
)
def test_a_missing_barrier_is_found(run, line, which):
    text = without(KERNELS, line, which)
    assert wrong(run, text, FORWARD) or wrong(run, text, BACKWARD)
    assert wrong(run, text, WATCHED)


def run_one(body: str, way: dict[str, object], blocks: int = 1) -> Array:
    """What blocks of 64 threads make of 64 ones."""
    device = Edited(f"KERNEL(64) it(float* y, int n) {{\n{body}\n}}", **way)
    y = device.empty(256).view(np.float32)
    y[...] = 1
    device.kernel("it", "it")((blocks,), (64,), y, 64)
    device.check()
    return y


LINE = source("device.cuh").count("\n") + 2  # of the first line of a body


@pytest.mark.parametrize("way", [FORWARD, WATCHED])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "if (threadIdx.x < 16) { __syncthreads(); y[0] = 1; }\nelse __syncthreads();",
            rf"a divergent barrier: thread \d+ is at line {LINE} .* thread \d+ at line {LINE + 1} ",
        ),
        (
            "if (threadIdx.x < 16) __syncwarp();\nelse y[0] = __shfl_xor_sync(~0u, y[0], 1);",
            rf"a divergent barrier: .* line {LINE} .* line {LINE + 1} ",
        ),
        (
            "if (threadIdx.x < 16) __syncthreads();\nelse __syncwarp();",
            rf"a deadlock: thread 31 waits for its warp at line {LINE + 1} .* thread \d+ for its block at line {LINE} ",
        ),
        ("y[0] = __shfl_xor_sync(0xffffu, y[0], 1);", f"line {LINE} .*: a mask that leaves out lanes"),
        ("__syncwarp(1);", f"line {LINE} .*: a mask that leaves out lanes"),
        (
            "if (threadIdx.x == 7) return;\ny[0] = __shfl_sync(~0u, y[0], 7);",
            f"line {LINE + 1} .* lane 7, which isn't there",
        ),
        ("__shared__ float t[64]; dpnn::copy_async<16>(t + threadIdx.x, y, true);", "copies what isn't aligned"),
        ("dpnn::copy_async<4>(y, y, true);", "copies to what isn't shared memory"),
        (
            "float t[1 << 14]; for (int i = 0; i < n << 8; ++i) t[i] = i;\ny[threadIdx.x] = t[n];",
            "ran out of its stack",
        ),
    ],
)
def test_a_wrong_body_is_named(body, message, way):
    with pytest.raises(AssertionError, match=message):
        run_one(body, way)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y[threadIdx.x + 1] = 1;", rf"thread 63: line {LINE} .* writes 4 bytes outside of all arrays"),
        ("y[threadIdx.x] = y[threadIdx.x - 1];", rf"thread 0: line {LINE} .* reads 4 bytes outside of all arrays"),
        ("DYNAMIC_SHARED(float, t); t[threadIdx.x] = 0;", "writes 4 bytes outside of all arrays"),
        ("__shared__ float t[8][8]; t[0][threadIdx.x] = 0;", "is undefined: out_of_bounds"),
        ("float t[4] = {y[0]}; y[0] = t[n - 60];", "is undefined: out_of_bounds"),
        ("float4* v = (float4*)(y + 1); v[0].x = 1;", "is undefined: type_mismatch"),
        ("y[0] = 1 << (n + 1);", "is undefined: shift_out_of_bounds"),
        ("y[0] = (n << 25) * 2;", "is undefined: mul_overflow"),
        (
            "y[threadIdx.x / 2] = 1;",
            f"thread 1: a race in global memory: line {LINE} .* writes what thread 0 wrote line",
        ),
        ("if (threadIdx.x == 0) y[blockIdx.x] = y[0];", "thread 0: .* reads what thread 0 of another block wrote"),
        ("y[threadIdx.x] = y[threadIdx.x ^ 1];", "thread 1: a race in global memory: .* reads what thread 0 wrote"),
    ],
)
def test_watched_memory_shows_what_is_wrong(body, message):
    with pytest.raises(AssertionError, match=message):
        run_one(body, WATCHED, blocks=2)


@pytest.mark.parametrize(("index", "where"), [("-1", "before"), ("n", "behind")])
def test_writing_past_an_array_is_found_without_watching_too(index, where):
    with pytest.raises(AssertionError, match=f"something wrote {where} an array of 256 bytes"):
        run_one(f"if (threadIdx.x == 0) y[{index}] = 1;", FORWARD)


def test_copies_are_late_and_in_the_order_of_the_queue():
    device = Shim()
    array, buf, back = device.empty(8), np.arange(8, dtype=np.uint8), device.pinned(8)
    pushed = device.push(buf, array)
    assert (array == 255).all()
    pulled = device.pull(array, back)  # behind the push
    assert (array == buf).all()
    assert (back == 255).all()
    assert not pulled()
    assert pulled()
    assert (back == buf).all()
    buf[...] = 1  # too early for the push, had it not been pulled
    assert pushed()
    assert (device.read(array) == np.arange(8)).all()
    device.push(buf, array)
    device.pull(array[:4], back[:4])
    device.zero(array)  # too early for the pull
    assert (device.read(array) == 0).all()
    assert back.tolist() == [0, 0, 0, 0, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="lie differently"):
        device.push(buf, array[:7])
    with pytest.raises(ValueError, match="gaps in memory"):
        device.zero(array[::2])


def test_integers_are_added_atomically_and_floats_are_not():
    body = "int* count = (int*)y; if (threadIdx.x % 2) atomicAdd(count, 1);"
    for way in (FORWARD, WATCHED):
        assert run_one(body, way, blocks=2).view(np.int32)[0] == np.ones(1, np.float32).view(np.int32)[0] + 64
    with pytest.raises(AssertionError, match=r"use of deleted function .*float atomicAdd"):
        run_one("atomicAdd(y, 1.f);", FORWARD)


def test_after_an_error_the_next_launch_runs():
    device = Edited("KERNEL(64) it(float* y, int n) { if (n) __syncwarp(1); y[threadIdx.x] = 2; }")
    y, kernel = np.zeros(64, np.float32), device.kernel("it", "it")
    for _ in range(2):
        with pytest.raises(AssertionError, match="a mask"):
            kernel((1,), (64,), y, 1)
        kernel((1,), (64,), y, 0)
        assert (y == 2).all()
        y[...] = 0


# ---- our own kernels: a small run for each file that has barriers


def run_layer(device: Shim, layer: nn.Layer, *shapes: nn.Shape, bench: type) -> list[Array]:
    """All that a layer computes in training, on a few images."""
    it = bench(Cuda(device), layer, *shapes, capacity=5)
    inputs, dys = it.samples(5)
    y = it.put(inputs, dys).forward().copy()
    dxs = [dx for dx in it.backward() if dx is not None]
    return [y, *dxs, *it.d_params.values()]


LAYERS: dict[str, tuple[nn.Layer, *tuple[nn.Shape, ...]]] = {
    "conv.cu": (nn.Conv(8, 3, padding=1), (5, 7, 6)),
    "conv_bias.cu": (nn.Conv(8, 3, padding=1), (5, 7, 6)),
    "conv_narrow.cu": (nn.Conv(48, 3, padding=1), (3, 15, 18)),
    "conv_layout.cu": (nn.Dense(40), (300,)),
    "join.cu": (nn.Flatten(), (40, 5, 7)),
    "loss.cu": (nn.SoftmaxCrossEntropy(), (300,), ()),
    "lrn.cu": (nn.LocalResponseNorm(5, alpha=0.3), (70, 3, 3)),
    "norm.cu": (nn.BatchNorm(), (40, 5, 4)),
    "pool.cu": (nn.GlobalAvgPool(), (40, 9, 9)),
}
"""For each file in kernels/ that has barriers, a layer that runs into them, and the shapes of its inputs."""


class Cut(Shim):
    """A stand-in whose kernels of one file lack a barrier."""

    def __init__(self, file: str, which: int, **how: object) -> None:
        super().__init__(**how)
        self._file, self._which = file, which

    def text(self, file: str) -> str:
        text = super().text(file)
        if file != self._file:
            return text
        own = (files("dpnn.kernels") / file).read_text()
        return without(text, BARRIER, text.count(BARRIER) - own.count(BARRIER) + self._which)


BARRIER = "__syncthreads();"
WITH_BARRIERS = sorted(
    file.name for file in files("dpnn.kernels").iterdir() if file.name.endswith(".cu") and BARRIER in file.read_text()
)


@pytest.mark.parametrize("file", WITH_BARRIERS)
def test_a_barrier_missing_in_our_own_kernels_is_found(file, bench):
    layer, *shapes = LAYERS[file]
    barriers = (files("dpnn.kernels") / file).read_text().count(BARRIER)
    good = run_layer(Shim(watch=True), layer, *shapes, bench=bench)

    def found(which: int) -> bool:
        try:
            cut = run_layer(Cut(file, which, watch=True), layer, *shapes, bench=bench)
        except AssertionError:
            return True
        return not all(map(np.array_equal, cut, good))

    assert any(found(which) for which in range(barriers))
