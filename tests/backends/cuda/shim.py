"""A stand-in for a GPU: the kernels' own source, compiled by g++, a fiber for each thread, on NumPy arrays.

Three things find what is wrong in a kernel. Memory that was never written is NaN: global, shared, and what an
asynchronous copy has still to bring. The order of threads and blocks is chosen: results that depend on it are wrong.
And with `watch` every access to memory is seen: outside of the arrays that the kernel was given, misaligned, or a race
(two threads, no barrier between, one writes); that is several times slower.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_size_t, c_uint, c_void_p
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dpnn.backends.base import Array
from dpnn.backends.cuda.device import Grid, Kernel, check_alike, layout
from dpnn.backends.cuda.source import source
from dpnn.memory import Group, Test

HERE = Path(__file__).parent
OWN = ("shim.py", "shim.h", "run.h", "shim.cc", "watch.cc")
FLAGS = ("-std=c++20", "-O2", "-fno-math-errno", "-w", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE")
WATCH = ("-g1", "-fsanitize=thread,undefined", "-fno-sanitize=vptr")
# The memory of static __shared__ variables: all that is static in the kernels' object.
LINK = """SECTIONS { shared_memory (NOLOAD) : {
    HIDDEN(shared_begin = .); *kernels.o(.bss .bss.* COMMON) HIDDEN(shared_end = .);
} } INSERT BEFORE .bss;"""
GUARD = 256
"""Bytes before and behind each array that no kernel may change."""
GUARDED = 0xA5
KERNELS = "kernels.cc"
"""What the text of the kernels is called among the lines that a library knows."""
_KERNEL = re.compile(r'extern "C"\s+void BOUNDS\((.*?)\)\s+(\w+)\s*\(')
DONE: set[tuple[str, str, str, str]] = set()
"""What tests did with the texts in kernels/: file, kernel, by what (compiler, device), how. For `verified.py`."""


class Shim:
    """A device whose memory is NumPy's.

    The threads of a block, and the blocks, run forward, or in the opposite order, or in a random one of a seed. Copies
    from and to the host are made as late as they may be.
    """

    about = "a stand-in on the CPU"
    processors = 2
    unkept = ""

    def __init__(self, reverse: bool = False, seed: int | None = None, watch: bool = False) -> None:
        self.order = int(reverse) if seed is None else seed + 2
        self.watch = watch
        self._pushes: list[Copy] = []
        self._pulls: list[Copy] = []
        self._memory: weakref.WeakValueDictionary[tuple[int, int, int], Array] = weakref.WeakValueDictionary()

    def empty(self, nbytes: int) -> Array:
        raw = np.full(nbytes + 256 + 2 * GUARD, 255, np.uint8)
        begin = GUARD + -(raw.ctypes.data + GUARD) % 256
        raw[begin - GUARD : begin] = raw[begin + nbytes :][:GUARD] = GUARDED
        self._memory[raw.ctypes.data, begin, nbytes] = raw
        return raw[begin : begin + nbytes]

    def free(self) -> int:
        return 1 << 30

    def address(self, array: Array) -> int:
        return int(array.ctypes.data)

    def check(self) -> None:
        """Raise AssertionError if something was written just before or behind an array of `empty` that still lives."""
        for (_, begin, nbytes), raw in list(self._memory.items()):
            for where, guard in ("before", raw[begin - GUARD : begin]), ("behind", raw[begin + nbytes :][:GUARD]):
                if not (guard == GUARDED).all():
                    raise AssertionError(f"something wrote {where} an array of {nbytes} bytes")

    def zero(self, array: Array) -> None:
        layout(array)
        self._finish(self._pushes)
        array[...] = 0

    def pinned(self, nbytes: int) -> Array:
        return np.full(nbytes, 255, np.uint8)

    def pin(self, array: Array) -> None:
        layout(array)

    def pull(self, array: Array, buf: Array) -> Test:
        self._finish(self._pushes)
        self._pulls.append(Copy(buf, array))
        return self._pulls[-1]

    def push(self, buf: Array, array: Array) -> Test:
        self._pushes.append(Copy(array, buf))
        return self._pushes[-1]

    def read(self, array: Array) -> Any:
        layout(array)
        self._finish(self._pushes)
        self._finish(self._pulls)
        return array.copy()

    def mark(self) -> Test:
        self._finish(self._pushes)
        return lambda: True

    def groups(self) -> bool:
        return False

    def ident(self) -> bytes:
        return b""

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        raise NotImplementedError

    def _finish(self, copies: "list[Copy]") -> None:
        for copy in copies:
            copy.finish()
        copies.clear()

    @property
    def way(self) -> str:
        """How threads run here."""
        return "watched" if self.watch else {0: "forward", 1: "backward"}.get(self.order, "shuffled")

    def text(self, file: str) -> str:
        """What is compiled for kernels/FILE."""
        return source(file)

    def kernel(self, file: str, name: str) -> Kernel:
        text = self.text(file)
        library = compiled(text, self.watch)
        kernel = c_void_p.in_dll(library, f"shim_{name}")
        note = {(file, name, "stand-in", self.way)} if is_ours(file, text) else set()

        def launch(grid: Grid, block: Grid, *arguments: object, shared: int = 0) -> None:
            kinds, values = zip(*map(_packed, arguments), strict=True) if arguments else ((), ())
            arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)] if self.watch else []
            how = Launch(
                grid=(*grid, 1, 1, 1)[:3],
                block=(*block, 1, 1, 1)[:3],
                shared=shared,
                n_arguments=len(values),
                order=self.order,
                n_arrays=len(arrays),
                watched=self.watch,
                kinds=(c_uint * len(values))(*kinds),
                arguments=(c_void_p * len(values))(*(value.ctypes.data for value in values)),
                arrays=(Span * len(arrays))(*((array.ctypes.data, _extent(array)) for array in arrays)),
            )
            self._finish(self._pushes)
            wrong = library.shim_launch(ctypes.addressof(kernel), ctypes.addressof(how))
            if wrong:
                raise AssertionError(f"{file}: {name}: {_explained(wrong.decode(), library, text)}")
            DONE.update(note)

        return launch


class Copy:
    """A copy that isn't made before it is asked for a second time, or has to be; until then its target is rubbish."""

    def __init__(self, target: Array, origin: Array) -> None:
        check_alike(target, origin)
        self._target, self._origin, self._asked, self._done = target, origin, False, False
        target[...] = np.nan if target.dtype.kind == "f" else np.iinfo(target.dtype).max

    def finish(self) -> None:
        if not self._done:
            np.copyto(self._target, self._origin)
            self._done = True

    def __call__(self) -> bool:
        if self._asked:
            self.finish()
        self._asked = True
        return self._done


