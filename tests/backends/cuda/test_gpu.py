"""What `Gpu` asks of CuPy, on a CuPy whose streams do everything as late as they may."""

import ctypes
import sys
import weakref
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from dpnn.backends.cuda import gpu
from dpnn.backends.cuda.device import Device
from dpnn.backends.cuda.gpu import Gpu, visible
from dpnn.backends.cuda.source import OPTIONS, source
from dpnn.errors import JobError, RankError
from dpnn.native import Unavailable


class CUDARuntimeError(RuntimeError):
    pass


class Stream:
    """What was asked for, and isn't done."""

    every: ClassVar[dict[int, "Stream"]] = {}

    def __init__(self, non_blocking: bool) -> None:
        assert non_blocking
        self.ptr, self.asked, self.n_done = 7 + len(self.every), [], 0
        self.every[self.ptr] = self

    def add(self, work: Any) -> None:
        self.asked.append(work)

    def run(self, until: int) -> None:
        while self.n_done < until:
            self.n_done += 1
            self.asked[self.n_done - 1]()

    def synchronize(self) -> None:
        self.run(len(self.asked))

    def wait_event(self, event: "Event") -> None:
        self.add(event.synchronize)


class Event:
    every: ClassVar[list["Event"]] = []

    def __init__(self, disable_timing: bool) -> None:
        assert disable_timing
        self.ptr, self.queries = len(self.every), 0
        self.every.append(self)

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, len(stream.asked)

    def synchronize(self) -> None:
        self.stream.run(self.place)


class Memory:
    def __init__(self, nbytes: int, flags: int = 0) -> None:
        self.bytes, self.flags = np.full(nbytes, 255, np.uint8), flags
        self.ptr = self.bytes.ctypes.data


class NdArray:
    """An array that only names memory: no operation of it may be used."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, pointer: Any) -> None:
        self._see(np.frombuffer(pointer.memory.bytes, dtype).reshape(shape))

    def _see(self, array: np.ndarray) -> "NdArray":
        self._array = array
        for name in ("shape", "strides", "dtype", "ndim", "size", "nbytes", "itemsize"):
            setattr(self, name, getattr(array, name))
        self.data = SimpleNamespace(ptr=array.ctypes.data)
        return self

    def __getattr__(self, name: str) -> Any:
        if name not in ("view", "reshape", "transpose"):
            raise AttributeError(name)
        return lambda *arguments: object.__new__(NdArray)._see(getattr(self._array, name)(*arguments))

    def __getitem__(self, index: Any) -> "NdArray":
        return object.__new__(NdArray)._see(self._array[index])


class CuPy(ModuleType):
    """Of CuPy, what `Gpu` uses. `log` has what was asked for; `fails` what an event ends with."""

    __version__ = "14.2.0"
    ndarray = NdArray

    def __init__(self, count: int = 2) -> None:
        super().__init__("cupy")
        self.count, self.log, self.current, self.fails, self.room = count, [], None, 0, 2**29
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            hostAllocPortable=1,
            getDeviceCount=self.get_device_count,
            runtimeGetVersion=lambda: 13020,
            getDeviceProperties=lambda number: {"name": b"GPU of a test", "multiProcessorCount": 132},
            deviceGetPCIBusId=lambda number: f"0000:0{number}:00.0",
            memsetAsync=lambda to, value, n, stream: Stream.every[stream].add(lambda: ctypes.memset(to, value, n)),
            memcpyAsync=lambda to, start, n, way, stream: Stream.every[stream].add(
                lambda: ctypes.memmove(to, start, n)
            ),
            eventQuery=self.query,
            hostRegister=self.register,
            hostUnregister=lambda address: self.log.append(("unregister", address)),
            memGetInfo=lambda: (self.room, 2**30),
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Stream=Stream,
            Event=Event,
            Device=lambda number: SimpleNamespace(use=lambda: setattr(self, "current", number)),
            Memory=self.memory,
            MemoryPointer=lambda memory, offset: SimpleNamespace(memory=memory),
            PinnedMemory=Memory,
            PinnedMemoryPointer=lambda memory, offset: memory.bytes,
        )

    def get_device_count(self) -> int:
        if self.count < 0:
            raise CUDARuntimeError("cudaErrorInsufficientDriver")
        return self.count

    def memory(self, nbytes: int) -> Memory:
        """It comes back as it is collected."""
        if nbytes > self.room:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.room -= nbytes
        memory = Memory(nbytes)
        weakref.finalize(memory.bytes, lambda: setattr(self, "room", self.room + nbytes))
        return memory

    def query(self, ptr: int) -> int:
        """Not ready when it is asked for the first time."""
        event = Event.every[ptr]
        event.queries += 1
        if self.fails:
            event.synchronize = lambda: self.register(None, 0, 0)
            return self.fails
        if event.queries == 1:
            return 600
        event.synchronize()
        return 0

    def register(self, address: int | None, nbytes: int, flags: int) -> None:
        self.log.append(("register", address, nbytes, flags))
        if address is None or nbytes == 13:
            raise CUDARuntimeError("no")

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:
        self.log.append(("module", code, options))
        return SimpleNamespace(get_function=lambda name: Function(self, name))


class Function:
    def __init__(self, cupy: CuPy, name: str) -> None:
        self._cupy, self._name, self.max_dynamic_shared_size_bytes = cupy, name, 48 * 1024

    def __call__(self, grid: Any, block: Any, arguments: Any, shared_mem: int, stream: Stream) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self._cupy.log.append((self._name, self._cupy.current, grid, block, arguments, shared_mem, stream))


class Nccl(ModuleType):
    """CuPy's module of that name, with NCCL or without: each of a group has the same numbers."""

    NCCL_FLOAT32, NCCL_SUM = 7, 0

    def __init__(self, available: bool) -> None:
        super().__init__("cupy.cuda.nccl")
        self.available = available

    def get_unique_id(self) -> bytes:
        return b"n" * 128

    def NcclCommunicator(self, size: int, ident: bytes, rank: int) -> Any:
        assert (size, ident, rank) == (2, b"n" * 128, 1)
        return SimpleNamespace(allReduce=self.all_reduce)

    def all_reduce(self, start: int, to: int, n: int, kind: int, operation: int, stream: int) -> None:
        assert (start, kind, operation) == (to, 7, 0)
        numbers = np.ctypeslib.as_array((ctypes.c_float * n).from_address(start))
        Stream.every[stream].add(lambda: np.multiply(numbers, 2, out=numbers))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> CuPy:
    fake = CuPy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    gpu._cupy.cache_clear()
    yield fake
    gpu._cupy.cache_clear()


