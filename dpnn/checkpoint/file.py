"""One file of a checkpoint: HDF5 with a tail behind it, so that damage is seen before HDF5 sees the file."""

import contextlib
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import msgspec
import numpy as np
from isal.isal_zlib import crc32

from dpnn.checkpoint.contents import Array
from dpnn.data.durable import replacing
from dpnn.errors import DataError

FORMAT = "dpnn-checkpoint"
VERSION = 1
INFO = "info.h5"
"""The file that makes a folder a checkpoint."""
WAY_OUT = "use another checkpoint"
_MAGIC = b"dpnnTAIL"
_END = struct.Struct("<II8s")


@dataclass(frozen=True, eq=False)
class Dataset:
    """What is written as one: an array by its path in the file; `shape`: of the whole, where it is a slice of one."""

    name: str
    array: Array
    shape: tuple[int, ...] | None = None


class _Tail(msgspec.Struct, frozen=True):
    """`payloads`: offset and length in bytes of each dataset; `crc32`: of the rest of the HDF5 file of `nbytes`."""

    payloads: list[tuple[int, int]]
    nbytes: int
    crc32: int


def write_file(path: Path, datasets: Iterable[Dataset], **attributes: int) -> None:
    """Write a file, read it again, and give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        payloads = _write_hdf5(temporary, datasets, attributes)
        _append_tail(temporary, payloads)
        with opened(temporary) as file:
            for name in dataset_names(file):
                verified(file, name)


def _write_hdf5(path: Path, datasets: Iterable[Dataset], attributes: Mapping[str, int]) -> list[tuple[int, int]]:
    """The HDF5 file; where the bytes of its datasets lie in it."""
    payloads = []
    with h5py.File(path, "w", locking=False, libver=("v110", "v110")) as file:
        file.attrs.update(format=np.bytes_(FORMAT), version=VERSION, **attributes)
        for one in datasets:
            array = np.asarray(one.array, order="C")
            dataset = file.create_dataset(one.name, data=array)
            dataset.attrs["crc32"] = np.uint32(_crc32(array))
            if one.shape is not None:
                dataset.attrs["shape"] = np.array(one.shape, np.int64)
            if array.nbytes:
                payloads.append((dataset.id.get_offset(), array.nbytes))
        file.attrs["complete"] = 1
    return sorted(payloads)


def encoded(info: dict[str, Any]) -> Dataset:
    return Dataset("info", np.frombuffer(msgspec.json.encode(info), np.uint8))


def _append_tail(path: Path, payloads: list[tuple[int, int]]) -> None:
    """Write the tail behind the HDF5 file, and all of it to the disk."""
    with path.open("r+b") as file:
        nbytes = file.seek(0, os.SEEK_END)
        tail = msgspec.json.encode(_Tail(payloads, nbytes, _crc32_outside(file, payloads, nbytes)))
        file.seek(nbytes)
        file.write(tail + _END.pack(len(tail), crc32(tail), _MAGIC))
        file.flush()
        os.fsync(file.fileno())
        # So that it is read again from the disk, not from memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
