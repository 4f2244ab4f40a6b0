"""oneDNN's C library: where it is found, the table of its functions, its statuses checked in one place.

The C API is stable within 3.x (https://uxlfoundation.github.io/oneDNN). Numbers are those of dnnl_types.h.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

from dpnn.native import Unavailable, set_openmp

VARIABLE = "DPNN_ONEDNN"
"""The environment variable that names the library to take."""
FILE = "libdnnl.so.3"
MAJOR = 3
INSTALL = f"install it with `pip install onednn-cpu-gomp`, or name a {FILE} in {VARIABLE}"

_MAX_DIMS = 12
Dims = c_int64 * _MAX_DIMS
_OUT = POINTER(c_void_p)
_STATUSES = {1: "out of memory", 2: "invalid arguments", 3: "unimplemented", 5: "runtime error", 6: "not required"}
_ISAS = {0x1: "SSE4.1", 0x3: "AVX", 0x7: "AVX2", 0xF: "AVX2", 0x1F: "AVX2"}
_AMX = 0xFEF
"""The instruction set AVX-512 with AMX. Without AMX oneDNN (3.2) computes in float32 what may be bfloat16."""


class Argument(ctypes.Structure):
    """dnnl_exec_arg_t."""

    _fields_ = [("index", c_int), ("memory", c_void_p)]


_P, _I, _D, _F = c_void_p, c_int, POINTER(c_int64), c_float
# Every function that is used: its arguments. All return a status but for those in _RESULTS.
_TABLE: dict[str, tuple[Any, ...]] = {
    "engine_create": (_OUT, _I, c_size_t),
    "stream_create": (_OUT, _P, c_uint),
    "memory_desc_create_with_strides": (_OUT, _I, _D, _I, _D),
    "memory_desc_create_with_tag": (_OUT, _I, _D, _I, _I),
    "memory_desc_equal": (_P, _P),
    "memory_desc_get_size": (_P,),
    "memory_desc_destroy": (_P,),
    "memory_create": (_OUT, _P, _P, _P),
    "memory_destroy": (_P,),
    "post_ops_create": (_OUT,),
    "post_ops_append_eltwise": (_P, _I, _F, _F),
    "post_ops_append_sum": (_P, _F, ctypes.c_int32, _I),
    "post_ops_destroy": (_P,),
    "primitive_attr_create": (_OUT,),
    "primitive_attr_set_post_ops": (_P, _P),
    "primitive_attr_set_fpmath_mode": (_P, _I),
    "primitive_attr_set_scales_mask": (_P, _I, _I),
    "primitive_attr_destroy": (_P,),
    "convolution_forward_primitive_desc_create": (_OUT, _P, _I, _I, _P, _P, _P, _P, _D, _D, _D, _D, _P),
    "convolution_backward_data_primitive_desc_create": (_OUT, _P, _I, _P, _P, _P, _D, _D, _D, _D, _P, _P),
    "convolution_backward_weights_primitive_desc_create": (_OUT, _P, _I, _P, _P, _P, _P, _D, _D, _D, _D, _P, _P),
    "reorder_primitive_desc_create": (_OUT, _P, _P, _P, _P, _P),
    "primitive_desc_query": (_P, _I, _I, _P),
    "primitive_desc_query_md": (_P, _I, _I),
    "primitive_desc_destroy": (_P,),
    "primitive_create": (_OUT, _P),
    "primitive_destroy": (_P,),
    "primitive_execute": (_P, _P, _I, POINTER(Argument)),
    "get_effective_cpu_isa": (),
}
_RESULTS = {
    "memory_desc_equal": c_int,
    "memory_desc_get_size": c_size_t,
    "primitive_desc_query_md": c_void_p,
    "get_effective_cpu_isa": c_int,
}


class Failed(RuntimeError):
    """A call of oneDNN ended in a status that isn't success."""


class _Version(ctypes.Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int)]


class Library:
    """The loaded library with one engine, the CPU, and one stream. `path`, `version` and `isa` are told to users.

    Loading fixes the number of threads: OpenMP reads it once.
    """

    def __init__(self, threads: int) -> None:
        """Unavailable, with the reason and the way out, where there is no library of version 3 for this machine."""
        set_openmp(threads)
        self.path, self._c = _load()
        if hasattr(self._c, "omp_set_num_threads"):
            self._c.omp_set_num_threads(threads)  # where OpenMP was loaded before, by another package
        self.version = _version(self._c)
        for name, arguments in _TABLE.items():
            function = getattr(self._c, f"dnnl_{name}", None)
            if function is None:
                raise Unavailable(f"{self.path} has no dnnl_{name}: {INSTALL}")
            function.argtypes, function.restype = arguments, _RESULTS.get(name, c_int)
        isa = self.call("get_effective_cpu_isa")
        self.isa = _ISAS.get(isa, "AVX-512")
        self.has_bfloat16 = isa & _AMX == _AMX
        self.engine = self.make("engine_create", 1, 0)
        self.stream = self.make("stream_create", self.engine, 1)
        self.execute = self._c.dnnl_primitive_execute

    def make(self, name: str, *arguments: object) -> c_void_p:
        """Call a function whose first argument is where it puts what it made; that. Failed on any other status."""
        made = c_void_p()
        self.check(name, self.call(name, ctypes.byref(made), *arguments))
        return made

    def do(self, name: str, *arguments: object) -> None:
        """Call a function that returns a status; Failed where it isn't success."""
        self.check(name, self.call(name, *arguments))

    def call(self, name: str, *arguments: object) -> int:
        """What a function returns."""
        result: int = getattr(self._c, f"dnnl_{name}")(*arguments)
        return result

    def check(self, name: str, status: int) -> None:
        """Failed where a status isn't success."""
        if status:
            raise Failed(f"oneDNN: {name}: {_STATUSES.get(status, f'status {status}')}")

    def name(self, description: c_void_p) -> str:
        """The implementation that a primitive's description stands for, as oneDNN names it."""
        text = c_char_p()
        self.do("primitive_desc_query", description, 8, 0, ctypes.byref(text))
        return (text.value or b"").decode()


def dims(values: Sequence[int]) -> ctypes.Array[c_int64]:
    """dnnl_dims_t."""
    return Dims(*values)


def _candidates() -> Iterator[str]:
    """Where to look: the file that the user names and no other; else the wheel's, beside this Python; the system's."""
    named = os.environ.get(VARIABLE)
    if named:
        yield named
        return
    wheel = Path(sys.prefix, "lib", FILE)
    if wheel.exists():
        yield str(wheel)
    yield FILE


def _load() -> tuple[str, ctypes.CDLL]:
    reasons = []
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
            found = _version(library)
            if int(found.split(".")[0]) == MAJOR:
                return path, library
            reasons.append(f"{path} is version {found}, {MAJOR}.x is needed")
        except (OSError, AttributeError) as error:
            reasons.append(str(error))
    raise Unavailable(f"no oneDNN ({'; '.join(reasons)}): {INSTALL}")


def _version(library: ctypes.CDLL) -> str:
    library.dnnl_version.restype = POINTER(_Version)
    version = library.dnnl_version().contents
    return f"{version.major}.{version.minor}.{version.patch}"