def later(test: Any) -> None:
    """Something that was started isn't done, and then is."""
    assert not test()
    assert test()


def test_a_gpu_tells_what_it_is(cupy):
    device: Device = Gpu(1)
    assert (device.about, device.processors) == ("GPU of a test (0000:01:00.0)", 132)
    assert device.bus_id == "0000:01:00.0"
    assert visible() == 2


def test_kernels_get_arguments_of_the_types_that_are_promised(cupy):
    device = Gpu(1)
    array = device.empty(64)
    cupy.current = 0  # as in another thread
    device.kernel("pointwise.cu", "relu")((1,), (256,), array, None, 3, 0.5, np.float64(2), np.int64(4))
    name, current, grid, block, arguments, shared, stream = cupy.log[-1]
    assert (name, current, grid, block, shared) == ("relu", 1, (1,), (256,), 0)
    assert stream is device._queue
    assert arguments[:2] == (array, None)
    assert [type(value) for value in arguments[2:]] == [np.int32, np.float32, np.float64, np.int64]
    assert arguments[2:] == (3, 0.5, 2, 4)
    with pytest.raises(OverflowError):
        device.kernel("pointwise.cu", "relu")((1,), (256,), 2**31)


def test_a_file_is_compiled_once_with_the_common_options(cupy):
    device = Gpu()
    device.kernel("pointwise.cu", "relu")
    device.kernel("pointwise.cu", "relu_gradient")
    assert cupy.log == [("module", source("pointwise.cu"), OPTIONS)]


def test_much_shared_memory_is_allowed_first(cupy):
    kernel = Gpu().kernel("pointwise.cu", "relu")
    for shared in (0, 48 * 1024, 100_000, 50_000, 200_000):
        kernel((1,), (256,), shared=shared)
    assert [entry[5] for entry in cupy.log[1:]] == [0, 48 * 1024, 100_000, 50_000, 200_000]


def test_copies_go_in_the_order_of_the_queue_and_are_done_when_they_say_so(cupy):
    device = Gpu()
    array, there, back = device.empty(32).view(np.float32), device.pinned(32).view(np.float32), device.pinned(32)
    there[...] = np.arange(8)
    pushed = device.push(there, array)
    pulled = device.pull(array, back.view(np.float32))
    assert (back == 255).all()
    later(pulled)
    assert np.array_equal(back.view(np.float32), np.arange(8))
    later(pushed)
    device.zero(array[2:5])
    assert np.array_equal(device.read(array), [0, 1, 0, 0, 0, 5, 6, 7])


