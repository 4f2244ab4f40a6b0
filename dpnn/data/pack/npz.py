"""One .npz file: arrays x_train and y_train, x_test and y_test (or x and y alone).

x: (samples, H, W, C), (samples, H, W) or any other shape. y: class numbers (samples,), or 0 and 1 (samples, classes)
where a sample may be of any number of classes.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.labels import Labels, Lists
from dpnn.data.pack.source import Source, Split, as_classes, as_samples, check_lengths
from dpnn.errors import DataError

Array = NDArray[Any]


def read_npz(path: Path) -> Source:
    """The parts of the file; DataError naming the file and the array of what is wrong."""
    arrays = _arrays(path)
    if "x" in arrays or "y" in arrays:
        wanted = {"train": ("x", "y")}
    else:
        wanted = {"train": ("x_train", "y_train")}
        if "x_test" in arrays or "y_test" in arrays:
            wanted["test"] = ("x_test", "y_test")
    splits: list[Split] = []
    first, num_classes = 0, 0
    for name, (x, y) in wanted.items():
        for array in (x, y):
            if array not in arrays:
                raise DataError(
                    f"{path} has no array {array!r}, only {', '.join(arrays) or 'none'}; "
                    f"it must hold x_train, y_train, x_test, y_test, or x, y"
                )
        check_lengths(len(arrays[x]), len(arrays[y]), f"{path}, {x} and {y}")
        samples = as_samples(arrays[x], f"{path}, {x}")
        labels, classes = _labels(arrays[y], f"{path}, {y}")
        num_classes = max(num_classes, classes)
        splits.append(Split(name, samples, labels, np.arange(first, first + len(labels), dtype=np.uint64)))
        first += len(labels)
    return Source(splits, num_classes)


def _arrays(path: Path) -> dict[str, Array]:
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is no .npz file, but a single array; write it with numpy.savez")
            return {name: np.atleast_1d(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} can't be read ({error}); make it again with numpy.savez") from error


def _labels(array: Array, where: str) -> tuple[Labels, int]:
    """Labels and the number of classes."""
    if array.ndim == 2 and array.shape[1] > 1:
        wrong = np.argwhere((array != 0) & (array != 1))
        if len(wrong):
            value = array[tuple(wrong[0])]
            raise DataError(f"{where}{wrong[0].tolist()} = {value}: labels (samples, classes) are 0 or 1")
        return Lists.from_dense(array), array.shape[1]
    classes = as_classes(array, where)
    return classes, int(classes.max()) + 1
