"""YouTube-8M: videos as TFRecord files, one vector a video, or one of bytes a frame (research.google.com/youtube8m).

A record of the video level is a tf.train.Example with `labels`, `id`, `mean_rgb` and `mean_audio`; one of the frame
level is a SequenceExample with `labels` and `id` in its context and the lists `rgb` and `audio`, a string of bytes for
each frame. Where there is only picture or only sound, that is taken.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dpnn.data.labels import Lists
from dpnn.data.pack import protobuf
from dpnn.data.pack.extents import as_extents
from dpnn.data.pack.parts import reading
from dpnn.data.pack.source import Source, Split
from dpnn.data.pack.tfrecord import TFRecords, scan
from dpnn.errors import DataError

Array = NDArray[Any]

CLASSES = 3862
PARTS = {"train": "train", "test": "validate"}

_VIDEO, _FRAMES = (b"mean_rgb", b"mean_audio"), (b"rgb", b"audio")
"""The features of each level, in the order in which they are joined."""
_CONTEXT, _LISTS = 1, 2
"""Fields of a SequenceExample; the one of an Example is like the first."""
_HEAD = 8192
"""What is read of a record to list it: the whole vector of a video, or the labels before its frames."""
_THREADS = 16
"""Files that are listed at a time: listing waits for the disk."""


def read_youtube8m(path: Path, num_classes: int = CLASSES) -> Source:
    """One file; or a folder of train*.tfrecord, and validate*.tfrecord, which become the test part.

    DataError naming file and byte of what is wrong. Files are listed without reading the frames.
    """
    found = {"train": [path]} if path.is_file() else _files(path)
    layout = _layout(found["train"][0])
    splits: list[Split] = []
    first = 0
    for name, paths in found.items():
        with ThreadPoolExecutor(_THREADS) as threads:
            listed = list(threads.map(lambda path: _list(path, num_classes), paths))
        files = np.repeat(np.arange(len(paths), dtype=np.int32), [len(part.labels) for part in listed])
        offsets = np.concatenate([part.offsets for part in listed])
        lengths = np.concatenate([part.lengths for part in listed])
        records = VideoRecords(paths, files, offsets, lengths)
        videos = Frames(records, layout) if layout.frames else Videos(records, layout)
        ids = np.arange(first, first + len(records), dtype=np.uint64)
        splits.append(Split(name, videos, Lists.join([part.labels for part in listed]), ids))
        first += len(records)
    unlabelled = [] if path.is_file() else sorted(path.glob("test*.tfrecord"))
    left_out = tuple((str(path), "the test part of YouTube-8M has no labels") for path in unlabelled)
    return Source(splits, num_classes, left_out=left_out)


@dataclass(frozen=True)
class Layout:
    """What the records of a data set hold: the level, and the widths of its features by name."""

    frames: bool
    widths: dict[bytes, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a video's vector, or of a frame."""
        return (sum(self.widths.values()),)

    def ranges(self, data: bytes) -> list[tuple[int, int]]:
        """Where the features lie in a record. Malformed where one is missing."""
        found = _features(data, self.frames)
        for name in self.widths:
            if name not in found:
                raise protobuf.Malformed(f"no feature {name.decode()!r}")
        return [found[name] for name in self.widths]


class VideoRecords(TFRecords):
    """Records that a person knows by the `id` of the video too."""

    def name(self, number: int) -> str:
        """File, place in it, and the `id` of the video, where that can be read."""
        where, nbytes = super().name(number), int(self.lengths[number])
        try:
            data = self.read_bytes(int(self.files[number]), int(self.offsets[number]), nbytes)
            place = _feature(data, nbytes, b"id")
            found = b"".join(protobuf.strings(data, *place)) if place else b""
        except (DataError, OSError, protobuf.Malformed):
            found = b""
        return where + (f", video {found.decode('ascii', 'backslashreplace')}" if found else "")


class Videos:
    """Videos of the video level: float32 (1152,), the mean of the pictures, then of the sound."""

    dtype = np.dtype(np.float32)

    def __init__(self, records: VideoRecords, layout: Layout) -> None:
        self._records, self._layout, self.shape = records, layout, layout.shape

    def read(self, numbers: Array) -> Array:
        """Some videos, (n, 1152); DataError naming file and byte of what is wrong with one."""
        return np.stack([self._read(int(number)) for number in numbers])

    def _read(self, number: int) -> Array:
        data = self._records.read(number)
        try:
            features = [protobuf.numbers(data, *place) for place in self._layout.ranges(data)]
        except protobuf.Malformed as error:
            raise DataError(f"{self.name(number)}: {error}") from error
        if [len(feature) for feature in features] != [*self._layout.widths.values()]:
            found = " and ".join(str(len(feature)) for feature in features)
            raise DataError(f"{self.name(number)}: not as many numbers as the first video has ({found})")
        video = np.concatenate(features)
        if not np.isfinite(video).all():
            raise DataError(f"{self.name(number)}: a number that isn't finite")
        return video

    def name(self, number: int) -> str:
        """The file, the place in it, and what the data set calls the video."""
        return self._records.name(number)


