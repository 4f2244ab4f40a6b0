"""Which parts a source has, and the classes of each: what all sources of folders have in common."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpnn.errors import DataError

_TESTS = ("test", "val", "validation")


def find_parts(source: Path, *suffixes: str) -> dict[str, Path]:
    """SOURCE/train and SOURCE/test (or val, validation), or the whole SOURCE where there is no SOURCE/train.

    A part is a folder, or a file with one of the `suffixes`: train.tar. DataError where there are two that could be
    the test part.
    """
    train = _having(source, ("train",), suffixes)
    if not train:
        return {"train": source}
    test = _having(source, _TESTS, suffixes)
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


def number_classes(parts: Mapping[str, Sequence[str]], where: Path) -> tuple[str, ...]:
    """The names of the classes in the order of their numbers: those of the training part, sorted.

    DataError where another part has a class that the training part hasn't: no network could learn it.
    """
    names = tuple(sorted(parts["train"]))
    for part, classes in parts.items():
        strange = sorted(set(classes) - set(names))
        if strange:
            raise DataError(
                f"{where}: its {part} part has the class {strange[0]!r}, which its training part hasn't "
                f"({len(strange)} such); remove it, or correct its name"
            )
    return names


def _having(source: Path, names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    found = [path for name in names if (path := source / name).is_dir()]
    found += [path for name in names for suffix in suffixes if (path := source / (name + suffix)).is_file()]
    if len(found) > 1:
        what = " and ".join(path.name for path in found)
        raise DataError(f"{source} holds {what}, of which only one can be packed; move the others away")
    return found
