"""A GPU behind the stand-in's face: arrays are NumPy's, and go to the device and back with every launch."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from dpnn.backends.base import Array
from dpnn.backends.cuda.device import Grid, Kernel, order
from dpnn.backends.cuda.gpu import Gpu
from dpnn.native import Unavailable

from .shim import DONE, Shim

_ALIGNED = 256


@cache
def gpu() -> Gpu:
    """The first GPU."""
    return Gpu(0)


def on_gpu() -> "Copied":
    """A device of this kind; the test is skipped where there is no GPU."""
    try:
        gpu()
    except Unavailable as error:
        pytest.skip(f"no GPU: {error}")
    return Copied()


class Copied(Shim):
    """So tests of kernels run on a GPU as they are."""

    def kernel(self, file: str, name: str) -> Kernel:
        device = gpu()
        kernel = device.kernel(file, name)

        def launch(grid: Grid, block: Grid, *arguments: object, shared: int = 0) -> None:
            there: dict[int, tuple[Array, Array]] = {}
            passed = [_sent(value, there) if isinstance(value, np.ndarray) else value for value in arguments]
            kernel(grid, block, *passed, shared=shared)
            for bytes_here, bytes_there in there.values():
                bytes_here[...] = device.read(bytes_there)
            DONE.add((file, name, device.about.partition(" (")[0], ""))

        return launch


def _sent(array: Array, there: dict[int, tuple[Array, Array]]) -> Array:
    """The array on the device, aligned as here; with all of the memory that it is part of."""
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    begin = root.ctypes.data
    if begin not in there:
        here = np.lib.stride_tricks.as_strided(root.transpose(order(root)).reshape(-1).view(np.uint8))
        block, skip = gpu().empty(root.nbytes + _ALIGNED), begin % _ALIGNED
        there[begin] = here, block[skip : skip + root.nbytes]
        gpu().push(here, there[begin][1])
    return there[begin][1][array.ctypes.data - begin :]
