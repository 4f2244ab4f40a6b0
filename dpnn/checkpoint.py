"""Checkpoints: all that a run needs to go on, by parameter name, whole and independent of ranks, backend and mesh.

`step-000000123.h5` is plain HDF5: `params/NAME`, `optimizer/STATE/NAME`, `info` (JSON), attributes `format`, `version`,
`epoch`, `step`, `steps` and, last, `complete`. Each dataset is contiguous and has the attribute `crc32` of its bytes.
HDF5 itself can crash or hang on damaged metadata. So behind the HDF5 file, where its readers don't look, stands a tail
that says where the datasets' bytes lie and what the crc32 of all others is; that is checked before HDF5 sees the file:
    JSON of _Tail · its length and its crc32, uint32 each, little-endian · 8 bytes of magic
"""

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import msgspec
import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from dpnn.data.durable import replacing
from dpnn.errors import DataError, NotFiniteError

Array = NDArray[Any]

FORMAT = "dpnn-checkpoint"
VERSION = 1
_MAGIC = b"dpnnTAIL"
_WAY_OUT = "use another checkpoint"
_END = struct.Struct("<II8s")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run between two steps.

    `params`: arrays by parameter name. `optimizer`: the same by name of its state. `epoch`, `step`: the next step,
    within its epoch. `steps`: taken since the start. `info`: what JSON can hold (seed, lanes, job, versions).
    """

    params: dict[str, Array]
    optimizer: dict[str, dict[str, Array]]
    epoch: int
    step: int
    steps: int
    info: dict[str, Any] = field(default_factory=dict)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """All arrays by their path in the file."""
        for name, array in self.params.items():
            yield f"params/{name}", array
        for state, arrays in self.optimizer.items():
            for name, array in arrays.items():
                yield f"optimizer/{state}/{name}", array


class _Tail(msgspec.Struct, frozen=True):
    """`payloads`: offset and length in bytes of each dataset; `crc32`: of the rest of the HDF5 file of `nbytes`."""

    payloads: list[tuple[int, int]]
    nbytes: int
    crc32: int


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into `folder`, and only when it is safe there, delete all but the `keep` newest up to it.

    NotFiniteError, and nothing is written, where a number isn't finite; DataError where the folder or the disk doesn't
    take it, and the older checkpoints stay.
    """
    for name, array in checkpoint.arrays():
        if not (np.isfinite(array.min(initial=0.0)) and np.isfinite(array.max(initial=0.0))):
            raise NotFiniteError(
                f"{name} is no longer finite after step {checkpoint.steps}; no checkpoint is written: "
                "go on from an earlier one with a smaller optimizer.lr"
            )
    path = folder / f"step-{checkpoint.steps:09d}.h5"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            payloads = _write_hdf5(temporary, checkpoint)
            _append_tail(temporary, payloads)
            with _opened(temporary) as file:
                for _ in _verified_arrays(file):
                    pass
    except (OSError, RuntimeError, DataError) as error:
        raise DataError(
            f"the checkpoint {path} can't be written ({_reason(error)}); "
            "earlier ones are unharmed: make room there or set output.dir, then go on with --resume"
        ) from error
    _prune(folder, path, keep)
    return path


def read(path: Path) -> Checkpoint:
    """The checkpoint in a file, all of it verified; DataError naming the file and what is wrong with it."""
    with _opened(path) as file:
        arrays = dict(_verified_arrays(file))
        epoch, step, steps = (int(file.attrs[key]) for key in ("epoch", "step", "steps"))
    info = msgspec.json.decode(arrays.pop("info").tobytes())
    params: dict[str, Array] = {}
    optimizer: dict[str, dict[str, Array]] = {}
    for place, array in arrays.items():
        kind, *state, name = place.split("/")
        into = params if kind == "params" else optimizer.setdefault(state[0], {})
        into[name] = array
    return Checkpoint(params, optimizer, epoch, step, steps, info)


def newest(folder: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest good checkpoint of a folder, and what is wrong with newer ones; None where there is no checkpoint.

    DataError where none of them is good.
    """
    damaged: list[str] = []
    for path in reversed(_listed(folder)):
        try:
            return path, read(path), damaged
        except DataError as error:
            damaged.append(str(error))
    if damaged:
        raise DataError(f"no checkpoint in {folder} is good, start anew: {'; '.join(damaged)}")
    return None


def _write_hdf5(path: Path, checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """The HDF5 file; where the bytes of its datasets lie in it."""
    payloads = []
    with h5py.File(path, "w", locking=False, libver=("v110", "v110")) as file:
        file.attrs.update(
            format=np.bytes_(FORMAT), version=VERSION,
            epoch=checkpoint.epoch, step=checkpoint.step, steps=checkpoint.steps,
        )  # fmt: skip
        info = np.frombuffer(msgspec.json.encode(checkpoint.info), np.uint8)
        for name, array in [("info", info), *checkpoint.arrays()]:
            array = np.asarray(array, order="C")
            dataset = file.create_dataset(name, data=array)
            dataset.attrs["crc32"] = np.uint32(_crc32(array))
            if array.nbytes:
                payloads.append((dataset.id.get_offset(), array.nbytes))
        file.attrs["complete"] = 1
    return sorted(payloads)


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
def _opened(path: Path) -> Iterator[h5py.File]:
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
        raise DataError(f"{path} can't be read ({_reason(error)}); {_WAY_OUT}") from error


def _verified_arrays(file: h5py.File) -> Iterator[tuple[str, Array]]:
    """Every dataset by its path in the file; DataError naming one whose bytes are damaged."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    for name in names:
        array = np.asarray(file[name][()])
        if _crc32(array) != file[name].attrs["crc32"]:
            raise DataError(f"{file.filename}: the bytes of {name} are damaged (crc32); {_WAY_OUT}")
        yield name, array


def _check_metadata(path: Path) -> None:
    """DataError where the file is cut short, or differs outside its datasets' bytes from what was written."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END.size))
        end = file.read()
        length, crc, magic = _END.unpack(end) if len(end) == _END.size else (0, 0, b"")
        if magic != _MAGIC or length > size - _END.size:
            raise DataError(f"{path} is cut short, or is no checkpoint of dpnn ({size} bytes); {_WAY_OUT}")
        file.seek(size - _END.size - length)
        encoded = file.read(length)
        if crc32(encoded) == crc:
            tail = msgspec.json.decode(encoded, type=_Tail)
            whole = tail.nbytes + length + _END.size == size
            if whole and _crc32_outside(file, tail.payloads, tail.nbytes) == tail.crc32:
                return
        raise DataError(f"{path}: the metadata are damaged (crc32); {_WAY_OUT}")


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


def _listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-?????????.h5"))


def _prune(folder: Path, new: Path, keep: int) -> None:
    """Delete older checkpoints than the `keep` newest up to `new`, and what killed writers left behind."""
    older = [path for path in _listed(folder) if path.name < new.name]
    for path in [*older[: max(0, len(older) + 1 - keep)], *folder.glob(".step-*.tmp")]:
        with contextlib.suppress(OSError):
            path.unlink()


def _reason(error: Exception) -> str:
    """In one line: HDF5 tells the system's word for it among much else."""
    told = re.search(r"error message = '([^']*)'", str(error))
    return told[1] if told else getattr(error, "strerror", None) or str(error)
