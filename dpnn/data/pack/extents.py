"""Records that are byte ranges of larger files: the members of a tar, the records of a TFRecord file."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dpnn.errors import DataError

Array = NDArray[Any]

OPEN_FILES = 64


class OpenFiles:
    """Reads bytes of many files, of which some stay open. Several threads may read at a time. Can be pickled."""

    paths: Sequence[Path]

    def __init__(self, paths: Sequence[Path]) -> None:
        self.__setstate__({"paths": paths})

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(OPEN_FILES)(lambda file: Descriptor(os.open(state["paths"][file], os.O_RDONLY)))

    def read_bytes(self, file: int, offset: int, nbytes: int) -> bytes:
        """Some bytes of paths[file]; DataError where it is shorter than that."""
        descriptor = self._open(file)  # held until the bytes are read: another thread may push it out meanwhile
        return read_exactly(descriptor.number, offset, nbytes, self.paths[file])


class Extents(OpenFiles):
    """Record i is lengths[i] bytes of paths[files[i]] from offsets[i] on.

    `files` int32, `offsets` and `lengths` int64, (n,). As it stands, the records are pictures; a format of another
    codec, or that knows better names, derives from it.
    """

    codec: Literal["image", "frames"] = "image"
    shape: tuple[int, ...] = ()

    def __init__(self, paths: Sequence[Path], files: Array, offsets: Array, lengths: Array) -> None:
        super().__init__(paths)
        self.files, self.offsets, self.lengths = files, offsets, lengths
        self.nbytes = float(lengths.mean()) if len(lengths) else 0.0

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int) -> bytes:
        """One record; DataError where it is empty, or its file has become shorter."""
        if not self.lengths[number]:
            raise DataError("the record is empty")
        return self.read_bytes(int(self.files[number]), int(self.offsets[number]), int(self.lengths[number]))

    def name(self, number: int) -> str:
        """The file and the place in it."""
        return f"{self.paths[self.files[number]]}, byte {self.offsets[number]}"


class Descriptor:
    """An open file, which is closed when nobody holds it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def read_exactly(file: int, offset: int, nbytes: int, path: Path) -> bytes:
    """`nbytes` of an open file; DataError naming `path` where it ends before. OSError is passed on."""
    data = os.pread(file, nbytes, offset)
    while len(data) < nbytes:
        more = os.pread(file, nbytes - len(data), offset + len(data))  # Linux gives 2 GiB at a time
        if not more:
            raise DataError(f"{path} is truncated: it ends at byte {offset + len(data)} of {offset + nbytes}")
        data += more
    return data


def as_extents(found: Sequence[tuple[int, int, int]]) -> tuple[Array, Array, Array]:
    """The arrays `files`, `offsets` and `lengths` from a list of (file, offset, length)."""
    table = np.array(found, np.int64).reshape(-1, 3)
    return table[:, 0].astype(np.int32), table[:, 1].copy(), table[:, 2].copy()
