"""The shard format: a plain HDF5 file whose datasets are contiguous and unfiltered, so that a block is one `pread`.

    raw samples       x (N, *shape) uint8 | float16 | float32
    encoded samples   bytes (total,) uint8, offsets (N + 1,) int64, attribute codec
    one label         y (N,) int32
    several           y_indptr (N + 1,) int64, y_indices int32
    always            id (N,) uint64, block_crc32 uint32: the CRC of each block's part of x or bytes
    attributes        format version num_samples num_classes block uuid, and complete = 1, written last

The payload (x or bytes) is covered by block_crc32, all else in the file by the manifest's digest, which is compared
before HDF5 opens the file. A CRC is zlib's crc32, computed by ISA-L: its rates are in benchmarks/checksum.py.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from dpnn.data.labels import Labels, Lists, label_problems, offset_problems
from dpnn.data.manifest import Content, Shard
from dpnn.data.problems import Problem, listed, refuse
from dpnn.errors import DataError

Array = NDArray[Any]

FORMAT = "dpnn-shard"
VERSION = 1
_CHECKED_NBYTES = 1 << 19
"""Read at a time where a CRC is taken: in the cache it takes a third of the time."""
REPAIR = "copy the shard again, or pack the data again"
_TYPES = {
    name: h5py.h5t.py_create(np.dtype(name).newbyteorder("<"))
    for name in ("uint8", "float16", "float32", "int32", "int64", "uint32", "uint64")
}
_TEXT = h5py.string_dtype()
_TEXT_TYPE = h5py.h5t.py_create(_TEXT)


@dataclass(frozen=True)
class Place:
    """Where a dataset stands in its file: `count` numbers of `dtype` from byte `offset` on."""

    offset: int
    dtype: np.dtype[Any]
    count: int


Layout = dict[str, Place]


@dataclass(frozen=True)
class Index:
    """All of a shard but its payload."""

    labels: Labels
    ids: Array
    """uint64[N]"""
    crcs: Array
    """uint32, one for each block"""
    offsets: Array | None
    """int64[N + 1]: where the records begin in `bytes`; None for raw samples"""
    nbytes: int


@dataclass(frozen=True)
class Outside:
    """The bytes of a file before and behind its payload."""

    head: bytearray
    tail: bytearray
    tail_offset: int

    @property
    def digest(self) -> str:
        """8 hexadecimal digits."""
        return f"{crc32(self.tail, crc32(self.head)):08x}"

    def array(self, place: Place) -> Array:
        """A dataset that is not the payload."""
        data, base = (self.head, 0) if place.offset < len(self.head) else (self.tail, self.tail_offset)
        return np.frombuffer(data, place.dtype, place.count, place.offset - base).copy()


def payload_name(content: Content) -> str:
    """The dataset that holds the samples."""
    return "x" if content.kind == "raw" else "bytes"


def attributes(content: Content, samples: int, uuid: str) -> dict[str, str | int]:
    """What a shard says of itself."""
    codec = {"codec": content.codec} if content.codec else {}
    return {
        "format": FORMAT, "version": VERSION, "num_samples": samples, "num_classes": content.num_classes,
        "block": content.block, "uuid": uuid, **codec, "complete": 1,
    }  # fmt: skip


def open_shard(path: Path) -> int:
    """A file descriptor for reading; DataError where there is no such file."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DataError(f"{path}: the manifest names this shard, but it is missing; {REPAIR}") from error
    except OSError as error:
        raise DataError(f"{path} can't be opened ({error.strerror}); check its permissions, or {REPAIR}") from error


def read_exactly(file: int, out: memoryview, offset: int, path: Path) -> None:
    """Fill `out` from byte `offset` on; DataError where the file has become shorter."""
    done = 0
    while done < len(out):
        done += _read_some(file, out[done:], offset + done, path)


def read_checked(file: int, out: memoryview, offset: int, path: Path) -> int:
    """Fill `out` likewise; the CRC of what was read, taken piece by piece while it is in the cache."""
    done = crc = 0
    nbytes = len(out)
    while done < nbytes:
        piece = out[done : done + _CHECKED_NBYTES]
        n = _read_some(file, piece, offset + done, path)
        crc = crc32(piece if n == len(piece) else piece[:n], crc)
        done += n
    return crc


