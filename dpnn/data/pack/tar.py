"""The files in a tar, or in a tar within a tar, found by its headers alone.

A member is a header of 512 bytes (POSIX.1-2017, pax, "ustar Interchange Format") and its bytes, padded to a multiple of
512; blocks of zeros end the archive. A name over 100 bytes precedes its member, in a member of GNU's or pax's own kind.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dpnn.data.pack.extents import Extents, read_exactly
from dpnn.errors import DataError

_BLOCK = 512
_LONGEST_NAME = 1 << 20
_FILE, _FOLDER, _LINKS = (b"0", b"\0", b"7"), b"5", (b"1", b"2")
_GNU_NAME, _GNU_LINK_NAME, _PAX, _PAX_OF_ALL = b"L", b"K", b"x", b"g"


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes lie in the outermost file."""

    name: str
    offset: int
    nbytes: int


class TarRecords(Extents):
    """Pictures in tars. Their names are read from their headers, so that none is kept."""

    def name(self, number: int) -> str:
        """The tar, and the member's name in it, of which a header holds up to 255 bytes."""
        file = int(self.files[number])
        try:
            header = self.read_bytes(file, int(self.offsets[number]) - _BLOCK, _BLOCK)
        except (OSError, DataError):
            return super().name(number)
        return f"{self.paths[file]}, {_text(_name(header))}"


def members(path: Path, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The files in the tar that lies in the bytes [start, end) of a file, but not hidden ones.

    DataError naming the tar and the byte where it is truncated, damaged, no tar, or holds what has no bytes there.
    """
    where = f"{path}, the tar at byte {start}," if start else str(path)
    file = os.open(path, os.O_RDONLY)
    try:
        yield from _walk(file, path, where, start, os.fstat(file).st_size if end is None else end)
    finally:
        os.close(file)


def _walk(file: int, path: Path, where: str, start: int, end: int) -> Iterator[Member]:
    at, name = start, b""
    size: int | None = None  # as name: what a preceding member says of the next
    while True:
        if at + _BLOCK > end:
            raise DataError(
                f"{where} is truncated: it ends at byte {end} without the mark of a tar's end; copy it again"
            )
        header = read_exactly(file, at, _BLOCK, path)
        if not any(header):
            return
        if not _is_sound(header):
            problem = "is no tar (if it is compressed, unpack it)" if at == start else f"is damaged at byte {at}"
            raise DataError(f"{where} {problem}: no header of a tar begins {header[:8].hex(' ')}")
        kind, data = header[156:157], at + _BLOCK
        nbytes = _number(header[124:136]) if size is None else size
        if nbytes < 0:
            raise DataError(f"{where} is damaged at byte {at}: its header names no length; copy it again")
        if data + nbytes > end:
            raise DataError(
                f"{where} is truncated: it ends at byte {end}, and {_text(name or _name(header))!r} at byte "
                f"{data + nbytes}; copy it again"
            )
        at = data + -(-nbytes // _BLOCK) * _BLOCK
        if kind in (_GNU_NAME, _PAX):
            if nbytes > _LONGEST_NAME:
                raise DataError(f"{where} is damaged at byte {data - _BLOCK}: a name of {nbytes} bytes")
            text = read_exactly(file, data, nbytes, path)
            if kind == _GNU_NAME:
                name = text.rstrip(b"\0")
            else:
                attributes = _attributes(text)
                name = attributes.get(b"path", name)
                size = _decimal(attributes[b"size"]) if b"size" in attributes else size
        elif kind not in (_GNU_LINK_NAME, _PAX_OF_ALL):
            name = name or _name(header)
            if kind in _FILE and not name.endswith(b"/"):
                if not name.rsplit(b"/", 1)[-1].startswith(b"."):
                    yield Member(_text(name), data, nbytes)
            elif kind not in (*_FILE, _FOLDER):
                what = "a link" if kind in _LINKS else f"of the kind {_text(kind)!r}"
                raise DataError(f"{where}: {_text(name)!r} is {what}, not a file; make the tar anew with `tar -h`")
            name, size = b"", None


def _is_sound(header: bytes) -> bool:
    """Whether the header's checksum is right: the sum of its bytes, those of the checksum itself taken for spaces."""
    wanted = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    return _number(header[148:156]) == wanted


def _number(field: bytes) -> int:
    """A number in octal digits, or in base 256 as GNU writes larger ones; -1 where it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if all(digit in b"01234567" for digit in digits) else -1


def _name(header: bytes) -> bytes:
    """What a header itself calls its member; the prefix is ustar's alone."""
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _attributes(text: bytes) -> dict[bytes, bytes]:
    """Of a pax header, whose records are "LENGTH KEY=VALUE\\n"."""
    found: dict[bytes, bytes] = {}
    while text:
        length, _, _ = text.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(text):
            break
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key] = value
        text = text[int(length) :]
    return found


def _decimal(text: bytes) -> int:
    return int(text) if text.isdigit() else -1


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
