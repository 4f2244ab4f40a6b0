"""NumPy's files: one .npz file of arrays, or a folder of an .npy file for each.

The arrays are x_train and y_train, x_test and y_test (or x and y alone). x: (samples, H, W, C), (samples, H, W) or any
other shape. y: class numbers (samples,), or 0 and 1 (samples, classes) where a sample may be of any number of classes.
An .npy file is read where it lies, an .npz file as a whole.
"""

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpnn.data.pack.arrays import Layout, Stored, as_source
from dpnn.data.pack.rows import Rows
from dpnn.data.pack.source import Source
from dpnn.errors import DataError

Array = NDArray[Any]

T = TypeVar("T")


def read_npz(path: Path, layout: Layout = "NHWC") -> Source:
    """The parts of the file; DataError naming the file and the array of what is wrong."""
    stored = {name: Stored.of(array, f"{path}, {name}") for name, array in _load(path).items()}
    return as_source(_pairs(stored, f"{path} has no array"), layout)


def read_npy(folder: Path, layout: Layout = "NHWC") -> Source:
    """The parts of the folder; DataError naming the file of what is wrong."""
    paths = {path.stem: path for path in sorted(folder.glob("*.npy"))}
    wanted = _pairs(paths, f"{folder} has no .npy file")
    return as_source({part: (_lying(x), _lying(y)) for part, (x, y) in wanted.items()}, layout)


def _pairs(found: Mapping[str, T], missing: str) -> dict[str, tuple[T, T]]:
    """The samples and the labels of each part, by their names."""
    if "x" in found or "y" in found:
        names = {"train": ("x", "y")}
    else:
        names = {"train": ("x_train", "y_train")}
        if "x_test" in found or "y_test" in found:
            names["test"] = ("x_test", "y_test")
    for name in (name for pair in names.values() for name in pair):
        if name not in found:
            raise DataError(
                f"{missing} {name!r}, only {', '.join(found) or 'none'}; it must hold x_train, y_train, x_test, "
                f"y_test, or x, y"
            )
    return {part: (found[x], found[y]) for part, (x, y) in names.items()}


def _lying(path: Path) -> Stored:
    """The array of an .npy file, where it lies in the file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # for its header, and to see that it is all there
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} can't be read ({error}); make it again with numpy.save") from error
    if not isinstance(array, np.memmap) or not array.ndim or not array.flags.c_contiguous:
        raise DataError(f"{path} is no array of rows one after the other; make it with numpy.save of one in C order")
    stride = math.prod(array.shape[1:]) * array.dtype.itemsize
    return Stored(Rows([path], [len(array)], array.offset, stride, array.shape[1:], array.dtype), len(array), str(path))


def _load(path: Path) -> dict[str, Array]:
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is no .npz file, but a single array; write it with numpy.savez")
            return {name: np.atleast_1d(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} can't be read ({error}); make it again with numpy.savez") from error
