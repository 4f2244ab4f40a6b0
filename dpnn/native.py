"""Our own CPU kernels: the C files in kernels/, compiled when dpnn is installed, once for each instruction set.

Each call runs on all of the rank's threads, which are OpenMP's, and lets other Python threads run meanwhile; those of
kernels/pixels.c run on the calling thread alone.
"""

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, addressof, c_char, c_double, c_float, c_int64, c_void_p
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Call = Callable[[], object]

LEVELS = ("baseline", "avx2", "avx512")
_LIMITS = {"SSE41": 0, "AVX": 0, "AVX2": 1, "AVX2_VNNI": 1, "AVX2_VNNI_2": 1}
"""What ONEDNN_MAX_CPU_ISA, which limits oneDNN, means for these kernels; other values don't limit them."""

_P, _I, _F, _PP = c_void_p, c_int64, c_float, POINTER(c_void_p)
# Every kernel's arguments; what they are stands in the C files.
_TABLE: dict[str, tuple[Any, ...]] = {
    "winograd": (_P, _P, _P, _P, _P, _I, _I, _P, _P, _P, _P),
    "winograd_gradient": (_P, _P, _P, _P, _I, _P, _P, _P),
    "dense": (_I, _I, _I, _P, _P, _P, _I, _P),
    "moments": (_I, _I, _P, _P, _P, _I, _P),
    "sums": (_I, _I, _P, _P, _I, _P),
    "combine": (_I, _I, _I, _PP, _PP, _P, _I, _PP, _I, _P),
    "gather": (_I, _I, _P, _I, _PP, _P, _I, _PP, _I, _PP, _PP, _P, _I, _P),
    "normalize_gradient": (_I, _I, _P, _P, _P, _P, _P, _P),
    "lrn": (_I, _I, _P, _I, _F, _F, _F, _P, _I, _P),
    "lrn_gradient": (_I, _I, _P, _P, _I, _F, _F, _F, _P, _I, _P),
    "maxpool": (_P, _P, _P, _P),
    "maxpool_gradient": (_P, _P, _P, _P),
    "descend": (_I, _P, _P, _P, _F, _F, _F, _F, _I),
    "adagrad": (_I, _P, _P, _P, _F, _F, _F, _F),
    "blend": (_I, _P, _P, _F),
    "descend_streamed": (_I, _P, _P, _P, _F, _F, _F, _F, _I),
    "adagrad_streamed": (_I, _P, _P, _P, _F, _F, _F, _F),
    "blend_streamed": (_I, _P, _P, _F),
    "descend_kept": (_I, _P, _P, _P, _F, _F, _F, _F, _I, _I, _P, _I),
    "adagrad_kept": (_I, _P, _P, _P, _F, _F, _F, _F, _I, _P, _I),
    "blend_kept": (_I, _P, _P, _F, _I, _P, _I),
    "add": (_I, _I, _PP, _P),
    "squares": (_I, _P),
    "publish": (_P, _I),
    "least": (_P, _I, _I),
    "to_bfloat16": (_I, _P, _P, _P),
    "add_bfloat16": (_I, _I, _I, _P, _P),
}
_ALONE: dict[str, tuple[Any, ...]] = {
    "normalise": (_I, _I, _I, _P, _P, _I, _P, _P, _P),
    "crop": (_I, _I, _I, _I, _I, _I, _P, _P, _P, _I, _P, _P, _P, _P),
    "colour": (_I, _P, _P, _P, _P, _P),
}
"""Those of pixels.c."""
_RESULTS = {"squares": c_double, "least": c_int64}


class Unavailable(Exception):
    """Why something compiled can't be used here, in words for the user."""


class Kernels:
    """The kernels for this processor. `level`: the instruction set; `threads`: how many each call runs on."""

    def __init__(self, threads: int) -> None:
        """Unavailable where they were not built, because there was no C compiler when dpnn was installed."""
        set_openmp(threads)
        self.level = _level()
        library = _load(self.level)
        library.dpnn_set_threads(threads)  # where OpenMP was loaded before, by another package
        self.threads = threads
        for name, arguments in _TABLE.items():
            function = library[f"dpnn_{name}"]
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
            setattr(self, name, function)

    def call(self, name: str, *arguments: object) -> Any:
        """Call a kernel once; what it returns.

        Arrays stand for their first byte, sequences of arrays for lists of these, None for NULL.
        """
        return getattr(self, name)(*map(_argument, arguments))

    def sum_of_squares(self, arrays: Iterable[NDArray[Any]]) -> float:
        """Of all numbers of some float32 arrays, in float64."""
        return float(sum(self.call("squares", array.size, array) for array in arrays))

    def bind(self, name: str, *arguments: object) -> Callable[..., object]:
        """The same call, to be made often. The arrays live as long as it does; the last numbers may come with it."""
        call = partial(getattr(self, name), *map(_argument, arguments))
        call.arrays = arguments  # type: ignore[attr-defined]
        return call


@cache
def alone(name: str) -> Callable[..., None]:
    """A kernel that runs on the calling thread, to be called with addresses and numbers. Unavailable as for `Kernels`.

    It is asked for where samples are first made, not before: Kernels are made first, since they set up OpenMP.
    """
    function = _load(_level())[f"dpnn_{name}"]
    function.argtypes, function.restype = _ALONE[name], None
    return function


def address(array: NDArray[Any]) -> int:
    """Of its first byte; `array.ctypes.data`, but in a third of the time where that can be."""
    try:
        return addressof(c_char.from_buffer(array.data))
    except (TypeError, ValueError):  # read only, or with gaps, or empty
        return array.ctypes.data


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """In this thread, and in those that it starts here, numbers below 1.2e-38 count as 0.

    Gradients fade into such numbers, and a processor takes a hundred times as long for an operation on one. Where the
    kernels were not built, nothing is changed.
    """
    flush = _flush()
    if flush is None:
        yield
        return
    before = flush(1)
    try:
        yield
    finally:
        flush(before)


def set_openmp(threads: int) -> None:
    """What OpenMP reads from the environment when the first library that uses it is loaded."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Threads that wait longer than some microseconds would take the core from NumPy's and from other ranks.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _argument(value: object) -> object:
    if isinstance(value, np.ndarray):
        return address(value)
    if isinstance(value, list | tuple):
        return (c_void_p * max(1, len(value)))(*map(address, value))
    return value


@cache
def _flush() -> Any:
    """The function that switches it, None where the kernels were not built."""
    try:
        return _load(LEVELS[0]).dpnn_flush
    except Unavailable:
        return None


def _level() -> str:
    """The instruction set that this processor has and ONEDNN_MAX_CPU_ISA allows."""
    limit = _LIMITS.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), len(LEVELS) - 1)
    return LEVELS[min(_load(LEVELS[0]).dpnn_level(), limit)]


def _load(level: str) -> ctypes.CDLL:
    found = importlib.util.find_spec(f"dpnn.kernels._cpu_{level}")
    if found is None or found.origin is None:
        raise Unavailable(
            f"the CPU kernels ({level}) were not built: install a C compiler with OpenMP (gcc), then dpnn again"
        )
    try:
        return ctypes.CDLL(found.origin)
    except OSError as error:
        raise Unavailable(f"the CPU kernels can't be loaded: {error}; install dpnn again on this machine") from error
