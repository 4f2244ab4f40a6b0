"""TFRecord files: records of any bytes, each with its length before it and a checksum of both.

A record is its length as a little-endian u64, the checksum of those 8 bytes, its bytes, and their checksum; a checksum
is a CRC-32C, masked (tensorflow/core/lib/io/record_writer.h).
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from dpnn.data.pack.extents import Extents, read_exactly
from dpnn.errors import DataError, JobError

HEADER, FOOTER = 12, 4
_GZIP = b"\x1f\x8b"


class TFRecords(Extents):
    """The records of some files; `offsets` and `lengths` are those of their own bytes. Each read is checked."""

    def read(self, number: int) -> bytes:
        """One record; DataError where it is damaged, or can't be had."""
        file, offset, nbytes = int(self.files[number]), int(self.offsets[number]), int(self.lengths[number])
        data = self.read_bytes(file, offset, nbytes + FOOTER)
        if not intact(data):
            raise DataError(f"{self.name(number)}: the record is damaged (its checksum differs)")
        return data[:nbytes]


def scan(path: Path, head: int) -> Iterator[tuple[int, int, bytes]]:
    """Offset and length of each record of a file, and its first `head` bytes or more; no more is read.

    More are the record's checksum, and what else comes behind it. DataError naming file and byte where it is no such
    file, or ends in the middle of a record. OSError is passed on.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(file).st_size, 0
        if not size:
            raise DataError(f"{path} is empty; copy it again")
        while at < size:
            if at + HEADER > size:
                raise DataError(f"{path}, byte {at}: the file ends in the header of a record; copy it again")
            data = read_exactly(file, at, min(HEADER + head + FOOTER, size - at), path)
            if not intact(data[:HEADER]):
                what = "it is compressed; unpack it first" if data[:2] == _GZIP else "damaged, or no TFRecord file"
                raise DataError(f"{path}, byte {at}: the length of a record differs from its checksum: {what}")
            (nbytes,) = struct.unpack_from("<Q", data)
            if at + HEADER + nbytes + FOOTER > size:
                raise DataError(
                    f"{path}, byte {at}: a record of {nbytes} bytes in a file that ends at byte {size}; copy it again"
                )
            yield at + HEADER, nbytes, data[HEADER:]
            at += HEADER + nbytes + FOOTER
    finally:
        os.close(file)


def intact(data: bytes) -> bool:
    """Whether the last 4 bytes are the checksum of all before them."""
    return masked_crc(data[:-FOOTER]) == int.from_bytes(data[-FOOTER:], "little")


def masked_crc(data: bytes) -> int:
    """The checksum of some bytes. JobError where google-crc32c isn't installed."""
    try:
        from google_crc32c import value
    except ImportError as error:
        raise JobError("TFRecord files need google-crc32c; install it with: pip install dpnn[data]") from error
    crc = cast(int, value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
