"""Where a backend's arrays lie, and how numbers get from there to MPI, files and Python, and back (DESIGN, section 4).

On a CPU both are one: a wire's two arrays are the same, and nothing is copied.
"""

import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Test = Callable[[], bool]
"""Whether a copy that was started is there."""
ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector register."""
_LARGE = 1 << 21
"""Bytes of a large page."""


def zeros(n: int, dtype: Any) -> Array:
    """A flat array of n zeros of the host, in large pages where it is as long as half of one, and the kernel has them.

    From one process to another the kernel copies page by page, for MPI: of large ones in less than half the time.
    """
    dtype = np.dtype(dtype)
    nbytes = n * dtype.itemsize
    if nbytes < _LARGE // 2:
        return np.zeros(n, dtype)
    pages = -(-nbytes // _LARGE) + 1  # one more, to begin where a page does
    block = mmap.mmap(-1, pages * _LARGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(block, np.uint8, 1).ctypes.data % _LARGE
    return np.frombuffer(block, dtype, n, start)


def zeros_like(array: Array) -> Array:
    """The same, of the length and type of a flat array."""
    return zeros(array.size, array.dtype)


class Wire(Protocol):
    """Numbers in a backend's memory, and the same in the host's: at any time at most one of the two is the newer."""

    array: Array
    """Where the backend computes."""
    buf: Array
    """Of the same shape and order in memory: what MPI, files and Python may touch."""

    def pull(self, lo: int = 0, hi: int | None = None) -> Test:
        """Start to bring array[lo:hi] to buf, once all is computed that was asked for so far.

        Nothing that writes the array may be asked for before the test was true.
        """
        ...

    def push(self, lo: int = 0, hi: int | None = None) -> Test:
        """Start to bring buf[lo:hi] to array: before all that is asked for from now on. buf stays until then."""
        ...

    def load(self, values: Array) -> None:
        """Start to bring `values`, of the host, to array[:len(values)]. They stay until `wait`; buf isn't needed.

        The copy is made while other work goes on where they lie as the array does, in memory of `Memory.host`.
        """
        ...

    def wait(self) -> None:
        """Return when all that was started is there."""
        ...


class Group(Protocol):
    """Devices that sum among themselves."""

    def sum(self, array: Array) -> None:
        """Start to sum an array over all devices, in place, once all is computed that was asked for so far."""
        ...

    def join(self) -> None:
        """What is asked for from now on comes after all sums."""
        ...


class Memory(Protocol):
    """The memory that a backend computes in."""

    name: str
    """Of the device, unlike that of every other one of the node; empty for the host."""

    def empty(self, nbytes: int) -> Array:
        """A block of bytes, (nbytes,) uint8, aligned to ALIGNMENT."""
        ...

    def host(self, nbytes: int) -> Array:
        """A block of bytes of the host, (nbytes,) uint8, from which copies are made while other work goes on."""
        ...

    def wire(self, array: Array) -> Wire:
        """A wire between an array of this memory and a new one of the host."""
        ...

    def lift(self, buf: Array) -> Wire:
        """A wire between an array of the host, contiguous, and a new one of this memory; nothing is copied yet."""
        ...

    def couple(self, array: Array, buf: Array) -> Wire:
        """A wire between an array of this memory and one of the host, both contiguous."""
        ...

    def free(self) -> int:
        """Bytes that are free on the device; 0 for the host, whose processes have shares (machine.py)."""
        ...

    def mark(self) -> Test:
        """Whether all is computed that was asked for before this call."""
        ...

    def wait(self) -> None:
        """Return when all is computed that was asked for."""
        ...

    def zero(self, array: Array) -> None:
        """Set an array of this memory, contiguous, to zeros."""
        ...

    def read(self, array: Array) -> Array:
        """An array of this memory as the host sees it, when all is computed that was asked for."""
        ...

    def groups(self) -> bool:
        """Whether devices of several ranks can sum among themselves, as far as this one knows."""
        ...

    def ident(self) -> bytes:
        """A name for a new group of devices; empty where they can't form one."""
        ...

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        """This device in a group of `size`, all different. Collective; `ident`: drawn by the first of them."""
        ...


class HostWire:
    """One array that is both."""

    def __init__(self, array: Array) -> None:
        self.array = self.buf = array

    def pull(self, lo: int = 0, hi: int | None = None) -> Test:
        return _there

    def push(self, lo: int = 0, hi: int | None = None) -> Test:
        return _there

    def load(self, values: Array) -> None:
        self.array[: len(values)] = values

    def wait(self) -> None:
        pass


class HostMemory:
    """NumPy's."""

    name = ""

    def empty(self, nbytes: int) -> Array:
        raw = np.empty(nbytes + ALIGNMENT, np.uint8)
        return raw[-raw.ctypes.data % ALIGNMENT :][:nbytes]

    host = empty

    def wire(self, array: Array) -> Wire:
        return HostWire(array)

    lift = wire

    def couple(self, array: Array, buf: Array) -> Wire:
        raise TypeError("on the host both are one array")

    def free(self) -> int:
        return 0

    def mark(self) -> Test:
        return _there

    def wait(self) -> None:
        pass

    def zero(self, array: Array) -> None:
        array.fill(0)

    def read(self, array: Array) -> Array:
        return array

    def groups(self) -> bool:
        return False

    def ident(self) -> bytes:
        return b""

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        raise TypeError("only devices form groups")


HOST = HostMemory()


def _there() -> bool:
    return True
