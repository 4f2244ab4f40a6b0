"""CIFAR-10 and CIFAR-100, the binary versions (cs.toronto.edu/~kriz/cifar.html).

A record is one byte of label (CIFAR-100: the coarse, then the fine label, which is taken) and an image of 32 x 32
pixels: all red, all green, all blue.
"""

import math
from pathlib import Path

import numpy as np

from dpnn.data.pack.arrays import Stored, as_source
from dpnn.data.pack.parts import reading
from dpnn.data.pack.rows import Rows
from dpnn.data.pack.source import Source
from dpnn.errors import DataError

_PIXELS = (3, 32, 32)
_TEN, _HUNDRED = "data_batch_1.bin", "train.bin"
"""The file by which each is known."""


def holds_cifar(folder: Path) -> bool:
    """Whether a folder holds one of the two."""
    return (folder / _TEN).exists() or (folder / _HUNDRED).exists()


def read_cifar(folder: Path) -> Source:
    """The training and the test part; DataError naming the file of what is wrong."""
    with reading(folder):
        if (folder / _TEN).exists():
            train, test = [folder / f"data_batch_{i}.bin" for i in range(1, 6)], [folder / "test_batch.bin"]
            classes, n_labels, list_name = 10, 1, "batches.meta.txt"
        else:
            train, test = [folder / _HUNDRED], [folder / "test.bin"]
            classes, n_labels, list_name = 100, 2, "fine_label_names.txt"
        source = as_source(
            {"train": _part(train, n_labels, classes), "test": _part(test, n_labels, classes)}, layout="NCHW"
        )
        return Source(source.splits, classes, class_names=_names(folder / list_name, classes))


def _part(paths: list[Path], n_labels: int, classes: int) -> tuple[Stored, Stored]:
    """Images and labels."""
    stride = n_labels + math.prod(_PIXELS)
    counts = []
    for path in paths:
        nbytes = path.stat().st_size
        if nbytes % stride or not nbytes:
            raise DataError(f"{path} has {nbytes} bytes, which are not records of {stride}; copy it again")
        counts.append(nbytes // stride)
    x = Rows(paths, counts, n_labels, stride, _PIXELS, np.uint8)
    y = Rows(paths, counts, n_labels - 1, stride, (), np.uint8)
    labels = y.read(np.arange(len(y)))
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        name = y.name(int(wrong[0]))
        raise DataError(f"{name} has the label {labels[wrong[0]]}, which is not in 0..{classes - 1}; copy it again")
    where = " and ".join(map(str, paths))
    return Stored(x, len(x), where), Stored(y, len(y), where)


def _names(path: Path, classes: int) -> tuple[str, ...]:
    """A class's name in each line; none where there is no such file."""
    if not path.exists():
        return ()
    names = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    if len(names) != classes:
        raise DataError(f"{path} names {len(names)} classes instead of {classes}; copy it again, or remove it")
    return names
