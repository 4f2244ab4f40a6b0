"""A folder of pictures a class: SOURCE/train/CLASS/PICTURE and SOURCE/test/CLASS/PICTURE, or SOURCE/CLASS/PICTURE.

The test part may also be named val or validation. Classes are numbered in the order of their names. All that lies in a
class's folder is taken for a picture, except hidden files: what turns out to be none is rejected when it is packed.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dpnn.data.pack.files import Files, Names
from dpnn.data.pack.parts import find_parts, number_classes, reading
from dpnn.data.pack.source import Source, Split
from dpnn.errors import DataError

_LISTERS = 16
"""Threads, since a parallel file system takes its time for each folder, but answers many at a time."""


def read_images(source: Path) -> Source:
    """The parts of the folder; DataError naming the folder of what is wrong."""
    with reading(source):
        parts = find_parts(source)
        classes = {part: _classes(folder) for part, folder in parts.items()}
        class_names = number_classes(classes, source)
        number = {name: i for i, name in enumerate(class_names)}
        splits: list[Split] = []
        first = 0
        for part, folder in parts.items():
            folders = [folder / name for name in classes[part]]
            with ThreadPoolExecutor(_LISTERS) as pool:
                names = Names(pool.map(_list, folders))
            empty = [str(folder) for folder, count in zip(folders, names.counts, strict=True) if not count]
            if empty and (part == "train" or len(empty) == len(folders)):
                raise DataError(
                    f"{empty[0]} holds no pictures ({len(empty)} such classes); remove the folder, or fill it"
                )
            place = np.repeat(np.arange(len(folders), dtype=np.int32), names.counts)
            labels = np.array([number[name] for name in classes[part]], np.int32)[place]
            ids = np.arange(first, first + len(names), dtype=np.uint64)
            splits.append(Split(part, Files(folders, place, names), labels, ids))
            first += len(names)
    return Source(splits, len(class_names), class_names=class_names)


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
