"""Named float32 arrays in one block of scratch."""

import math
from collections.abc import Mapping

import numpy as np

from dpnn.backends.base import Array

_ALIGNED = 64
"""Numbers to which each array's start is rounded: 256 bytes."""


def scratch_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes of arrays of so many numbers."""
    return 4 * sum(math.ceil(n / _ALIGNED) * _ALIGNED for n in sizes.values())


def carve(block: Array, sizes: Mapping[str, int]) -> dict[str, Array]:
    """The arrays by name. `block`: uint8, of `scratch_bytes`."""
    numbers, start = block.view(np.float32), 0
    arrays: dict[str, Array] = {}
    for name, n in sizes.items():
        arrays[name] = numbers[start : start + n]
        start += math.ceil(n / _ALIGNED) * _ALIGNED
    return arrays
