"""Records that are whole files, millions of them."""

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dpnn.errors import DataError

Array = NDArray[Any]

_WEIGHED = 256
_MOST_NBYTES = 1 << 30
_OF_ITS_OWN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
"""Why a file can't be opened, though all is well with the machine."""


class Names:
    """Many short names, end to end: 9 bytes each beside their own. A Python object for each would take 60.

    `groups`: names, each followed by a zero byte. `counts`: the names of each group.
    """

    def __init__(self, groups: Iterable[bytes]) -> None:
        self._text = bytearray()
        ends = [np.zeros(1, np.int64)]
        for group in groups:
            ends.append(np.flatnonzero(np.frombuffer(group, np.uint8) == 0) + len(self._text) + 1)
            self._text += group
        self._ends = np.concatenate(ends)
        self.counts = [len(group) for group in ends[1:]]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        return bytes(self._text[self._ends[number] : self._ends[number + 1] - 1])


class Files:
    """Pictures: file i is folders[folder[i]] / names[i]. May be read by several threads at a time."""

    codec: Literal["image", "frames"] = "image"
    shape: tuple[int, ...] = ()

    def __init__(self, folders: Sequence[Path], folder: Array, names: Names) -> None:
        self._folders, self._folder, self._names = folders, folder, names
        self.nbytes = self._weigh()

    def __len__(self) -> int:
        return len(self._names)

    def read(self, number: int) -> bytes:
        """A file's bytes; DataError where it isn't there, can't be opened, is empty, or is too large for a picture."""
        try:
            with open(self._path(number), "rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                if nbytes > _MOST_NBYTES:
                    raise DataError(f"the file has {nbytes} bytes; a picture has at most {_MOST_NBYTES}")
                data = file.read()
        except OSError as error:
            if error.errno not in _OF_ITS_OWN:
                raise  # trouble of the machine
            raise DataError(f"the file can't be read ({error.strerror})") from error
        if not data:
            raise DataError("the file is empty")
        return data

    def name(self, number: int) -> str:
        """The path."""
        return str(self._path(number))

    def _path(self, number: int) -> Path:
        folder: int = self._folder[number]
        return self._folders[folder] / os.fsdecode(self._names[number])

    def _weigh(self) -> float:
        """The mean size of some of the files."""
        sizes = []
        for number in range(0, len(self), max(len(self) // _WEIGHED, 1)):
            with suppress(OSError):  # a file that isn't there is told when it is read
                sizes.append(self._path(number).stat().st_size)
        return float(np.mean(sizes)) if sizes else 0.0
