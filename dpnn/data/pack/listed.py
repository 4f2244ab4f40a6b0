"""Pictures that a CSV file lists: a path and a label in each line, and the part where there are two: train or test.

    path,label,split
    photos/0001.jpg,cat,train
    photos/0002.jpg,dog;leash,test

The first line is a header where its second word is "label" or "labels". Paths are relative to the file's own folder.
Labels are names, or numbers from 0 on where all are. Several are parted by ";" (numbers also by spaces), and a sample
of a list of such may have none. test may also be named val or validation.
"""

import csv
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.labels import Labels, Lists
from dpnn.data.pack.files import Files, Names
from dpnn.data.pack.parts import TESTS, reading
from dpnn.data.pack.source import MOST_CLASSES, Source, Split, chosen
from dpnn.errors import DataError

Array = NDArray[Any]

_GROUP = 4096
_PARTS = {"train": "train"} | dict.fromkeys(TESTS, "test")


def read_list(path: Path) -> Source:
    """The parts that the file names; DataError naming the line of what is wrong. The pictures aren't looked at yet."""
    listing = _Listing(path)
    with reading(path):
        for where, words in _lines(path):
            listing.add(where, *words)
    return listing.source()


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The words of each line but the header, and what to call it."""
    columns = 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                words, where = [word.strip() for word in row], f"{path}, line {reader.line_num}"
                if not any(words):
                    continue
                if not columns:
                    columns = len(words)
                    if columns not in (2, 3):
                        raise DataError(f"{where} has {columns} columns; a line is PATH,LABEL or PATH,LABEL,SPLIT")
                    if words[1].lower() in ("label", "labels"):
                        continue
                if len(words) != columns:
                    raise DataError(f"{where} has {len(words)} columns, and the first line {columns}; quote commas")
                yield where, words
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no CSV file in UTF-8 ({error}); write it as that") from error


class _Listing:
    """What the lines say, in arrays that grow: some 30 bytes a line beside the file's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Each text, and its number in the order of first lines.
        self._folders: dict[str, int] = {}
        self._labels: dict[str, int] = {}
        self._parts: dict[str, int] = {}
        self._folder, self._part, self._keys = array("i"), array("b"), array("q")
        self._counts, self._indices = array("i"), array("i")
        self._names: list[bytes] = []
        self._groups: list[bytes] = []
        self._unlabelled = ""

    def add(self, where: str, path: str, label: str, part: str = "train") -> None:
        """A line."""
        folder, name = os.path.split(path)
        if not name or "\0" in path:
            raise DataError(f"{where}: {path!r} is no file's path")
        if part.lower() not in _PARTS:
            raise DataError(f"{where}: the split {part!r} is none of {', '.join(_PARTS)}")
        classes = [word.strip() for word in label.split(";") if word.strip()]
        if all(word.isdecimal() for word in label.split()):
            classes = label.split()
        if len(set(classes)) < len(classes):
            raise DataError(f"{where}: {label!r} has a label twice; remove one of them")
        if not classes and not self._unlabelled:
            self._unlabelled = where
        self._folder.append(self._folders.setdefault(folder, len(self._folders)))
        self._part.append(self._parts.setdefault(part.lower(), len(self._parts)))
        self._keys.append(hash(path))
        self._counts.append(len(classes))
        self._indices.extend(self._labels.setdefault(word, len(self._labels)) for word in classes)
        self._names.append(os.fsencode(name) + b"\0")
        if len(self._names) == _GROUP:
            self._groups.append(b"".join(self._names))
            self._names.clear()

    def source(self) -> Source:
        """All lines."""
        files = self._files()
        labels, num_classes, class_names = self._numbered()
        found = {name: i for i, name in enumerate(self._parts)}
        tests = [name for name in found if name != "train"]
        if "train" not in found or len(tests) > 1:
            has = " and ".join(found)
            raise DataError(
                f"{self._path} has the splits {has}; it must have train, and may have one of {', '.join(TESTS)}"
            )
        splits: list[Split] = []
        for name in ("train", *tests):
            numbers = np.flatnonzero(np.asarray(self._part) == found[name])
            ids = numbers.astype(np.uint64)
            splits.append(Split(_PARTS[name], chosen(files, numbers), labels[numbers], ids))
        self._check_classes(splits, class_names)
        return Source(splits, num_classes, class_names=class_names)

    def _files(self) -> Files:
        names = Names([*self._groups, b"".join(self._names)])
        if not len(names):
            raise DataError(f"{self._path} lists no pictures; a line is PATH,LABEL or PATH,LABEL,SPLIT")
        files = Files([self._path.parent / folder for folder in self._folders], np.array(self._folder), names)
        order = np.argsort(self._keys, kind="stable")
        same = np.flatnonzero(np.diff(np.asarray(self._keys)[order]) == 0)
        if len(same):
            name = files.name(int(order[same[0]]))
            raise DataError(
                f'{self._path} lists {name} twice; remove a line, or name all labels in one, as in "cat;dog"'
            )
        return files

    def _numbered(self) -> tuple[Labels, int, tuple[str, ...]]:
        """The labels, the number of classes, and their names where they aren't numbers."""
        texts, class_names = list(self._labels), tuple(sorted(self._labels))
        if texts and all(text.isdecimal() for text in texts):
            values, class_names = [int(text) for text in texts], ()
            if max(values) >= MOST_CLASSES:
                raise DataError(f"{self._path}: a label is {max(values)}; a class is a number up to {MOST_CLASSES - 1}")
        else:
            values = np.argsort(np.argsort(texts)).tolist()
        indices = np.array(values, np.int32)[np.array(self._indices)]
        counts = np.array(self._counts, np.int64)
        if (counts == 1).all():
            return indices, max(values) + 1, class_names
        if counts.max() < 2:
            raise DataError(f"{self._unlabelled} has no label; write one, or remove the line")
        indices = indices[np.lexsort((indices, np.repeat(np.arange(len(counts)), counts)))]  # each list in order
        return Lists(np.concatenate(([0], np.cumsum(counts))), indices), max(values) + 1, class_names

    def _check_classes(self, splits: Sequence[Split], class_names: Sequence[str]) -> None:
        """DataError where the test part has a class that the training part hasn't: no network could learn it."""
        train, *others = (split.labels for split in splits)
        for labels in others:
            if isinstance(train, Lists) or isinstance(labels, Lists):
                continue
            strange = np.setdiff1d(labels, train)
            if len(strange):
                name = class_names[strange[0]] if class_names else str(strange[0])
                raise DataError(
                    f"{self._path}: its test part has the class {name!r}, which its training part hasn't "
                    f"({len(strange)} such); remove it, or correct its name"
                )
