"""ImageNet 2012 as it is handed out, nothing unpacked: two tars, and which class each validation picture is of.

SOURCE holds ILSVRC2012_img_train.tar, and for the test part ILSVRC2012_img_val.tar with one of:
- val.txt: lines "ILSVRC2012_val_00000001.JPEG 65" (Caffe's), the number of a class in the order of their names, or its
  name instead (n01751748);
- the devkit's ILSVRC2012_validation_ground_truth.txt: the ILSVRC2012_ID of each picture in the order of their names,
  with map_clsloc.txt (lines "n02119789 1 kit_fox": a class and its ID) or the devkit's meta.mat.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dpnn.data.pack.archives import list_flat, list_part
from dpnn.data.pack.parts import Part, as_source, reading
from dpnn.data.pack.source import Source
from dpnn.errors import DataError, JobError

TRAIN, _VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_LIST, _TRUTH, _MAP, _META = "val.txt", "ILSVRC2012_validation_ground_truth.txt", "map_clsloc.txt", "meta.mat"
_PLACES = ("", "data", "ILSVRC2012_devkit_t12/data")


def read_imagenet(folder: Path) -> Source:
    """The training part, and the validation pictures as the test part where there are some.

    DataError naming file and place of what is wrong.
    """
    with reading(folder):
        train = list_part(folder / TRAIN)
        if not (folder / _VAL).exists():
            return as_source({"train": train}, folder)
        names, records = list_flat(folder / _VAL)
        listed, truth = _find(folder, _LIST), _find(folder, _TRUTH)
        if listed is not None:
            chosen = _from_list(listed, names, train.classes)
        elif truth is not None:
            chosen = _from_truth(truth, names, _classes_by_id(folder))
        else:
            raise DataError(
                f"{folder} holds {_VAL}, but neither {_LIST} nor {_TRUTH}, which say what its pictures show"
            )
        unknown = sorted(set(chosen) - set(train.classes))
        if unknown:
            raise DataError(f"{listed or truth} stands for the class {unknown[0]!r}, which {TRAIN} hasn't")
        place = np.searchsorted(train.classes, chosen).astype(np.int32)
        return as_source({"train": train, "test": Part(train.classes, place, records)}, folder)


def _from_list(path: Path, names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The class of each picture, from lines of a picture and a class, by number or by name."""
    found: dict[str, str] = {}
    for where, words in _lines(path):
        if len(words) != 2:
            raise DataError(f'{where}: not a picture and its class, as in "ILSVRC2012_val_00000001.JPEG 65"')
        picture, chosen = words
        if chosen.isdecimal():
            if int(chosen) >= len(classes):
                raise DataError(f"{where}: the class {chosen} is not in 0..{len(classes) - 1}, those of {TRAIN}")
            chosen = classes[int(chosen)]
        if found.setdefault(picture, chosen) != chosen:
            raise DataError(f"{where}: {picture} is of {chosen}, and of {found[picture]} in a line before")
    missing = [name for name in names if name not in found]
    if missing or len(found) > len(names):
        problem = f"doesn't name {missing[0]}" if missing else f"names {len(found)} pictures"
        raise DataError(f"{path} {problem}; it must name the {len(names)} pictures of {_VAL}, and no other")
    return [found[name] for name in names]


def _from_truth(path: Path, names: Sequence[str], classes: Mapping[int, str]) -> list[str]:
    """The class of each picture, from its ILSVRC2012_ID in a line of its own."""
    chosen: list[str] = []
    for where, words in _lines(path):
        name = classes.get(_id(words[0]))
        if name is None or len(words) != 1:
            raise DataError(f"{where}: {' '.join(words)!r} is no ILSVRC2012_ID of a class")
        chosen.append(name)
    if len(chosen) != len(names):
        raise DataError(f"{path} has {len(chosen)} lines, and {_VAL} {len(names)} pictures; copy both again")
    return chosen


def _classes_by_id(folder: Path) -> dict[int, str]:
    """The class that each ILSVRC2012_ID stands for. The order of the IDs is not the order of the classes' names."""
    mapping, meta = _find(folder, _MAP), _find(folder, _META)
    if mapping is None:
        if meta is None:
            raise DataError(f"{folder} holds {_TRUTH}, but neither {_MAP} nor {_META}, which say what its numbers mean")
        return _read_meta(meta)
    classes: dict[int, str] = {}
    for where, words in _lines(mapping):
        number = _id(words[1]) if len(words) > 1 else -1
        if number < 0:
            raise DataError(f'{where}: not a class and its ILSVRC2012_ID, as in "n02119789 1 kit_fox"')
        if classes.setdefault(number, words[0]) != words[0]:
            raise DataError(f"{where}: the ILSVRC2012_ID {number} is of {words[0]}, and of {classes[number]} before")
    return classes


def _read_meta(path: Path) -> dict[int, str]:
    """From the devkit's MATLAB file: a table `synsets`, whose first columns are ILSVRC2012_ID and WNID."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise JobError(
            f"{path} is read by scipy, which isn't installed; pip install scipy, or put {_MAP} beside it"
        ) from error
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # whatever scipy says of a damaged file
        raise DataError(f"{path} can't be read ({error}); copy it again") from error


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The words of each line that isn't blank, and what to call it."""
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if words := line.split():
                yield f"{path}, line {number}", words
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text ({error}); copy it again") from error


def _id(word: str) -> int:
    return int(word) if word.isdecimal() else -1


def _find(folder: Path, name: str) -> Path | None:
    """A file of that name, in the folder or in the devkit's."""
    return next((path for place in _PLACES if (path := folder / place / name).is_file()), None)
