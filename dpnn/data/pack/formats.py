"""The formats that are packed, each by its name: which function reads it, and how it is known by its path."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpnn.data.pack.digits import read_digits
from dpnn.data.pack.idx import read_folder
from dpnn.data.pack.npz import read_npz
from dpnn.data.pack.source import Source
from dpnn.errors import JobError


@dataclass(frozen=True)
class Options:
    """What a source needs to be told beside its path. `dpnn pack` has an option of the same name for each."""

    format: str = ""
    """A name of FORMATS; empty: by the path."""


FORMATS: dict[str, Callable[[Path, Options], Source]] = {
    "digits": lambda path, options: read_digits(),
    "idx": lambda path, options: read_folder(path),
    "npz": lambda path, options: read_npz(path),
}


def open_source(source: str, options: Options) -> Source:
    """The source that a word or a path names."""
    path = Path(source)
    if options.format and options.format not in FORMATS:
        raise JobError(f"--format {options.format} is none of {', '.join(FORMATS)}")
    if source != "digits" and not path.exists():
        raise JobError(f'{source!r} doesn\'t exist; name a file or folder of data, or "digits"')
    return FORMATS[options.format or _guess(path)](path, options)


def _guess(path: Path) -> str:
    """The format of what lies at a path."""
    if str(path) == "digits":
        return "digits"
    if path.is_dir():
        return "idx"
    if path.suffix == ".npz":
        return "npz"
    raise JobError(f"{path} is none of the known formats; name it by --format: {', '.join(FORMATS)}")
