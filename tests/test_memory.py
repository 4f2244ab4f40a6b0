"""Arrays of the host that other processes copy from."""

import re
from pathlib import Path

import numpy as np
import pytest

from dpnn.memory import zeros, zeros_like

LARGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("n", [0, 1, 262_143, 262_144, 524_288, 1_000_003])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zeros_are_zeros_that_can_be_written(n: int, dtype: str):
    array = zeros(n, dtype)
    assert (array.shape, array.dtype) == ((n,), np.dtype(dtype))
    assert array.flags.c_contiguous
    assert not array.any()
    array[:] = 1
    other = zeros_like(array)
    assert (other.shape, other.dtype) == (array.shape, array.dtype)
    assert not other.any()


@pytest.mark.skipif(not LARGE.exists() or "[never]" in LARGE.read_text(), reason="this kernel has no large pages")
def test_a_long_array_lies_in_large_pages():
    array = zeros(1_572_864, "float32")  # three of them
    array[:] = 1
    start = array.ctypes.data
    assert start % (1 << 21) == 0
    held = 0
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        lo, hi = (int(bound, 16) for bound in mapping.split(" ")[0].split("-"))
        if lo <= start < hi:
            held = int(re.search(r"AnonHugePages: +(\d+) kB", mapping)[1])
    assert held >= 6 << 10