class Frames:
    """Videos of the frame level: a record is T frames, each uint8 (1152,), picture, then sound."""

    codec: Literal["image", "frames"] = "frames"

    def __init__(self, records: VideoRecords, layout: Layout) -> None:
        self._records, self._layout, self.shape = records, layout, layout.shape
        self.nbytes = records.nbytes

    def read(self, number: int) -> bytes:
        """The frames of a video, end to end; DataError naming file and byte of what is wrong."""
        data = self._records.read(number)
        try:
            places = zip(self._layout.ranges(data), self._layout.widths.values(), strict=True)
            features = [protobuf.rows(data, *place, width) for place, width in places]
        except protobuf.Malformed as error:
            raise DataError(f"{self.name(number)}: {error}") from error
        counts = [len(feature) for feature in features]
        if len(set(counts)) > 1 or not counts[0]:
            found = " and ".join(map(str, counts))
            raise DataError(f"{self.name(number)}: no frames, or not as many of each feature ({found})")
        return np.concatenate(features, axis=1).tobytes()

    def name(self, number: int) -> str:
        """The file, the place in it, and what the data set calls the video."""
        return self._records.name(number)


@dataclass(frozen=True)
class _Listed:
    """Where the records of a file lie, int64 (n,), and their labels."""

    offsets: Array
    lengths: Array
    labels: Lists


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of each part that is there."""
    found = {part: sorted(folder.glob(f"{prefix}*.tfrecord")) for part, prefix in PARTS.items()}
    if not found["train"]:
        raise DataError(f"{folder} holds no train*.tfrecord; name such a folder, or one .tfrecord file")
    return {part: paths for part, paths in found.items() if paths}


def _layout(path: Path) -> Layout:
    """The level, and the widths that the first record has."""
    with reading(path):
        offset, nbytes, _ = next(scan(path, 0))
        data = _record(path, offset, nbytes).read(0)
    where = f"{path}, byte {offset}"
    try:
        frames = any(number == _LISTS for number, *_ in protobuf.fields(data, 0, nbytes))
        found = _features(data, frames)
        widths = {}
        for name in _FRAMES if frames else _VIDEO:
            if name in found and frames:
                first = next(protobuf.parts(data, *found[name], 1), None)
                widths[name] = len(b"".join(protobuf.strings(data, *first))) if first else 0
            elif name in found:
                widths[name] = len(protobuf.numbers(data, *found[name]))
    except protobuf.Malformed as error:
        raise DataError(f"{where}: {error}, so it is no record of YouTube-8M") from error
    if not sum(widths.values()):
        names = b" or ".join(_FRAMES if frames else _VIDEO).decode()
        raise DataError(f"{where}: no feature {names}, so it is no record of YouTube-8M")
    return Layout(frames, widths)


def _list(path: Path, num_classes: int) -> _Listed:
    """List one file."""
    extents, labels = [], []
    with reading(path):
        for offset, nbytes, head in scan(path, _HEAD):
            extents.append((0, offset, nbytes))
            labels.append(_labels(path, offset, nbytes, head, num_classes))
    indptr = np.concatenate(([0], np.cumsum([len(classes) for classes in labels])))
    _, offsets, lengths = as_extents(extents)
    return _Listed(offsets, lengths, Lists(indptr, np.array(list(chain.from_iterable(labels)), np.int32)))


def _labels(path: Path, offset: int, nbytes: int, head: bytes, num_classes: int) -> list[int]:
    """The classes of a record, rising; none of a damaged one, which is told when it is read to be packed."""
    try:
        return _classes(head, nbytes, num_classes)
    except protobuf.Malformed:  # also where the labels lie behind the head
        try:
            data = _record(path, offset, nbytes).read(0)
        except DataError:
            return []
    try:
        return _classes(data, nbytes, num_classes)
    except protobuf.Malformed as error:
        raise DataError(f"{path}, byte {offset}: {error}") from error


def _classes(data: bytes, nbytes: int, num_classes: int) -> list[int]:
    """The classes that stand in the beginning of a record of `nbytes`."""
    place = _feature(data, nbytes, b"labels")
    if place is None:
        raise protobuf.Malformed("no feature 'labels', so it is no record of YouTube-8M's labelled parts")
    classes = sorted(set(protobuf.integers(data, *place)))
    if classes and not 0 <= classes[0] <= classes[-1] < num_classes:
        wrong = classes[0] if classes[0] < 0 else classes[-1]
        raise protobuf.Malformed(f"label {wrong} is not in 0..{num_classes - 1}; is the number of classes right?")
    return classes


def _feature(data: bytes, nbytes: int, name: bytes) -> tuple[int, int] | None:
    """Where a feature of an Example, or of the context of a SequenceExample, lies."""
    for start, end in protobuf.parts(data, 0, nbytes, _CONTEXT):
        for key, lo, hi in protobuf.entries(data, start, end):
            if key == name:
                return lo, hi
    return None


def _features(data: bytes, frames: bool) -> dict[bytes, tuple[int, int]]:
    """Where what is learned from lies in a whole record, by name."""
    places = protobuf.parts(data, 0, len(data), _LISTS if frames else _CONTEXT)
    return {key: (lo, hi) for start, end in places for key, lo, hi in protobuf.entries(data, start, end)}


def _record(path: Path, offset: int, nbytes: int) -> TFRecords:
    """One record, as it is read and checked."""
    return TFRecords([path], *as_extents([(0, offset, nbytes)]))
