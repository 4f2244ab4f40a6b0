"""Arithmetic of flat float32 arrays on a device: updates, sums, bfloat16 (kernels/optim.cu, kernels/wire.cu)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dpnn.backends.base import Array
from dpnn.backends.cuda.device import Device, blocks
from dpnn.memory import Memory

_EACH = 1024
"""Numbers a block of 256 threads: four a thread."""
_PARTIALS = 1024
"""Blocks at most that squares are summed by; each has its own partial sum."""
_ADDS = 8
"""Arrays that one launch adds."""


def _same(array: Array | None) -> Array | None:
    return array


_P: Callable[[Any], object] = _same
_I: Callable[[Any], object] = np.int64
_F: Callable[[Any], object] = float
# Every kernel's file and its arguments behind the number n; what they are stands in the files.
_TABLE = {
    "descend": ("optim.cu", (_P, _P, _P, _F, _F, _F, _F, _I)),
    "adagrad": ("optim.cu", (_P, _P, _P, _F, _F, _F, _F)),
    "blend": ("optim.cu", (_P, _P, _F)),
    "to_bfloat16": ("wire.cu", (_P, _P, _P)),
    "add_bfloat16": ("wire.cu", (_I, _I, _P, _P)),
}


class Flat:
    """`call` and `bind` are those of `dpnn.native.Kernels`: the same names and arguments, but arrays of the device.

    All is done later, in the queue's order; `sum_of_squares` waits.
    """

    def __init__(self, device: Device, memory: Memory) -> None:
        self._device, self._memory = device, memory
        self._kernels = {name: device.kernel(file, name) for name, (file, _) in _TABLE.items()}
        self._add, self._squares, self._total = (
            device.kernel("optim.cu", name) for name in ("add", "squares", "total")
        )
        self._partials = device.empty(8 * _PARTIALS).view(np.float64)
        self._sum = device.empty(8).view(np.float64)

    def bind(self, name: str, n: int, *arrays: Any) -> Callable[..., object]:
        """`call`, but for the arguments behind these."""
        return partial(self.call, name, n, *arrays)

    def call(self, name: str, n: int, *arguments: Any) -> None:
        """Work on n numbers, as the kernel `name` does."""
        if n == 0:
            return
        if name == "add":
            self._add_all(n, *arguments)
            return
        passed = (kind(value) for kind, value in zip(_TABLE[name][1], arguments, strict=True))
        self._kernels[name](blocks(n, _EACH), (256,), np.int64(n), *passed)

    def sum_of_squares(self, arrays: Iterable[Array]) -> float:
        """Of all numbers of some arrays, in float64, added in an order that their sizes and places fix."""
        self._device.zero(self._partials)
        for array in arrays:
            if array.size:
                grid = (min(_PARTIALS, *blocks(array.size, _EACH)),)
                self._squares(grid, (256,), np.int64(array.size), array, self._partials)
        self._total((1,), (256,), _PARTIALS, self._partials, self._sum)
        return float(self._memory.read(self._sum)[0])

    def _add_all(self, n: int, k: int, arrays: Sequence[Array], to: Array) -> None:
        """`to` = the sum of k arrays in their order; it may be one of the first eight."""
        rest = list(arrays[:k])
        while rest:
            some, rest = rest[:_ADDS], rest[_ADDS:]
            missing = [None] * (_ADDS - len(some))
            self._add(blocks(n, _EACH), (256,), np.int64(n), len(some), to, *some, *missing)
            rest = [to, *rest] if rest else []