def test_what_is_read_was_done_and_so_were_pulls(cupy):
    device = Gpu()
    array, back = device.empty(8), device.pinned(8)
    device.zero(array)
    device.pull(array, back)
    assert (device.read(array) == 0).all()
    assert (back == 0).all()


def test_arrays_keep_how_they_lie(cupy):
    device = Gpu()
    images = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    memory = device.empty(images.nbytes)
    array = memory.view(np.float32).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    device.push(images, array)
    out = device.read(array)
    assert np.array_equal(out, images)
    assert out.strides == images.strides
    assert np.array_equal(device.read(array[1:, :, :, :]), images[1:])
    assert device.read(memory.view(np.float32)[7:8].reshape(())) == images.transpose(0, 2, 3, 1).ravel()[7]
    for other in (images.copy(order="C"), images[:1], images.astype(np.float64)):
        with pytest.raises(ValueError, match="lie differently"):
            device.push(other, array)
    for view in (array[:, :2], array[:, :, ::2]):
        with pytest.raises(ValueError, match="gaps in memory"):
            device.read(view)


def test_nothing_is_copied_where_there_is_nothing(cupy):
    device = Gpu()
    later(device.push(device.pinned(0), device.empty(0)))
    assert device.read(device.empty(0)).size == 0
    device.zero(device.empty(0))


def test_memory_of_the_host_is_registered_once_where_that_goes(cupy):
    device = Gpu()
    array, small = np.zeros(100, np.uint8), np.zeros(13, np.uint8)
    for _ in range(2):
        device.pin(array)
    device.pin(array[20:50])
    device.pin(small)
    device.pin(small[:0])
    registered = [entry for entry in cupy.log if entry[0] == "register"]
    assert registered == [("register", array.ctypes.data, 100, 1), ("register", small.ctypes.data, 13, 1)]


def test_memory_of_the_host_is_registered_as_long_as_it_lives(cupy):
    device, array = Gpu(), np.zeros(100, np.uint8)
    device.pin(array)
    address = array.ctypes.data
    del array
    assert cupy.log[-2:] == [("register", address, 100, 1), ("unregister", address)]
    assert not device._registered


def test_an_error_on_the_device_is_raised_where_it_is_waited_for(cupy):
    device = Gpu()
    test = device.push(device.pinned(8), device.empty(8))
    cupy.fails = 700
    with pytest.raises(RankError, match=r"GPU of a test \(0000:00:00.0\) failed: no"):
        test()


def test_devices_sum_behind_the_queue_and_before_what_comes_next(cupy, monkeypatch):
    device, module = Gpu(), ModuleType("cupy.cuda")
    monkeypatch.setitem(sys.modules, "cupy.cuda", module)
    module.nccl = Nccl(available=False)
    assert device.ident() == b""
    module.nccl = Nccl(available=True)
    group = device.group(device.ident(), 2, 1)
    array, numbers = device.empty(32).view(np.float32), device.pinned(32).view(np.float32)
    numbers[:] = range(8)
    device.push(numbers, array)
    group.sum(array[2:])
    group.join()
    assert np.array_equal(device.read(array), [0, 1, 4, 6, 8, 10, 12, 14])


def test_memory_that_only_cycles_hold_is_there_again(cupy):
    device, held = Gpu(), []
    held.extend((device.empty(2**28), held))
    del held
    kept = device.empty(2**29)
    told = r"GPU of a test .* has no room for 1 MiB more: 0 of 1,024 MiB are free .*; lower train.global_batch"
    with pytest.raises(JobError, match=told):
        device.empty(2**20)
    assert kept.nbytes == 2**29


def test_what_is_missing_is_said(cupy, monkeypatch):
    with pytest.raises(Unavailable, match="there is no GPU 2: CUDA finds 2, counted from 0"):
        Gpu(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cupy.count = 0
    with pytest.raises(Unavailable, match=r"finds no GPU \(CUDA_VISIBLE_DEVICES=\)"):
        visible()
    cupy.count = -1
    with pytest.raises(Unavailable, match=r"cudaErrorInsufficientDriver.*dpnn\[cuda13\] is installed"):
        Gpu()


def test_a_compiler_that_is_missing_is_said(cupy, monkeypatch):
    def no_headers(code: str, options: tuple[str, ...]) -> None:
        raise RuntimeError("Failed to find CUDA headers")

    monkeypatch.setattr(cupy, "RawModule", no_headers, raising=False)
    with pytest.raises(Unavailable, match=r"can't compile: Failed to find CUDA headers; install dpnn\[cuda13\]"):
        Gpu()


def test_a_cupy_that_is_missing_is_said(cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(Unavailable, match=r"CuPy is missing .*: install dpnn\[cuda13\] where"):
        visible()
