"""The formats that are packed, each by its name: which function reads it, and how it is known by its path."""

import glob
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from dpnn.data.pack.archives import holds_tars, read_archives
from dpnn.data.pack.arrays import Layout
from dpnn.data.pack.cifar import holds_cifar, read_cifar
from dpnn.data.pack.digits import read_digits
from dpnn.data.pack.hdf5 import holds_hdf5, read_hdf5
from dpnn.data.pack.idx import read_folder
from dpnn.data.pack.imagenet import TRAIN, read_imagenet
from dpnn.data.pack.images import read_images
from dpnn.data.pack.listed import read_list
from dpnn.data.pack.npz import read_npy, read_npz
from dpnn.data.pack.source import Source
from dpnn.errors import JobError


@dataclass(frozen=True)
class Options:
    """What a source needs to be told beside its path. `dpnn pack` has an option of the same name for each."""

    format: str = ""
    """A name of FORMATS; empty: by the path."""
    x: str = ""
    y: str = ""
    """HDF5: the datasets of samples and of labels."""
    layout: Layout = "NHWC"
    """Of arrays that are images: channels last, or first."""
    places: bool = False
    """HDF5: labels are places (row, column) on the plane of each sample."""


@dataclass(frozen=True)
class Format:
    """How a format is read, how it is known, and which options it takes."""

    read: Callable[[Path, Options], Source]
    is_at: Callable[[Path], bool]
    options: tuple[str, ...] = ()


FORMATS = {
    "digits": Format(lambda path, options: read_digits(), lambda path: str(path) == "digits"),
    "npz": Format(
        lambda path, options: read_npz(path, options.layout), lambda path: path.suffix == ".npz", ("layout",)
    ),
    "csv": Format(lambda path, options: read_list(path), lambda path: path.suffix == ".csv"),
    "imagenet": Format(lambda path, options: read_imagenet(path), lambda path: (path / TRAIN).exists()),
    "cifar": Format(lambda path, options: read_cifar(path), holds_cifar),
    "idx": Format(lambda path, options: read_folder(path), lambda path: any(path.glob("*-images[-.]idx*"))),
    "npy": Format(
        lambda path, options: read_npy(path, options.layout), lambda path: any(path.glob("*.npy")), ("layout",)
    ),
    "hdf5": Format(
        lambda path, options: read_hdf5(path, options.x, options.y, options.layout, options.places),
        holds_hdf5,
        ("x", "y", "layout", "places"),
    ),
    "tar": Format(lambda path, options: read_archives(path), holds_tars),
    "images": Format(
        lambda path, options: read_images(path), lambda path: any(one.is_dir() for one in path.glob("[!.]*"))
    ),
}
"""Asked in this order where no name is given."""


def open_source(source: str, options: Options) -> Source:
    """The source that a word, a path or a pattern names.

    JobError where its format isn't known, or has no use for one of the options.
    """
    path = Path(source)
    if options.format and options.format not in FORMATS:
        raise JobError(f"--format {options.format} is none of {', '.join(FORMATS)}")
    if source != "digits" and not path.exists() and not glob.glob(source):
        raise JobError(f'{source!r} doesn\'t exist; name a file or folder of data, or "digits"')
    name = options.format or _guess(path)
    for option in fields(Options)[1:]:
        if getattr(options, option.name) != option.default and option.name not in FORMATS[name].options:
            takers = ", ".join(taker for taker, format in FORMATS.items() if option.name in format.options)
            raise JobError(f"--{option.name} is for the formats {takers}, and {source} is {name}; leave it out")
    return FORMATS[name].read(path, options)


def _guess(path: Path) -> str:
    """The format of what lies at a path."""
    for name, format in FORMATS.items():
        if format.is_at(path):
            return name
    raise JobError(f"{path} is none of the known formats; name it by --format: {', '.join(FORMATS)}")
