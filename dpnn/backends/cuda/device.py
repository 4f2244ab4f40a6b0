"""What this backend needs of a GPU, and no more: memory, copies, kernels. `Gpu` has them by CuPy, the tests' by NumPy.

All that is asked of a device is done in order, later: kernels, copies and zeros form one queue, and `read` waits for
its end.
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

    def empty(self, nbytes: int) -> Array:
        """Memory of the device, uint8, aligned to 256 bytes."""
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
        """Start to copy an array of the device, as it will be in the queue's order, into one of the host."""
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

    def ident(self) -> bytes:
        """A name for a new group of devices (NCCL's unique id); empty where they can't form one."""
        ...

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        """This device in a group of `size` (NCCL); collective."""
        ...


def blocks(n: int, each: int = 256) -> Grid:
    """A grid of enough blocks for n things, `each` a block."""
    return (max(1, -(-n // each)),)
