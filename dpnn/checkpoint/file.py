"""One file of a checkpoint: HDF5 with a tail behind it, so that damage is seen before HDF5 sees the file."""

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import h5py
import msgspec
import numpy as np
from isal.isal_zlib import crc32

from dpnn.checkpoint.contents import Array
from dpnn.errors import DataError

FORMAT = "dpnn-checkpoint"
VERSION = 1
INFO = "info.h5"
"""The file that makes a folder a checkpoint."""
WAY_OUT = "use another checkpoint"
_MAGIC = b"dpnnTAIL"
_END = struct.Struct("<II8s")


class _Tail(msgspec.Struct, frozen=True):
    """`payloads`: offset and length in bytes of each dataset; `crc32`: of the rest of the HDF5 file of `nbytes`."""

    payloads: list[tuple[int, int]]
    nbytes: int
    crc32: int


def tail(payloads: list[tuple[int, int]], nbytes: int, crc: int) -> bytes:
    """What stands behind the HDF5 file; the arguments as in _Tail."""
    told = msgspec.json.encode(_Tail(payloads, nbytes, crc))
    return told + _END.pack(len(told), crc32(told), _MAGIC)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file, verified save for the datasets' bytes; whatever it can't give is a DataError."""
    try:
        _check_metadata(path)
        with h5py.File(path, "r", locking=False) as file:
            found, version = file.attrs["format"].decode(), file.attrs["version"]
            if (found, version, file.attrs["complete"]) != (FORMAT, VERSION, 1):
                raise DataError(
                    f"{path} has the format {found} {version}, wanted is {FORMAT} {VERSION}; "
                    "read it with the version of dpnn that wrote it"
                )
            yield file
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} can't be read ({reason(error)}); {WAY_OUT}") from error


def dataset_names(file: h5py.File) -> list[str]:
    """Every dataset by its path in the file."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def verified(file: h5py.File, name: str) -> Array:
    """A dataset by its path in the file; DataError where its bytes are damaged."""
    array = np.asarray(file[name][()])
    if _crc32(array) != file[name].attrs["crc32"]:
        raise damaged(file.filename, name)
    return array


def damaged(path: Path | str, name: str) -> DataError:
    """Of a dataset whose bytes aren't those that were written."""
    return DataError(f"{path}: the bytes of {name} are damaged (crc32); {WAY_OUT}")


def _check_metadata(path: Path) -> None:
    """DataError where the file is cut short, or differs outside its datasets' bytes from what was written."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END.size))
        end = file.read()
        length, crc, magic = _END.unpack(end) if len(end) == _END.size else (0, 0, b"")
        if magic != _MAGIC or length > size - _END.size:
            raise DataError(f"{path} is cut short, or is no checkpoint of dpnn ({size} bytes); {WAY_OUT}")
        file.seek(size - _END.size - length)
        encoded = file.read(length)
        if crc32(encoded) == crc:
            tail = msgspec.json.decode(encoded, type=_Tail)
            whole = tail.nbytes + length + _END.size == size
            if whole and _crc32_outside(file, tail.payloads, tail.nbytes) == tail.crc32:
                return
        raise DataError(f"{path}: the metadata are damaged (crc32); {WAY_OUT}")


def _crc32_outside(file: BinaryIO, payloads: list[tuple[int, int]], nbytes: int) -> int:
    """Of the first `nbytes` of a file without the `payloads`, which are in order."""
    crc = at = 0
    for offset, length in [*payloads, (nbytes, 0)]:
        file.seek(at)
        crc = crc32(file.read(offset - at), crc)
        at = offset + length
    return crc


def _crc32(array: Array) -> int:
    return crc32(array.reshape(-1).view(np.uint8))


def reason(error: Exception) -> str:
    """In one line: HDF5 tells the system's word for it among much else."""
    told = re.search(r"error message = '([^']*)'", str(error))
    return told[1] if told else getattr(error, "strerror", None) or str(error)
