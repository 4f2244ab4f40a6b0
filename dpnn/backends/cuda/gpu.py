"""A GPU by CuPy: the only module that imports it. CuPy's arrays only name memory; none of its operations is used.

All work of a `Gpu` is one queue: a stream of its own. Copies to the host have another, so that kernels go on meanwhile:
such a copy waits for what was queued before it, and nothing queued later waits for it.
"""

import os
from functools import cache
from typing import Any

import numpy as np

from dpnn.backends.base import Array
from dpnn.backends.cuda import nccl
from dpnn.backends.cuda.device import Device, Grid, Kernel, check_alike, layout, order
from dpnn.backends.cuda.source import OPTIONS, source
from dpnn.memory import Group, Test
from dpnn.native import Unavailable

_NOT_READY = 600  # cudaErrorNotReady
_PORTABLE = 1  # cudaHostRegisterPortable
_SHARED = 48 * 1024
"""Bytes of dynamic shared memory that every kernel may ask for; more has to be allowed first."""


def visible() -> int:
    """How many GPUs this process sees, at least one. Unavailable where CuPy, the driver or a GPU is missing."""
    cupy = _cupy()
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise Unavailable(
            f"CUDA finds no GPU: {error}{_hidden()}; {_extra(cupy)} is installed, which needs a driver of that CUDA"
        ) from error
    if count == 0:
        raise Unavailable(f"CUDA finds no GPU{_hidden()}")
    return count


class Gpu(Device):
    """One GPU; `number` counts those that the process sees. Unavailable as `visible`, or where there is no such GPU."""

    def __init__(self, number: int = 0) -> None:
        count = visible()
        if not 0 <= number < count:
            raise Unavailable(f"there is no GPU {number}: CUDA finds {count}, counted from 0{_hidden()}")
        cupy = _cupy()
        self._cuda = cuda = cupy.cuda
        self._device = cuda.Device(number)
        self._device.use()
        about = cuda.runtime.getDeviceProperties(number)
        self.bus_id: str = cuda.runtime.deviceGetPCIBusId(number)
        self.about = f"{about['name'].decode()} ({self.bus_id})"
        self.processors = int(about["multiProcessorCount"])
        self._queue = cuda.Stream(non_blocking=True)
        self._pulls = cuda.Stream(non_blocking=True)
        self._modules: dict[str, Any] = {}
        self._registered: list[Array] = []
        try:
            self.kernel("pointwise.cu", "relu")
        except RuntimeError as error:
            raise Unavailable(f"{self.about}: CuPy can't compile: {error}; install {_extra(cupy)}") from error

    def empty(self, nbytes: int) -> Array:
        memory = self._current().Memory(nbytes)  # cudaMalloc aligns to 256 bytes at least
        array: Array = _cupy().ndarray((nbytes,), np.uint8, self._cuda.MemoryPointer(memory, 0))
        return array

    def address(self, array: Array) -> int:
        return _address(array)

    def zero(self, array: Array) -> None:
        layout(array)
        if array.nbytes:
            self._current().runtime.memsetAsync(_address(array), 0, array.nbytes, self._queue.ptr)

    def kernel(self, file: str, name: str) -> Kernel:
        self._current()
        if file not in self._modules:
            self._modules[file] = _cupy().RawModule(code=source(file), options=OPTIONS)
        function = self._modules[file].get_function(name)
        allowed = _SHARED

        def launch(grid: Grid, block: Grid, *arguments: object, shared: int = 0) -> None:
            nonlocal allowed
            self._current()
            if shared > allowed:
                function.max_dynamic_shared_size_bytes = allowed = shared
            function(grid, block, tuple(map(_argument, arguments)), shared_mem=shared, stream=self._queue)

        return launch

    def pinned(self, nbytes: int) -> Array:
        if nbytes == 0:
            return np.empty(0, np.uint8)
        cuda = self._current()
        memory = cuda.PinnedMemory(nbytes, cuda.runtime.hostAllocPortable)
        return np.frombuffer(cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)

    def pin(self, array: Array) -> None:
        layout(array)
        if array.nbytes == 0 or any(_inside(array, known) for known in self._registered):
            return
        runtime = self._current().runtime
        try:
            runtime.hostRegister(_address(array), array.nbytes, _PORTABLE)
        except runtime.CUDARuntimeError:  # memory of a device, of a file, or beyond `ulimit -l`: copies are slower
            return
        self._registered.append(array)  # it may not be freed while it is registered

    def pull(self, array: Array, buf: Array) -> Test:
        self._pulls.wait_event(self._mark(self._queue))
        return self._copy(buf, array, self._cuda.runtime.memcpyDeviceToHost, self._pulls)

    def push(self, buf: Array, array: Array) -> Test:
        return self._copy(array, buf, self._cuda.runtime.memcpyHostToDevice, self._queue)

    def read(self, array: Array) -> Any:
        out = _empty_like(array)
        self._copy(out, array, self._cuda.runtime.memcpyDeviceToHost, self._queue)
        self._queue.synchronize()
        self._pulls.synchronize()
        return out

    def mark(self) -> Test:
        return self._test(self._mark(self._queue))

    def ident(self) -> bytes:
        return nccl.ident(self._current())

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        return nccl.Ring(self._current(), self._queue, ident, size, rank)

    def _current(self) -> Any:
        """cupy.cuda, with this GPU as the calling thread's."""
        self._device.use()
        return self._cuda

    def _mark(self, stream: Any) -> Any:
        """An event: all that the stream was asked for up to now is done."""
        event = self._current().Event(disable_timing=True)
        event.record(stream)
        return event

    def _copy(self, target: Array, origin: Array, way: int, stream: Any) -> Test:
        check_alike(target, origin)
        runtime = self._current().runtime
        if target.nbytes:
            runtime.memcpyAsync(_address(target), _address(origin), target.nbytes, way, stream.ptr)
        return self._test(self._mark(stream))

    def _test(self, event: Any) -> Test:
        """Whether an event has come."""
        runtime = self._cuda.runtime

        def done() -> bool:
            status = runtime.eventQuery(event.ptr)
            if status not in (0, _NOT_READY):
                event.synchronize()  # raises what went wrong on the device
            return bool(status == 0)

        return done


@cache
def opened(number: int) -> Gpu:
    """A GPU, opened once by this process."""
    return Gpu(number)


def _argument(value: object) -> object:
    """A kernel's argument, of the type that `Kernel` promises: CuPy would pass an int as `long long`."""
    if isinstance(value, np.generic):
        return value
    if isinstance(value, int):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else value


def _address(array: Array) -> int:
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address


def _empty_like(array: Array) -> Array:
    """An array of NumPy's that lies in memory as one of the device does."""
    dims = order(array)
    return np.empty([array.shape[dim] for dim in dims], array.dtype).transpose(np.argsort(dims))


def _inside(array: Array, known: Array) -> bool:
    begin = _address(array) - _address(known)
    return 0 <= begin <= known.nbytes - array.nbytes


def _hidden() -> str:
    """What hides GPUs from this process, if anything does."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f" (CUDA_VISIBLE_DEVICES={value})"


def _extra(cupy: Any) -> str:
    """What of dpnn goes with the CuPy that is installed."""
    return f"dpnn[cuda{cupy.cuda.runtime.runtimeGetVersion() // 1000}]"


@cache
def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise Unavailable(
            f"CuPy is missing ({error}): install dpnn[cuda13] where `nvidia-smi` names CUDA 13, else dpnn[cuda12]"
        ) from error
    return cupy
