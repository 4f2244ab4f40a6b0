"""A stand-in for a GPU: the kernels' own source, compiled by g++, a fiber for each thread, on NumPy arrays."""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dpnn.backends.base import Array
from dpnn.backends.cuda.device import Grid, Kernel
from dpnn.backends.cuda.source import source
from dpnn.memory import Group, Test

HEADER = Path(__file__).with_name("shim.h")
_KERNEL = re.compile(r"^KERNEL\([^)]*\)\s*(\w+)\s*\(", re.MULTILINE)
FLAGS = ("-std=c++20", "-O2", "-fno-math-errno", "-w", "-fPIC", "-shared")


class Shim:
    """A device whose memory is NumPy's. `reverse`: the threads of a block run in the opposite order."""

    about = "a stand-in on the CPU"
    processors = 2

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    def empty(self, nbytes: int) -> Array:
        raw = np.full(nbytes + 256, 255, np.uint8)
        return raw[-raw.ctypes.data % 256 :][:nbytes]

    pinned = empty

    def zero(self, array: Array) -> None:
        array[...] = 0

    def pin(self, array: Array) -> None:
        pass

    def pull(self, array: Array, buf: Array) -> Test:
        np.copyto(buf, array)
        return lambda: True

    def push(self, buf: Array, array: Array) -> Test:
        np.copyto(array, buf)
        return lambda: True

    def read(self, array: Array) -> Any:
        return array.copy()

    def mark(self) -> Test:
        return lambda: True

    def ident(self) -> bytes:
        return b""

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        raise NotImplementedError

    def kernel(self, file: str, name: str) -> Kernel:
        function = getattr(compiled(source(file)), f"{name}_cpu")
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

        def launch(grid: Grid, block: Grid, *arguments: object, shared: int = 0) -> None:
            values = [_value(argument) for argument in arguments]
            pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
            sizes = (ctypes.c_uint * 6)(*(*grid, 1, 1, 1)[:3], *(*block, 1, 1, 1)[:3])
            os.environ.pop("SHIM_REVERSE", None)
            if self.reverse:
                os.environ["SHIM_REVERSE"] = "1"
            if function(ctypes.addressof(sizes), shared, ctypes.addressof(pointers)):
                raise AssertionError(f"{file}: {name}: its barriers are wrong")

        return launch


def _value(argument: object) -> Array:
    """An argument as the bytes that the kernel gets."""
    if argument is None:
        return np.zeros(1, np.uint64)
    if isinstance(argument, np.ndarray):
        return np.array([argument.ctypes.data], np.uint64)
    if isinstance(argument, np.generic):
        return np.array([argument])
    return np.array([argument], np.int32 if isinstance(argument, int) else np.float32)


@cache
def compiled(text: str, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """A library of the kernels of a text; one for all processes that ask."""
    unit = f'#include "{HEADER}"\n{text}\n' + "".join(f"SHIM_EXPORT({name})\n" for name in _KERNEL.findall(text))
    name = hashlib.sha256((unit + HEADER.read_text() + " ".join(flags)).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"dpnn-shim-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{name}.so"
    if not library.exists():
        fresh = folder / f"{name}.{os.getpid()}"
        subprocess.run(["g++", *flags, "-x", "c++", "-", "-o", str(fresh)], input=unit.encode(), check=True)
        fresh.rename(library)
    return ctypes.CDLL(str(library))
