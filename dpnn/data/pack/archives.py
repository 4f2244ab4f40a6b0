"""Pictures in tars, which stay packed: a tar for each class, those tars in one more, or one tar of CLASS/PICTURE.

SOURCE is such a tar, or a folder of CLASS.tar; SOURCE/train and SOURCE/test (or val, validation), or SOURCE/train.tar
and so on, where there are two parts. So the ImageNet of 22,000 classes comes, as a folder or a tar of nXXXXXXXX.tar.
"""

import itertools
from array import array
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.pack.parts import Part, as_source, find_parts, reading
from dpnn.data.pack.source import Source
from dpnn.data.pack.tar import Member, TarRecords, members
from dpnn.errors import DataError

Array = NDArray[Any]

_READERS = 16
"""Threads, since the headers of a large tar are far apart, and a cold disk answers many reads at a time."""


def holds_tars(path: Path) -> bool:
    """Whether there are tars at a path, or in a folder train in it."""
    return path.suffix == ".tar" or any(any(path.glob(f"{folder}*.tar")) for folder in ("", "train/"))


def read_archives(source: Path) -> Source:
    """The parts of the source; DataError naming the tar of what is wrong."""
    with reading(source):
        parts = find_parts(source, ".tar") if source.is_dir() else {"train": source}
        return as_source({name: list_part(path) for name, path in parts.items()}, source)


def list_part(path: Path) -> Part:
    """The classes and pictures of one part."""
    if path.is_dir():
        tars = [tar for tar in path.glob("*.tar") if not tar.name.startswith(".")]
        if not tars:
            raise DataError(f"{path} holds no tars; it must hold CLASS.tar for each class")
        return _of_tars([(tar, Member(tar.name, 0, tar.stat().st_size)) for tar in tars])
    first = next(members(path), None)
    if first is None:
        raise DataError(f"{path} is an empty tar; copy it again")
    if not first.name.endswith(".tar"):
        return _of_folders(path)
    inner = list(members(path))
    for member in inner:
        if not member.name.endswith(".tar"):
            raise DataError(f"{path} holds {member.name!r} beside tars; each of its members must be CLASS.tar")
    return _of_tars([(path, member) for member in inner])


def list_flat(path: Path) -> tuple[list[str], TarRecords]:
    """The pictures of a tar in the order of their names, and the names."""
    found = sorted(members(path))
    offsets, lengths = as_arrays(found, path)
    return [member.name for member in found], TarRecords([path], np.zeros(len(found), np.int32), offsets, lengths)


def as_arrays(found: Iterable[Member], where: object) -> tuple[Array, Array]:
    """Offsets and lengths, int64; DataError where two members have the same name. 24 bytes a member while it runs."""
    offsets, lengths, keys = array("q"), array("q"), array("q")
    for member in found:
        offsets.append(member.offset)
        lengths.append(member.nbytes)
        keys.append(hash(member.name))
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(np.diff(np.asarray(keys)[order]) == 0)
    if len(same):
        first, second = (offsets[order[same[0] + i]] for i in range(2))
        raise DataError(f"{where}: the members at bytes {first} and {second} have the same name; remove one of them")
    return np.array(offsets, np.int64), np.array(lengths, np.int64)


def _of_tars(tars: list[tuple[Path, Member]]) -> Part:
    """A part of a tar for each class: in which file it lies, and where."""
    tars.sort(key=lambda tar: _class(tar[1].name))
    names = [_class(member.name) for _, member in tars]
    for name, following in itertools.pairwise(names):
        if name == following:
            raise DataError(f"{tars[0][0]} holds two tars of the class {name!r}; remove one of them")

    def list_class(tar: tuple[Path, Member]) -> tuple[Array, Array]:
        path, (name, offset, nbytes) = tar
        return as_arrays(members(path, offset, offset + nbytes), f"{path}, {name}")

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(list_class, tars))
    offsets, lengths = (np.concatenate([each[i] for each in found]) for i in range(2))
    place = np.repeat(np.arange(len(tars), dtype=np.int32), [len(each[0]) for each in found])
    paths = list(dict.fromkeys(path for path, _ in tars))
    file = {path: i for i, path in enumerate(paths)}
    files = np.array([file[path] for path, _ in tars], np.int32)[place]
    return Part(names, place, TarRecords(paths, files, offsets, lengths))


def _class(name: str) -> str:
    """What a class is called by the name of its tar, or of its folder."""
    return PurePosixPath(name).name.removesuffix(".tar")


def _of_folders(path: Path) -> Part:
    """A part of one tar of CLASS/PICTURE."""
    numbers: dict[str, int] = {}
    places = array("i")

    def placed() -> Iterable[Member]:
        for member in members(path):
            folder, _, _ = member.name.rpartition("/")
            if folder in ("", "."):
                raise DataError(f"{path}: {member.name!r} lies in no folder, so it has no class; name it CLASS/PICTURE")
            places.append(numbers.setdefault(folder, len(numbers)))
            yield member

    offsets, lengths = as_arrays(placed(), path)
    names = [_class(folder) for folder in numbers]
    order = sorted(range(len(names)), key=names.__getitem__)
    for a, b in itertools.pairwise(order):
        if names[a] == names[b]:
            folders = list(numbers)
            raise DataError(
                f"{path} holds the class {names[a]!r} twice, in {folders[a]!r} and in {folders[b]!r}; make a tar for "
                f"each part, train.tar and test.tar"
            )
    rank = np.argsort(order).astype(np.int32)  # of each folder, by its class's name
    place = rank[np.asarray(places)]
    by_class = np.argsort(place, kind="stable")
    records = TarRecords([path], np.zeros(len(place), np.int32), offsets[by_class], lengths[by_class])
    return Part([names[i] for i in order], place[by_class], records)
