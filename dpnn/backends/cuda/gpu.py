"""A GPU by CuPy, which only this module and nccl.py import. Its arrays only name memory; no operation of it is used.

All work of a `Gpu` is one queue: a stream of its own. Copies to the host have another, so that kernels go on meanwhile:
such a copy waits for what was queued before it, and nothing queued later waits for it.
"""

import ctypes
import gc
import os
import weakref
from contextlib import nullcontext, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dpnn.backends.base import Array
from dpnn.backends.cuda import nccl
from dpnn.backends.cuda.device import Device, Grid, Kernel, check_alike, layout, order
from dpnn.backends.cuda.source import OPTIONS, source
from dpnn.caches import kernels_folder, one_by_one, trouble
from dpnn.errors import JobError, RankError
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


def about_driver() -> str:
    """The GPUs and the driver's CUDA, in words. Unavailable as `visible`."""
    count, cupy = visible(), _cupy()
    runtime = cupy.cuda.runtime
    driver, own = (f"{n // 1000}.{n % 1000 // 10}" for n in (runtime.driverGetVersion(), runtime.runtimeGetVersion()))
    names = dict.fromkeys(runtime.getDeviceProperties(i)["name"].decode() for i in range(count))
    return f"{count} x {', '.join(names)}; driver for CUDA {driver}, CuPy {cupy.__version__} with CUDA {own}"


def cudnn_version() -> str:
    """Of the library that is installed, from NVIDIA's wheel or on the system; empty where there is none."""
    found = find_spec("nvidia.cudnn") if find_spec("nvidia") else None
    wheel = [
        str(path)
        for place in (found.submodule_search_locations if found else None) or ()
        for path in sorted(Path(place, "lib").glob("libcudnn.so.*"))
    ]
    for path in (*wheel, "libcudnn.so.9", "libcudnn.so.8"):
        with suppress(OSError, AttributeError):
            function = ctypes.CDLL(path).cudnnGetVersion
            function.restype = ctypes.c_size_t
            version = int(function())
            scale = 10_000 if version >= 90_000 else 1000
            return f"{version // scale}.{version % scale // 100}.{version % 100}"
    return ""


class Failing:
    """A block in which an error of CUDA's becomes a RankError: what is asked for later may be told of it as well."""

    def __init__(self, about: str) -> None:
        self._about = about

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, RuntimeError):
            raise RankError(f"{self._about} failed: {error}") from error


