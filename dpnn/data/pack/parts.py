"""Which parts a source has, and the classes of each: what all sources of folders have in common."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.pack.source import Records, Source, Split
from dpnn.errors import DataError

Array = NDArray[Any]

TESTS = ("test", "val", "validation")


def find_parts(source: Path, *suffixes: str) -> dict[str, Path]:
    """SOURCE/train and SOURCE/test (or val, validation), or the whole SOURCE where there is no SOURCE/train.

    A part is a folder, or a file with one of the `suffixes`: train.tar. DataError where there are two that could be
    the test part.
    """
    train = _having(source, ("train",), suffixes)
    if not train:
        return {"train": source}
    test = _having(source, TESTS, suffixes)
    return {"train": train[0]} | ({"test": test[0]} if test else {})


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """DataError naming the file where the system can't read it; the source where the system doesn't say which."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else source
        raise DataError(
            f"{name} can't be read ({error.strerror or error}); check that it is there, and yours to read"
        ) from error


@dataclass(frozen=True)
class Part:
    """The pictures of a part: sample i is of classes[place[i]]. `classes` are sorted."""

    classes: Sequence[str]
    place: Array
    samples: Records


def as_source(parts: Mapping[str, Part], where: Path) -> Source:
    """The parts together: classes are numbered in the order of the training part's names.

    DataError for a class without pictures, and where another part has a class that the training part hasn't: no
    network could learn it.
    """
    class_names = tuple(parts["train"].classes)
    splits: list[Split] = []
    first = 0
    for name, part in parts.items():
        strange = sorted(set(part.classes) - set(class_names))
        if strange:
            raise DataError(
                f"{where}: its {name} part has the class {strange[0]!r}, which its training part hasn't "
                f"({len(strange)} such); remove it, or correct its name"
            )
        counts = np.bincount(part.place, minlength=len(part.classes))
        if not counts.all() and (name == "train" or not counts.any()):
            empty = part.classes[int(np.argmin(counts))]
            raise DataError(
                f"{where}: its {name} part has no pictures of the class {empty!r} ({np.count_nonzero(counts == 0)} "
                f"such); add some, or remove the class"
            )
        labels = np.searchsorted(class_names, part.classes).astype(np.int32)[part.place]
        ids = np.arange(first, first + len(labels), dtype=np.uint64)
        splits.append(Split(name, part.samples, labels, ids))
        first += len(labels)
    return Source(splits, len(class_names), class_names=class_names)


def _having(source: Path, names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    found = [path for name in names if (path := source / name).is_dir()]
    found += [path for name in names for suffix in suffixes if (path := source / (name + suffix)).is_file()]
    if len(found) > 1:
        what = " and ".join(path.name for path in found)
        raise DataError(f"{source} holds {what}, of which only one can be packed; move the others away")
    return found
