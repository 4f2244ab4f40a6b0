"""Checkpoints: all that a run needs to go on, by parameter name, whole and independent of ranks, backend and mesh.

`step-000000123.h5` is plain HDF5: `params/NAME`, `optimizer/STATE/NAME`, `info` (JSON), attributes `format`, `version`,
`epoch`, `step`, `steps` and, last, `complete`. Each dataset is contiguous and has the attribute `crc32` of its bytes.
HDF5 itself can crash or hang on damaged metadata. So behind the HDF5 file, where its readers don't look, stands a tail
that says where the datasets' bytes lie and what the crc32 of all others is; that is checked before HDF5 sees the file:
    JSON of _Tail · its length and its crc32, uint32 each, little-endian · 8 bytes of magic

Where nobody holds whole arrays, each of some ranks writes slices of them, and a checkpoint is a folder of such files:
`step-000000123/part-0003-of-0008.h5` has `params/NAME/LO`, `optimizer/STATE/NAME/LO`, the numbers from LO on of the
flattened array, whose attribute `shape` is that of the whole; `info.h5`, the last, has `info` and the attributes. Until
all is there the folder's name is `.step-000000123.tmp`. While a folder takes the place of one of the same step, the old
one's name is `step-000000123.old`.
"""

import contextlib
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import msgspec
import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from dpnn.data.durable import replacing, sync
from dpnn.errors import DataError, NotFiniteError

Array = NDArray[Any]

FORMAT = "dpnn-checkpoint"
VERSION = 1
INFO = "info.h5"
"""The file that makes a folder a checkpoint."""
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


@dataclass(frozen=True, eq=False)
class Slice:
    """Of the parameter `name`, or a state of it: `array`, flat, the numbers from `lo` on of a whole one of `shape`."""

    name: str
    lo: int
    shape: tuple[int, ...]
    array: Array


@dataclass(frozen=True, eq=False)
class _Dataset:
    """What is written as one: an array by its path in the file; `shape`: of the whole, where it is a slice of one."""

    name: str
    array: Array
    shape: tuple[int, ...] | None = None


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
    _check_finite(checkpoint.arrays(), checkpoint.steps)
    path = folder / f"{_stem(checkpoint.steps)}.h5"
    datasets = [_encoded(checkpoint.info), *(_Dataset(name, array) for name, array in checkpoint.arrays())]
    with _explaining(path):
        _write(path, datasets, epoch=checkpoint.epoch, step=checkpoint.step, steps=checkpoint.steps)
    _prune(folder, path, keep)
    return path


def write_part(
    folder: Path, steps: int, part: int, parts: int, params: Sequence[Slice], optimizer: Mapping[str, Sequence[Slice]]
) -> None:
    """Write part `part` of `parts` of the checkpoint after `steps`: slices of the parameters and of each state.

    Every number of an array is in one slice of one part. It counts when `complete` has been called after all parts are
    written. NotFiniteError and DataError as `write`.
    """
    slices = [(f"params/{piece.name}", piece) for piece in params]
    slices += [(f"optimizer/{state}/{piece.name}", piece) for state, pieces in optimizer.items() for piece in pieces]
    _check_finite(((name, piece.array) for name, piece in slices), steps)
    path = folder / f".{_stem(steps)}.tmp" / _part_name(part, parts)
    datasets = [_Dataset(f"{name}/{piece.lo}", piece.array, piece.shape) for name, piece in slices]
    with _explaining(path):
        _write(path, datasets, steps=steps, part=part, parts=parts)


def complete(folder: Path, steps: int, parts: int, epoch: int, step: int, info: dict[str, Any], keep: int) -> Path:
    """Make a checkpoint of the parts, all of them written; then delete older ones as `write` does. On one rank.

    DataError where a part is missing, or the folder or the disk doesn't take it; the older checkpoints stay.
    """
    hidden, path = folder / f".{_stem(steps)}.tmp", folder / _stem(steps)
    names = [_part_name(part, parts) for part in range(parts)]
    with _explaining(path):
        for name in names:
            if not (hidden / name).is_file():
                raise DataError(f"{hidden / name} is missing")
        _write(hidden / INFO, [_encoded(info)], epoch=epoch, step=step, steps=steps, parts=parts)
        # What an earlier try left, with another number of parts.
        for stray in hidden.iterdir():
            if stray.name not in (*names, INFO):
                _delete(stray)
        if path.exists():
            # No folder can be replaced at once: in between the old one has another name that readers know.
            _delete(path.with_suffix(".old"))
            path.rename(path.with_suffix(".old"))
        hidden.rename(path)
        sync(folder)
    _prune(folder, path, keep)
    return path


def read(path: Path) -> Checkpoint:
    """The checkpoint in a file or folder, all of it verified; DataError naming the file and what is wrong with it."""
    whole = not path.is_dir()
    with _opened(path if whole else path / INFO) as file:
        if whole and "parts" in file.attrs:
            raise DataError(f"{path} is only a part of a checkpoint; name its folder, {path.parent}")
        arrays = dict(_verified_arrays(file))
        epoch, step, steps = (int(file.attrs[key]) for key in ("epoch", "step", "steps"))
        parts = 0 if whole else int(file.attrs["parts"])
    info = msgspec.json.decode(arrays.pop("info").tobytes())
    params: dict[str, Array] = {}
    optimizer: dict[str, dict[str, Array]] = {}
    for place, array in (arrays if whole else _joined(path, steps, parts)).items():
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