class Gpu(Device):
    """One GPU; `number` counts those that the process sees. Unavailable as `visible`, or where there is no such GPU."""

    def __init__(self, number: int = 0) -> None:
        count = visible()
        if not 0 <= number < count:
            raise Unavailable(f"there is no GPU {number}: CUDA finds {count}, counted from 0{_hidden()}")
        cupy = _cupy()
        self.unkept = _unkept()
        self._cuda = cuda = cupy.cuda
        about = cuda.runtime.getDeviceProperties(number)
        self.bus_id: str = cuda.runtime.deviceGetPCIBusId(number)
        self.about = f"{about['name'].decode()} ({self.bus_id})"
        self._failing = Failing(self.about)
        self.processors = int(about["multiProcessorCount"])
        self._device = cuda.Device(number)
        with self._failing:
            self._device.use()
            self._queue = cuda.Stream(non_blocking=True)
            self._pulls = cuda.Stream(non_blocking=True)
        self._modules: dict[str, Any] = {}
        self._registered: set[tuple[int, int]] = set()
        """From where to where in the host's memory."""
        try:
            self.kernel("pointwise.cu", "relu")
        except RuntimeError as error:
            raise Unavailable(f"{self.about}: CuPy can't compile: {error}; install {_extra(cupy)}") from error

    def empty(self, nbytes: int) -> Array:
        try:
            memory = self._current().Memory(nbytes)  # cudaMalloc aligns to 256 bytes at least
        except self._cuda.runtime.CUDARuntimeError:
            gc.collect()  # executors, which refer to themselves, keep their arrays until then
            memory = self._last_room(nbytes)
        array: Array = _cupy().ndarray((nbytes,), np.uint8, self._cuda.MemoryPointer(memory, 0))
        return array

    def free(self) -> int:
        with self._failing:
            free, _ = self._current().runtime.memGetInfo()
        return int(free)

    def address(self, array: Array) -> int:
        return _address(array)

    def _last_room(self, nbytes: int) -> Any:
        runtime = self._cuda.runtime
        try:
            return self._cuda.Memory(nbytes)
        except runtime.CUDARuntimeError as error:
            with self._failing:
                wanted, free, total = (f"{n / 2**20:,.0f}" for n in (nbytes, *runtime.memGetInfo()))
            raise JobError(
                f"{self.about} has no room for {wanted} MiB more: {free} of {total} MiB are free ({error}); lower "
                "train.global_batch (or replica_batch), or raise parallel.microbatches or parallel.parts"
            ) from error

    def zero(self, array: Array) -> None:
        layout(array)
        if array.nbytes:
            with self._failing:
                self._current().runtime.memsetAsync(_address(array), 0, array.nbytes, self._queue.ptr)

    def kernel(self, file: str, name: str) -> Kernel:
        self._current()
        if file in self._modules:
            function = self._modules[file].get_function(name)
        else:
            # Compiled here, by the first process of the node that comes; the others find it in the cache.
            with nullcontext() if self.unkept else one_by_one(f"kernels-{file}"):
                module = _cupy().RawModule(code=source(file), options=OPTIONS)
                function = module.get_function(name)
            self._modules[file] = module
        allowed = _SHARED

        def launch(grid: Grid, block: Grid, *arguments: object, shared: int = 0) -> None:
            nonlocal allowed
            with self._failing:
                self._current()
                if shared > allowed:
                    function.max_dynamic_shared_size_bytes = allowed = shared
                function(grid, block, tuple(map(_argument, arguments)), shared_mem=shared, stream=self._queue)

        return launch

    def pinned(self, nbytes: int) -> Array:
        if nbytes == 0:
            return np.empty(0, np.uint8)
        cuda = self._current()
        with self._failing:
            memory = cuda.PinnedMemory(nbytes, cuda.runtime.hostAllocPortable)
        return np.frombuffer(cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)

    def pin(self, array: Array) -> None:
        layout(array)
        begin, end = _address(array), _address(array) + array.nbytes
        if begin == end or any(lo <= begin and end <= hi for lo, hi in self._registered):
            return
        runtime = self._current().runtime
        try:
            runtime.hostRegister(begin, array.nbytes, _PORTABLE)
        except runtime.CUDARuntimeError:  # memory of a device, of a file, or beyond `ulimit -l`: copies are slower
            return
        self._registered.add((begin, end))
        weakref.finalize(array, self._unpin, begin, end).atexit = False  # it may not be freed while it is registered

    def _unpin(self, begin: int, end: int) -> None:
        self._registered.discard((begin, end))
        with suppress(RuntimeError):
            self._current().runtime.hostUnregister(begin)

    def pull(self, array: Array, buf: Array) -> Test:
        with self._failing:
            self._pulls.wait_event(self._mark(self._queue))
        return self._copy(buf, array, self._cuda.runtime.memcpyDeviceToHost, self._pulls)

    def push(self, buf: Array, array: Array) -> Test:
        return self._copy(array, buf, self._cuda.runtime.memcpyHostToDevice, self._queue)

    def read(self, array: Array) -> Any:
        out = _empty_like(array)
        self._copy(out, array, self._cuda.runtime.memcpyDeviceToHost, self._queue)
        with self._failing:
            self._queue.synchronize()
            self._pulls.synchronize()
        return out

    def mark(self) -> Test:
        return self._test(self._mark(self._queue))

    def groups(self) -> bool:
        return nccl.installed()

    def ident(self) -> bytes:
        return nccl.ident()

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        with self._failing:
            return nccl.Ring(self._current(), self._queue, self._failing, ident, size, rank)

    def _current(self) -> Any:
        """cupy.cuda, with this GPU as the calling thread's."""
        self._device.use()
        return self._cuda

    def _mark(self, stream: Any) -> Any:
        """An event: all that the stream was asked for up to now is done."""
        with self._failing:
            event = self._current().Event(disable_timing=True)
            event.record(stream)
        return event

    def _copy(self, target: Array, origin: Array, way: int, stream: Any) -> Test:
        check_alike(target, origin)
        runtime = self._current().runtime
        if target.nbytes:
            with self._failing:
                runtime.memcpyAsync(_address(target), _address(origin), target.nbytes, way, stream.ptr)
        return self._test(self._mark(stream))

    def _test(self, event: Any) -> Test:
        """Whether an event has come."""
        runtime = self._cuda.runtime

        def done() -> bool:
            status = runtime.eventQuery(event.ptr)
            if status not in (0, _NOT_READY):
                with self._failing:
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


def _hidden() -> str:
    """What hides GPUs from this process, if anything does."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f" (CUDA_VISIBLE_DEVICES={value})"


def _extra(cupy: Any) -> str:
    """What of dpnn goes with the CuPy that is installed."""
    return f"dpnn[cuda{cupy.cuda.runtime.runtimeGetVersion() // 1000}]"


@cache
def _unkept() -> str:
    """Why CuPy can't keep what it compiles; empty where it can. Its own cache would fail in such a folder."""
    return trouble(kernels_folder())


@cache
def _cupy() -> Any:
    if _unkept():
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"  # read when CuPy is imported
    try:
        import cupy
    except ImportError as error:
        raise Unavailable(
            f"CuPy is missing ({error}): install dpnn[cuda13] where `nvidia-smi` names CUDA 13, else dpnn[cuda12]"
        ) from error
    return cupy
