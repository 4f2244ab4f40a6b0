"""A folder of pictures a class: SOURCE/train/CLASS/PICTURE and SOURCE/test/CLASS/PICTURE, or SOURCE/CLASS/PICTURE.

The test part may also be named val or validation. Classes are numbered in the order of their names. All that lies in a
class's folder is taken for a picture, except hidden files: what turns out to be none is rejected when it is packed.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dpnn.data.pack.files import Files, Names
from dpnn.data.pack.parts import Part, as_source, find_parts, reading
from dpnn.data.pack.source import Source
from dpnn.errors import DataError

_LISTERS = 16
"""Threads, since a parallel file system takes its time for each folder, but answers many at a time."""


def read_images(source: Path) -> Source:
    """The parts of the folder; DataError naming the folder of what is wrong."""
    with reading(source):
        return as_source({name: _list_part(folder) for name, folder in find_parts(source).items()}, source)


def _list_part(folder: Path) -> Part:
    classes = _classes(folder)
    folders = [folder / name for name in classes]
    with ThreadPoolExecutor(_LISTERS) as pool:
        names = Names(pool.map(_list, folders))
    place = np.repeat(np.arange(len(folders), dtype=np.int32), names.counts)
    return Part(classes, place, Files(folders, place, names))


def _classes(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in names:
        if not name.isprintable():  # what isn't UTF-8 among others
            raise DataError(f"{folder} holds the folder {name!a}, which can't be the name of a class; rename it")
    if not names:
        raise DataError(f"{folder} holds no folders; it must hold a folder of pictures for each class")
    return names


def _list(folder: Path) -> bytes:
    """The names of the pictures in a class's folder, sorted, a zero byte behind each."""
    names = []
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                raise DataError(
                    f"{folder} holds the folder {os.fsdecode(entry.name)!r}; the pictures of a class lie in its folder "
                    f"itself, SOURCE/CLASS/PICTURE or SOURCE/train/CLASS/PICTURE"
                )
            names.append(entry.name + b"\0")
    return b"".join(sorted(names))