def _read_some(file: int, out: memoryview, offset: int, path: Path) -> int:
    """Read at least a byte into `out`; how many."""
    try:
        n = os.preadv(file, [out], offset)
    except OSError as error:
        raise DataError(f"{path} can't be read at byte {offset} ({error.strerror}); {REPAIR}") from error
    if n == 0:
        raise DataError(f"{path} shrank while being read: nothing at byte {offset}; {REPAIR}")
    return n


def read_outside(file: int, path: Path, shard: Shard) -> Outside:
    """All but the payload; DataError where the size isn't the manifest's."""
    size = os.fstat(file).st_size
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "another file"
        raise DataError(f"{path} has {size} bytes, and the manifest says {shard.bytes}: it is {state}; {REPAIR}")
    end = shard.payload_offset + shard.payload_bytes
    if not 0 <= shard.payload_offset <= end <= size:
        raise DataError(f"{path}: the manifest's payload ends at byte {end} of {size}; pack the data again")
    head, tail = bytearray(shard.payload_offset), bytearray(size - end)
    read_exactly(file, memoryview(head), 0, path)
    read_exactly(file, memoryview(tail), end, path)
    return Outside(head, tail, end)


def check_digest(outside: Outside, path: Path, shard: Shard) -> None:
    """DataError where what surrounds the payload isn't what was packed."""
    if outside.digest != shard.digest:
        raise DataError(
            f"{path}: the labels, ids or metadata are damaged, or it is another file "
            f"(digest {outside.digest}, and the manifest says {shard.digest}); {REPAIR}"
        )


def read_layout(path: Path, content: Content, shard: Shard) -> Layout:
    """Where each dataset stands; DataError naming the attribute or dataset that isn't as the format says."""
    layout, problems = inspect(path, content, shard)
    refuse(problems)
    return layout


def inspect(path: Path, content: Content, shard: Shard) -> tuple[Layout, list[Problem]]:
    """Where each dataset stands that is as the format says, and all attributes and datasets that aren't.

    By HDF5's own calls: a data set may have thousands of shards, and `h5py.File` takes four times as long.
    """
    layout: Layout = {}
    try:
        file = h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, _access())
        try:
            problems = list(_attribute_problems(path, file, attributes(content, shard.samples, shard.uuid)))
            for name, (dtype, shape) in _datasets(content, shard).items():
                found = _place(path, file, name, dtype, shape)
                if isinstance(found, Place):
                    layout[name] = found
                else:
                    problems.append(found)
        finally:
            file.close()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return {}, [Problem(text=f"{path} can't be opened as HDF5 ({error}); {REPAIR}", file=str(path))]
    return layout, problems


def read_index(outside: Outside, layout: Layout, path: Path, content: Content, shard: Shard) -> Index:
    """Labels, ids and checksums; DataError naming dataset and index of what is wrong with them."""
    refuse(payload_problems(layout, path, content, shard))
    index = index_of(outside, layout, content)
    refuse(index_problems(index, path, content, shard))
    return index


def payload_problems(layout: Layout, path: Path, content: Content, shard: Shard) -> Iterator[Problem]:
    """Whether the samples stand where the manifest says."""
    name = payload_name(content)
    offset = layout[name].offset
    if offset != shard.payload_offset:
        text = f"{path}: the payload begins at byte {offset}, and the manifest says {shard.payload_offset}; {REPAIR}"
        yield Problem(text=text, file=str(path), dataset=name)


def index_of(outside: Outside, layout: Layout, content: Content) -> Index:
    """Labels, ids and checksums as they stand in the file, unchecked."""
    arrays = {name: outside.array(place) for name, place in layout.items() if name != payload_name(content)}
    labels = arrays["y"] if content.labels == "single" else Lists(arrays["y_indptr"], arrays["y_indices"])
    nbytes = sum(array.nbytes for array in arrays.values())
    return Index(labels, arrays["id"], arrays["block_crc32"], arrays.get("offsets"), nbytes)


def index_problems(index: Index, path: Path, content: Content, shard: Shard) -> Iterator[Problem]:
    """What is wrong with the labels, the records' places and the ids."""
    file = str(path)
    yield from label_problems(index.labels, content.num_classes, file)
    if index.offsets is not None:
        yield from offset_problems(index.offsets, shard.payload_bytes, file, "offsets", may_be_empty=False)
    ids = np.sort(index.ids)
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        values, first = np.unique(index.ids, return_index=True)

        def tell(place: int) -> Problem:
            text = f"{path}, id[{place}] = {index.ids[place]} stands there twice; pack the data again"
            return Problem(text=text, file=file, dataset="id", index=place)

        yield from listed(np.sort(first[np.isin(values, twice)]), tell)


