"""A file in memory that has room only for what is written: a large one that is nearly all holes takes little."""

import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_PAGE = 4096


class Sparse(io.RawIOBase):
    """Open for reading and writing; holes are zeros. What h5py wants of a file that it is given in place of a name."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._at = self._size = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def truncate(self, size: int | None = None, /) -> int:
        self._size = self._at if size is None else size
        for page, found in self._pages.items():
            kept = max(0, self._size - page * _PAGE)
            found[kept:] = bytes(len(found[kept:]))
        return self._size

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        into = memoryview(buffer).cast("B")
        n = max(0, min(len(into), self._size - self._at))
        for page, lo, hi, at in self._cut(n):
            found = self._pages.get(page)
            into[at : at + hi - lo] = bytes(hi - lo) if found is None else found[lo:hi]
        self._at += n
        return n

    def write(self, data: "ReadableBuffer", /) -> int:
        told = memoryview(data).cast("B")
        for page, lo, hi, at in self._cut(len(told)):
            self._pages.setdefault(page, bytearray(_PAGE))[lo:hi] = told[at : at + hi - lo]
        self._at += len(told)
        self._size = max(self._size, self._at)
        return len(told)

    def _cut(self, n: int) -> Iterator[tuple[int, int, int, int]]:
        """The next `n` bytes by pages: the page's number, from where to where in it, and what lies before."""
        done = 0
        while done < n:
            page, lo = divmod(self._at + done, _PAGE)
            hi = min(_PAGE, lo + n - done)
            yield page, lo, hi, done
            done += hi - lo
