"""A folder of idx files as MNIST has them: train-images-idx3-ubyte and train-labels-idx1-ubyte, t10k-...; also .gz.

An idx file is two zero bytes, a type, the number of dimensions, each dimension as a big-endian uint32, then the
numbers, big-endian (yann.lecun.com/exdb/mnist).
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.pack.arrays import Stored, as_source
from dpnn.data.pack.source import Source
from dpnn.errors import DataError

Array = NDArray[Any]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PARTS = {"train": "train", "test": "t10k"}


def read_folder(folder: Path) -> Source:
    """The training part, and the test part where there is one; DataError naming the file of what is wrong."""
    parts: dict[str, tuple[Stored, Stored]] = {}
    for name, prefix in _PARTS.items():
        images, labels = (_find(folder, prefix, what) for what in ("images", "labels"))
        if images is None and labels is None and parts:
            continue
        if images is None or labels is None:
            what = "images" if images is None else "labels"
            raise DataError(f"{folder} holds no file {prefix}-{what}-idx... (or .gz); it must hold images and labels")
        parts[name] = (Stored.of(read_idx(images), str(images)), Stored.of(read_idx(labels), str(labels)))
    return as_source(parts)


def read_idx(path: Path) -> Array:
    """The array of one file; DataError where it is no idx file, or its length isn't the one that its header says."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not magic[3]:
                raise DataError(f"{path} begins with {magic.hex(' ')}, so it is no idx file")
            dims = np.frombuffer(file.read(4 * magic[3]), ">u4").tolist()
            if len(dims) < magic[3]:
                raise DataError(f"{path} is truncated: it ends in its header; copy it again")
            dtype = np.dtype(_TYPES[magic[2]])
            nbytes = math.prod(dims) * dtype.itemsize
            data = file.read(nbytes)
            if len(data) < nbytes:
                raise DataError(f"{path} is truncated: {len(data)} of {nbytes} bytes for {dims}; copy it again")
            if file.read(1):
                raise DataError(f"{path} goes on behind the {nbytes} bytes for {dims}; copy it again")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} can't be read ({error}); copy it again") from error
    return np.frombuffer(data, dtype).reshape(dims)


def _find(folder: Path, prefix: str, what: str) -> Path | None:
    """The file of a part, in either spelling: `-idx3-ubyte` or `.idx3-ubyte`; unpacked rather than packed."""
    return min(folder.glob(f"{prefix}-{what}[-.]idx*"), default=None)
