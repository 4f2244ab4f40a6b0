"""What bounds kernels of a GPU, measured on it, and a clock for what it does."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Call = Callable[[], object]

_SWEEP = 1 << 29
"""Bytes that are read before each call that is timed. No cache keeps anything over that, and meanwhile the host asks
for the call's kernels: it takes longer to ask for one than a short one takes."""
_MULTIPLY_ADDS = r"""
extern "C" __global__ void __launch_bounds__(256) multiply_adds(float a, float b, float* out) {
    float x[16];
    for (int i = 0; i < 16; ++i) x[i] = threadIdx.x + i;
    for (int round = 0; round < 4096; ++round) {
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = x[i] * a + b;
    }
    float sum = 0.f;
    for (int i = 0; i < 16; ++i) sum += x[i];
    if (sum == 0.125f) *out = sum;  // the compiler may not leave out what is never written
}
"""
"""4096 rounds of 16 multiply-adds that don't wait for one another, a thread."""


class Clock(Protocol):
    """How long a device takes."""

    def seconds(self, call: Call, repeat: int) -> float:
        """For what a call asks for, with cold caches: the median of `repeat` times."""
        ...


@dataclass(frozen=True)
class Limits:
    """Bytes and float32 operations a second."""

    copy: float
    float32: float


class GpuClock:
    """Times by events in the queue of a `Gpu`."""

    def __init__(self, gpu: Any) -> None:
        import cupy

        self._cuda, self._stream = cupy.cuda, gpu._queue
        squares = gpu.kernel("optim.cu", "squares")
        n, blocks = _SWEEP // 4, 1024
        swept, partials = gpu.empty(_SWEEP), gpu.empty(8 * blocks)
        gpu.zero(swept)
        gpu.zero(partials)
        self._sweep = lambda: squares((blocks,), (256,), np.int64(n), swept, partials)

    def seconds(self, call: Call, repeat: int) -> float:
        call()
        turns = []
        for _ in range(repeat):
            begin, end = self._cuda.Event(), self._cuda.Event()
            self._sweep()
            begin.record(self._stream)
            call()
            end.record(self._stream)
            turns.append((begin, end))
        self._stream.synchronize()
        return statistics.median(self._cuda.get_elapsed_time(begin, end) / 1e3 for begin, end in turns)


def measure(gpu: Any, clock: Clock, repeat: int) -> Limits:
    """A copy within the device's memory, which reads and writes each byte; multiply-adds, two operations each."""
    import cupy

    nbytes, stream = 1 << 30, gpu._queue
    a, b = gpu.empty(nbytes), gpu.empty(nbytes)
    copy, way = cupy.cuda.runtime.memcpyAsync, cupy.cuda.runtime.memcpyDeviceToDevice
    copy_s = clock.seconds(lambda: copy(b.data.ptr, a.data.ptr, nbytes, way, stream.ptr), repeat)
    kernel, blocks = cupy.RawModule(code=_MULTIPLY_ADDS).get_function("multiply_adds"), 32 * gpu.processors
    arguments = (np.float32(0.5), np.float32(0.25), a)
    multiply_s = clock.seconds(lambda: kernel((blocks,), (256,), arguments, stream=stream), repeat)
    return Limits(2 * nbytes / copy_s, 2 * 16 * 4096 * 256 * blocks / multiply_s)