def _check_finite(arrays: Iterable[tuple[str, Array]], steps: int) -> None:
    for name, array in arrays:
        if not (np.isfinite(array.min(initial=0.0)) and np.isfinite(array.max(initial=0.0))):
            raise NotFiniteError(
                f"{name} is no longer finite after step {steps}; no checkpoint is written: "
                "go on from an earlier one with a smaller optimizer.lr"
            )


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Whatever keeps `path` from being written becomes a DataError."""
    try:
        yield
    except (OSError, RuntimeError, DataError) as error:
        raise DataError(
            f"the checkpoint {path} can't be written ({_reason(error)}); "
            "earlier ones are unharmed: make room there or set output.dir, then go on with --resume"
        ) from error


def _write(path: Path, datasets: Iterable[_Dataset], **attributes: int) -> None:
    """Write a file, read it again, and give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        payloads = _write_hdf5(temporary, datasets, attributes)
        _append_tail(temporary, payloads)
        with _opened(temporary) as file:
            for _ in _verified_arrays(file):
                pass


def _write_hdf5(path: Path, datasets: Iterable[_Dataset], attributes: Mapping[str, int]) -> list[tuple[int, int]]:
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


def _encoded(info: dict[str, Any]) -> _Dataset:
    return _Dataset("info", np.frombuffer(msgspec.json.encode(info), np.uint8))


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


def _joined(folder: Path, steps: int, parts: int) -> dict[str, Array]:
    """The whole arrays by their path, of the slices in all parts; DataError naming a part that doesn't fit."""
    found: dict[str, list[tuple[Slice, Path]]] = {}
    for path in (folder / _part_name(part, parts) for part in range(parts)):
        with _opened(path) as file:
            if file.attrs["steps"] != steps:
                raise DataError(f"{path} is of step {file.attrs['steps']}, not {steps}; {_WAY_OUT}")
            for place, array in _verified_arrays(file):
                name, lo = place.rsplit("/", 1)
                shape = tuple(int(n) for n in file[place].attrs["shape"])
                found.setdefault(name, []).append((Slice(name, int(lo), shape, array), path))
    # Slices are dropped as soon as they are joined, so that the memory isn't needed twice.
    return {name: _join(found.pop(name)) for name in list(found)}


def _join(slices: list[tuple[Slice, Path]]) -> Array:
    """A whole array of its slices, and of the files that they come from; DataError where they don't make one."""
    slices.sort(key=lambda item: (item[0].lo, item[0].array.size))
    first, end = slices[0][0], 0
    for piece, path in slices:
        if (piece.shape, piece.array.dtype) != (first.shape, first.array.dtype):
            raise DataError(f"{path}: {piece.name} has another shape or type than in other parts; {_WAY_OUT}")
        if piece.lo != end:
            what = "there is a gap" if piece.lo > end else "parts overlap"
            raise DataError(f"{path}: {piece.name} goes on at {piece.lo}, not at {end}: {what}; {_WAY_OUT}")
        end += piece.array.size
    if end != math.prod(first.shape):
        raise DataError(f"{path}: {first.name} ends at {end}, not at {math.prod(first.shape)}; {_WAY_OUT}")
    return np.concatenate([piece.array for piece, _ in slices]).reshape(first.shape)


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


def _stem(steps: int) -> str:
    return f"step-{steps:09d}"


def _part_name(part: int, parts: int) -> str:
    return f"part-{part:04d}-of-{parts:04d}.h5"


def _listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for suffix in ("", ".h5", ".old") for path in folder.glob(f"step-?????????{suffix}"))


def _prune(folder: Path, new: Path, keep: int) -> None:
    """Delete older checkpoints than the `keep` newest up to `new`, what it replaces, and what killed writers left.

    Of steps after `new` nothing is deleted: others may be writing it.
    """
    hidden = [path for path in folder.glob(".step-*.tmp") if path.name[1 : len(new.stem) + 1] <= new.stem]
    replaced = [path for path in _listed(folder) if path.stem == new.stem and path != new]
    older = [path for path in _listed(folder) if path.stem < new.stem]
    for path in [*hidden, *replaced, *older[: max(0, len(older) + 1 - keep)]]:
        _delete(path)


def _delete(path: Path) -> None:
    """A file, or a folder: that is hidden first, lest half of it be taken for a checkpoint. What can't be, stays."""
    with contextlib.suppress(OSError):
        if not path.is_dir():
            path.unlink()
            return
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(path)


def _reason(error: Exception) -> str:
    """In one line: HDF5 tells the system's word for it among much else."""
    told = re.search(r"error message = '([^']*)'", str(error))
    return told[1] if told else getattr(error, "strerror", None) or str(error)