class Span(Structure):
    """`Array` of run.h."""

    _fields_ = (("begin", c_void_p), ("size", c_size_t))


class Launch(Structure):
    """`Launch` of run.h."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_size_t),
        ("n_arguments", c_uint),
        ("order", c_uint),
        ("n_arrays", c_uint),
        ("watched", c_uint),
        ("kinds", POINTER(c_uint)),
        ("arguments", POINTER(c_void_p)),
        ("arrays", POINTER(Span)),
    )


def _packed(argument: object) -> tuple[int, Array]:
    """An argument's kind and size, as `kind` of shim.h packs them, and the bytes that the kernel gets."""
    if argument is None or isinstance(argument, np.ndarray):
        return ord("P") << 16 | 8, np.array([0 if argument is None else argument.ctypes.data], np.uintp)
    if isinstance(argument, np.generic):
        value = np.array([argument])
    else:
        value = np.array([argument], np.int32 if isinstance(argument, int) else np.float32)
    return ord({"u": "i", "b": "i"}.get(value.dtype.kind, value.dtype.kind)) << 16 | value.itemsize, value


def _extent(array: Array) -> int:
    """The bytes from an array's first to its last."""
    if array.size == 0:
        return 0
    return sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) + array.itemsize


@cache
def compiled(text: str, watch: bool = False) -> ctypes.CDLL:
    """A library of the kernels of a text; one for all processes that ask."""
    flags = (*FLAGS, *(WATCH if watch else ()))
    loaded = ctypes.CDLL(str(_cached(f"{text}{flags}", ".so", lambda folder: _compile(text, flags, folder))))
    loaded.shim_launch.restype, loaded.shim_launch.argtypes = c_char_p, (c_void_p, c_void_p)
    return loaded


def _compile(text: str, flags: tuple[str, ...], folder: Path) -> Path:
    kernels, library, link = folder / KERNELS, folder / "kernels.so", folder / "link"
    kernels.write_text(text)
    exports = [f"SHIM_EXPORT({name}, ({threads}))" for threads, name in _found(kernels)]
    kernels.write_text("\n".join((text, *exports, "")))
    _gxx(*flags, "-include", HERE / "shim.h", "-c", kernels, "-o", folder / "kernels.o")
    link.write_text(LINK)
    own = (_object("shim.cc"), _object("watch.cc"))
    _gxx("-shared", f"-Wl,-z,defs,-T,{link}", folder / "kernels.o", *own, "-o", library)
    return library


def _found(kernels: Path) -> list[tuple[str, str]]:
    """The kernels of a text, macros expanded: threads, as written, and name."""
    plain = _gxx("-E", "-P", "-D__global__=", "-D__launch_bounds__(n,...)=BOUNDS(n)", kernels)
    return _KERNEL.findall(plain)


def names(file: str) -> set[str]:
    """The names of the kernels of kernels/FILE."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / KERNELS
        text.write_text(source(file))
        return {name for _, name in _found(text)}


def is_ours(file: str, text: str) -> bool:
    """Whether a text is that of kernels/FILE, and not one that a test made up."""
    return (files("dpnn.kernels") / file).is_file() and text == source(file)


def _object(file: str) -> Path:
    """A file of the stand-in itself, compiled."""

    def build(folder: Path) -> Path:
        _gxx(*FLAGS, "-c", HERE / file, "-o", folder / "it.o")
        return folder / "it.o"

    return _cached(file, ".o", build)


def _cached(what: str, suffix: str, build: Callable[[Path], Path]) -> Path:
    """A file that is built, in a folder for this, where no process did so before."""
    parts = (what, *((HERE / name).read_text() for name in OWN))
    cache = Path(tempfile.gettempdir()) / f"dpnn-shim-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    file = cache / (hashlib.sha256(repr(parts).encode()).hexdigest()[:20] + suffix)
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            build(Path(folder)).rename(file)
    return file


def _gxx(*arguments: object) -> str:
    line = ["g++", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(line)}:\n{done.stderr}")
    return done.stdout


def _explained(message: str, library: ctypes.CDLL, text: str) -> str:
    """A message of shim.cc, with lines of the text for the addresses in it."""
    lines = text.splitlines()

    def located(found: re.Match[str]) -> str:
        command = ["addr2line", "-i", "-e", library._name, found[1]]
        named = re.search(rf"{KERNELS}:(\d+)", subprocess.run(command, capture_output=True, text=True).stdout)
        return f"line {named[1]}" if named else found[0]

    message = re.sub(r"@([0-9a-f]+)", located, message)
    return re.sub(r"line (\d+)", lambda found: f"{found[0]} `{lines[int(found[1]) - 1].strip()}`", message)
