"""What this backend needs of a GPU, and no more: memory, copies, kernels. `Gpu` has them by CuPy, the tests' by NumPy.

All that is asked of a device is done in order, later: kernels, zeros and copies to it form one queue. Copies to the
host begin in the queue's order and run beside what comes behind them. As with messages, until a copy says that it is
done nobody writes what it reads, or reads or writes what it writes; only the queue may read what `push` writes. `read`
waits for all. Both ends of a copy have one shape and type, and lie in memory alike, without gaps.
"""

from typing import Any, Protocol

from dpnn.memory import Array, Group, Test

Grid = tuple[int, ...]


class Kernel(Protocol):
    """One kernel of a file.

    Arguments: arrays stand for their first byte and None for NULL, an int is passed as `int`, a float as `float`, a
    NumPy scalar as what it is (np.int64 as `long long`). `shared`: bytes of dynamic shared memory.
    """

    def __call__(self, grid: Grid, block: Grid, *arguments: object, shared: int = 0) -> None: ...


class Device(Protocol):
    """One GPU, or what stands for it. Arrays are CuPy's, or NumPy's."""

    about: str
    """Which device it is."""
    processors: int
    """Multiprocessors: how many blocks run side by side at least."""
    unkept: str
    """Why compiled kernels can't be kept for other runs; empty where they can."""

    def empty(self, nbytes: int) -> Array:
        """Memory of the device, uint8, aligned to 256 bytes."""
        ...

    def free(self) -> int:
        """Bytes that are free, for all processes that use it."""
        ...

    def address(self, array: Array) -> int:
        """Where an array's memory begins."""
        ...

    def zero(self, array: Array) -> None:
        """Set an array, contiguous in memory, to zeros."""
        ...

    def kernel(self, file: str, name: str) -> Kernel:
        """A kernel of kernels/FILE."""
        ...

    def pinned(self, nbytes: int) -> Array:
        """Memory of the host, uint8, that copies may run to and from while other work goes on."""
        ...

    def pin(self, array: Array) -> None:
        """Make memory of the host, from anywhere, such memory, as far as that goes."""
        ...

    def pull(self, array: Array, buf: Array) -> Test:
        """Start to copy an array of the device, behind what the queue has now, into one of the host.

        Work that is asked for later may read the array at once, and write it once the copy is done.
        """
        ...

    def push(self, buf: Array, array: Array) -> Test:
        """Start to copy an array of the host into one of the device, in the queue's order."""
        ...

    def read(self, array: Array) -> Any:
        """An array as one of NumPy's, once all that was asked for is done."""
        ...

    def mark(self) -> Test:
        """Whether all is done that was asked for before this call."""
        ...

    def groups(self) -> bool:
        """Whether it can be one of a group of devices (NCCL is installed)."""
        ...

    def ident(self) -> bytes:
        """A name for a new group of devices (NCCL's unique id); empty where they can't form one."""
        ...

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        """This device in a group of `size` (NCCL); collective."""
        ...


def blocks(n: int, each: int = 256) -> Grid:
    """A grid of enough blocks for n things, `each` a block."""
    return (max(1, -(-n // each)),)


def order(array: Array) -> list[int]:
    """An array's dimensions as they lie in memory, the outermost first."""
    return sorted(range(array.ndim), key=lambda dim: -array.strides[dim])


def layout(array: Array) -> tuple[object, ...]:
    """How an array lies in memory: its type, shape and order. ValueError where there are gaps between its numbers."""
    dims = [dim for dim in order(array) if array.shape[dim] != 1] if array.size else []
    stride = array.itemsize
    for dim in reversed(dims):
        if array.strides[dim] != stride:
            raise ValueError(f"an array with gaps in memory: shape {array.shape}, strides {array.strides}")
        stride *= array.shape[dim]
    return array.dtype, array.shape, dims


def check_alike(target: Array, origin: Array) -> None:
    """ValueError where two arrays, one to be copied to the other, don't lie alike."""
    if layout(target) != layout(origin):
        raise ValueError(f"can't copy between arrays that lie differently: {layout(origin)} and {layout(target)}")
