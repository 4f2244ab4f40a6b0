"""Protocol buffers as bytes: as much of their wire format as tf.train.Example and SequenceExample need.

A message is fields end to end: a varint of number * 8 + wire type, then a varint (type 0), 8 bytes (1), a length as a
varint and so many bytes (2), or 4 bytes (5) (protobuf.dev/programming-guides/encoding). Functions take the bytes and
the range [lo, hi) in which a message lies. The bytes may be only the beginning of a record, where what is asked for
lies in it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5
_SIZES = {EIGHT: 8, FOUR: 4}
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3
"""The fields of a Feature, one of which it has; each list has its values in field 1."""


class Malformed(ValueError):
    """The bytes are no such message; says what and where."""


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift == 70:
            raise Malformed(f"byte {at}: a varint of more than 10 bytes")
    raise Malformed(f"byte {at}: the bytes end in a varint")


def fields(data: bytes, lo: int, hi: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type and range of the value of each field; a value may reach beyond the bytes at hand."""
    while lo < hi:
        start = lo
        tag, lo = varint(data, lo)
        wire = tag & 7
        if wire == BYTES:
            length, lo = varint(data, lo)
            end = lo + length
        elif wire == VARINT:
            _, end = varint(data, lo)
        elif wire in _SIZES:
            end = lo + _SIZES[wire]
        else:
            raise Malformed(f"byte {start}: a field of type {wire}")
        if end > hi or not tag >> 3:
            raise Malformed(f"byte {start}: a field that ends behind its message, or has no number")
        yield tag >> 3, wire, lo, end
        lo = end


def parts(data: bytes, lo: int, hi: int, number: int) -> Iterator[tuple[int, int]]:
    """The ranges of all values of one field that are bytes or messages."""
    return ((a, b) for found, wire, a, b in fields(data, lo, hi) if found == number and wire == BYTES)


def take(data: bytes, lo: int, hi: int) -> bytes:
    """The bytes of a range."""
    if hi > len(data):
        raise Malformed(f"byte {lo}: the bytes end before byte {hi}")
    return data[lo:hi]


def entries(data: bytes, lo: int, hi: int) -> Iterator[tuple[bytes, int, int]]:
    """Key and range of the value of each entry of a message that is a map in field 1: Features, FeatureLists."""
    for start, end in parts(data, lo, hi, 1):
        key, value = b"", (end, end)
        for number, wire, a, b in fields(data, start, end):
            if number == 1 and wire == BYTES:
                key = take(data, a, b)
            elif number == 2 and wire == BYTES:
                value = a, b
        yield key, *value


def integers(data: bytes, lo: int, hi: int) -> list[int]:
    """The values of a Feature that is a list of int64. Malformed where it is another list."""
    values = []
    for number, wire, a, b in _values(data, lo, hi, _INT64_LIST):
        if number == 1 and wire in (VARINT, BYTES):  # one at a time, or packed
            take(data, a, b)
            while a < b:
                value, a = varint(data, a)
                values.append((value + (1 << 63)) % (1 << 64) - (1 << 63))
            if a > b:
                raise Malformed(f"byte {b}: a varint that goes on behind its list")
    return values


def numbers(data: bytes, lo: int, hi: int) -> Array:
    """The values of a Feature that is a list of floats, float32 (n,). Malformed where it is another list."""
    packed = [
        take(data, a, b)
        for number, wire, a, b in _values(data, lo, hi, _FLOAT_LIST)
        if number == 1 and wire in (FOUR, BYTES)
    ]
    joined = b"".join(packed)
    if len(joined) % 4:
        raise Malformed(f"byte {lo}: {len(joined)} bytes of float32")
    return np.frombuffer(joined, "<f4")


def strings(data: bytes, lo: int, hi: int) -> list[bytes]:
    """The values of a Feature that is a list of bytes. Malformed where it is another list."""
    return [take(data, a, b) for number, wire, a, b in _values(data, lo, hi, _BYTES_LIST) if (number, wire) == (1, 2)]


def rows(data: bytes, lo: int, hi: int, width: int) -> Array:
    """A FeatureList whose every Feature is one value of `width` bytes, uint8 (T, width).

    In a quarter of a millisecond for 300 frames: each has the same bytes before its value, so they are an array.
    """
    first = next(fields(data, lo, hi), None)
    if first is None:
        return np.empty((0, width), np.uint8)
    stride = first[3] - lo
    values = strings(data, first[2], first[3])
    if [len(value) for value in values] != [width] or (hi - lo) % stride:
        raise Malformed(f"byte {lo}: frames that aren't each one value of {width} bytes")
    table = np.frombuffer(take(data, lo, hi), np.uint8).reshape(-1, stride)
    head = stride - width
    if first[0] != 1 or not data.endswith(values[0], lo, lo + stride) or (table[:, :head] != table[0, :head]).any():
        raise Malformed(f"byte {lo}: frames that aren't each one value of {width} bytes")
    return table[:, head:]


def _values(data: bytes, lo: int, hi: int, kind: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a Feature's list; it must be of the kind."""
    for number, wire, a, b in fields(data, lo, hi):
        if number in (_BYTES_LIST, _FLOAT_LIST, _INT64_LIST):
            if number != kind or wire != BYTES:
                raise Malformed(f"byte {lo}: a list of another type")
            yield from fields(data, a, b)
