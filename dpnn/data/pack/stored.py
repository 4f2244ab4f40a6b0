"""What a shard stores of each sample. Each is read and decoded once here: what can't be is rejected, and not packed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from dpnn.data.decode import BadImage, Room, centre_crop, decode, encode, resize_shorter
from dpnn.data.pack.moments import Moments, merged, moments_of
from dpnn.data.pack.source import Records, Samples, plain
from dpnn.errors import DataError, JobError

Array = NDArray[Any]


class Rejected(msgspec.Struct, frozen=True):
    """A sample that is left out: its number in the source, what a person calls it, and why."""

    number: int
    name: str
    reason: str


@dataclass(frozen=True)
class Part:
    """Some samples, in order, as a shard stores them; without those that are rejected."""

    kept: list[bool]
    samples: Sequence[Any] | Array
    """An array, or a list of bytes."""
    moments: Moments | None
    """None where all are rejected."""
    rejected: list[Rejected] = field(default_factory=list)


class Form(Protocol):
    """How the samples of a source are stored: the fields of a `Content`, and the bytes of a sample, about."""

    kind: Literal["raw", "encoded"]
    codec: Literal["", "image", "frames"]
    shape: tuple[int, ...]
    dtype: str
    nbytes: float
    threads: bool
    """Whether several threads may ask at a time."""

    def part(self, numbers: Array) -> Part:
        """Some samples of the source."""
        ...


def form_of(samples: Samples | Records, shorter_side: int, raw: int) -> Form:
    """How samples are stored; JobError where they are no pictures, and pictures are asked for."""
    if isinstance(samples, Records) and samples.codec == "image":
        return RawPictures(samples, raw) if raw else Pictures(samples, shorter_side)
    if shorter_side or raw:
        option = f"--raw {raw}" if raw else f"--shorter-side {shorter_side}"
        raise JobError(f"{option} is for picture files (JPEG, PNG, ...), and these samples are none; leave it out")
    return Frames(samples) if isinstance(samples, Records) else Arrays(samples)


class Arrays:
    """Arrays, as they are."""

    kind: Literal["raw", "encoded"] = "raw"
    codec: Literal["", "image", "frames"] = ""
    threads = False

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.shape, self.dtype = samples.shape, samples.dtype.name
        self.nbytes = float(math.prod(samples.shape) * samples.dtype.itemsize)

    def part(self, numbers: Array) -> Part:
        """Some samples: read together, or one by one where some are bad."""
        try:
            samples = self._samples.read(numbers)
        except DataError:
            return _one_by_one(self._samples, numbers, self._read)
        except OSError as error:
            raise _unreadable(self._samples, int(numbers[0]), error) from error
        return Part([True] * len(numbers), samples, moments_of(samples))

    def _read(self, number: int) -> tuple[Array, Moments]:
        (sample,) = self._samples.read(np.array([number]))
        return sample, moments_of(sample)


class _OneByOne:
    """Records, each read for itself, by any number of threads."""

    threads = True
    _records: Records

    def part(self, numbers: Array) -> Part:
        """Some samples."""
        return _one_by_one(self._records, numbers, self._read)

    def _read(self, number: int) -> tuple[Any, Moments]:
        """One, as it is stored."""
        raise NotImplementedError


class Pictures(_OneByOne):
    """Picture files as they are; or as smaller JPEGs, where their shorter side is longer than `shorter_side`."""

    kind: Literal["raw", "encoded"] = "encoded"
    codec: Literal["", "image", "frames"] = "image"
    shape: tuple[int, ...] = ()
    dtype = "uint8"

    def __init__(self, records: Records, shorter_side: int) -> None:
        self._records, self._side = records, shorter_side
        self._room = Room()
        self.nbytes = max(records.nbytes, 1.0)

    def _read(self, number: int) -> tuple[bytes, Moments]:
        record = self._records.read(number)
        image = decode(record, room=self._room)
        if self._side and min(image.shape[:2]) > self._side:
            image = resize_shorter(image, self._side)
            record = encode(image)
        return record, moments_of(image)


class RawPictures(_OneByOne):
    """Pictures, decoded, with their shorter side made `size` long, and the square in the middle cut out."""

    kind: Literal["raw", "encoded"] = "raw"
    codec: Literal["", "image", "frames"] = ""
    dtype = "uint8"

    def __init__(self, records: Records, size: int) -> None:
        self._records, self._size = records, size
        self._room = Room()
        self.shape: tuple[int, ...] = (size, size, 3)
        self.nbytes = float(math.prod(self.shape))

    def _read(self, number: int) -> tuple[Array, Moments]:
        image = decode(self._records.read(number), room=self._room)
        square = centre_crop(resize_shorter(image, self._size), self._size).copy()
        return square, moments_of(square)


class Frames(_OneByOne):
    """Frames, as they are."""

    kind: Literal["raw", "encoded"] = "encoded"
    codec: Literal["", "image", "frames"] = "frames"
    dtype = "uint8"

    def __init__(self, records: Records) -> None:
        self._records = records
        self.shape, self.nbytes = records.shape, max(records.nbytes, 1.0)

    def _read(self, number: int) -> tuple[bytes, Moments]:
        record, nbytes = self._records.read(number), math.prod(self.shape)
        if not record or len(record) % nbytes:
            raise DataError(f"its {len(record)} bytes are no frames of {nbytes}")
        return record, moments_of(np.frombuffer(record, np.uint8).reshape(-1, *self.shape))


def _one_by_one(
    source: Samples | Records, numbers: Array, read: Callable[[int], tuple[Array | bytes, Moments]]
) -> Part:
    """Some samples, without those that `read` refuses."""
    kept, samples, moments, rejected = [], [], [], []
    for number in map(int, numbers):
        try:
            sample, of_sample = read(number)
        except (DataError, BadImage) as error:
            name = source.name(number)
            reason = " ".join(str(error).removeprefix(name).lstrip(":, ").split())
            rejected.append(Rejected(number, plain(name), plain(reason)))
            kept.append(False)
        except OSError as error:
            raise _unreadable(source, number, error) from error
        else:
            samples.append(sample)
            moments.append(of_sample)
            kept.append(True)
    stored = np.stack(samples) if samples and isinstance(samples[0], np.ndarray) else samples
    return Part(kept, stored, merged(moments) if moments else None, rejected)


def _unreadable(source: Samples | Records, number: int, error: OSError) -> DataError:
    """Trouble of the machine: no fault of the sample's, so it isn't rejected."""
    return DataError(f"{plain(source.name(number))} can't be read ({error}); give the same command again to go on")