def block_range(content: Content, shard: Shard, index: Index, block: int) -> tuple[int, int]:
    """Which bytes of the payload are a block's."""
    lo = block * content.block
    hi = min(lo + content.block, shard.samples)
    if index.offsets is not None:
        return int(index.offsets[lo]), int(index.offsets[hi])
    return lo * content.sample_nbytes, hi * content.sample_nbytes


def damage(crc: int, content: Content, index: Index, block: int) -> str | None:
    """What is wrong with a block whose bytes have this CRC; None where they are those that were packed."""
    if crc == index.crcs[block]:
        return None
    lo, hi = block * content.block, min((block + 1) * content.block, len(index.ids))
    return (
        f"the block of the samples {lo} to {hi - 1} is damaged "
        f"(CRC32 {crc:08x}, and block_crc32[{block}] = {index.crcs[block]:08x})"
    )


def refusal(path: Path, content: Content, found: str) -> DataError:
    """For `damage` in a shard."""
    return DataError(f"{path}, {payload_name(content)}: {found}; {REPAIR}")


def _datasets(content: Content, shard: Shard) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """The datasets of a shard: type and shape (None: any number)."""
    n = shard.samples
    datasets: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    if content.kind == "raw":
        datasets["x"] = (content.dtype, (n, *content.shape))
    else:
        datasets |= {"bytes": ("uint8", (shard.payload_bytes,)), "offsets": ("int64", (n + 1,))}
    if content.labels == "single":
        datasets["y"] = ("int32", (n,))
    else:
        datasets |= {"y_indptr": ("int64", (n + 1,)), "y_indices": ("int32", None)}
    return datasets | {"id": ("uint64", (n,)), "block_crc32": ("uint32", (-(-n // content.block),))}


@cache
def _access() -> Any:
    """How HDF5 opens a file: without locking it, which many file systems can't."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_file_locking(False, ignore_when_disabled=False)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    return access


def _attribute_problems(path: Path, file: Any, expected: dict[str, str | int]) -> Iterator[Problem]:
    for name, value in expected.items():
        try:
            attribute = h5py.h5a.open(file, name.encode())
        except KeyError:
            reason = "it was never completed" if name == "complete" else "it is no shard of dpnn's"
            yield Problem(text=f"{path} has no attribute {name!r}: {reason}; {REPAIR}", file=str(path))
            continue
        said = _value(attribute)
        if said != value:
            text = f"{path}: attribute {name} = {said!r} instead of {value!r}; {REPAIR}"
            yield Problem(text=text, file=str(path))


def _value(attribute: Any) -> object:
    """Of an attribute: an int, a str, or, where it is neither, its type by name."""
    kind = attribute.get_type()
    if isinstance(kind, h5py.h5t.TypeIntegerID) and kind.get_size() <= 8 and attribute.shape == ():
        number = np.empty((), np.int64)
        attribute.read(number, h5py.h5t.NATIVE_INT64)
        return int(number)
    if isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str() and attribute.shape == ():
        text = np.empty((), _TEXT)
        attribute.read(text, _TEXT_TYPE)
        return bytes(text.item() or b"").decode(errors="replace")
    return kind.dtype.name


def _place(path: Path, file: Any, name: str, dtype: str, shape: Sequence[int] | None) -> Place | Problem:
    """Where a dataset stands, or what is wrong with it."""

    def wrong(text: str, way_out: str = REPAIR) -> Problem:
        return Problem(text=f"{path}{text}; {way_out}", file=str(path), dataset=name)

    try:
        dataset = h5py.h5d.open(file, name.encode())
    except KeyError:
        return wrong(f" has no dataset {name!r}")
    # HDF5 keeps the byte order in the type: a big-endian dataset is another type.
    counts = dataset.shape
    if dataset.get_type() != _TYPES[dtype]:
        return wrong(f", {name} has the type {dataset.dtype.str} instead of {dtype}")
    if counts != shape and not (shape is None and len(counts) == 1):
        wanted = "one dimension" if shape is None else f"the shape {tuple(shape)}"
        return wrong(f", {name} has the shape {counts} instead of {wanted}")
    offset, count = dataset.get_offset(), math.prod(counts)
    if offset is None and count:  # only what is contiguous, and was written, has one place
        return wrong(f", {name} is not contiguous, or was never written", "pack the data again")
    return Place(offset or 0, np.dtype(dtype).newbyteorder("<"), count)
