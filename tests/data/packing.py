"""A source of encoded samples for tests of the packer, and a program: `dpnn pack` that knows it as --format files.

A folder with the file `shape` ("picture", or the shape of a frame) and folders train and perhaps test, with a file
CLASS-NAME for each sample. The environment: FULL=RANK makes writing more than 20 kB into a file fail on that rank.
"""

import os
import resource
import sys
from pathlib import Path

import numpy as np

from dpnn import cli
from dpnn.data.pack import Options
from dpnn.data.pack.formats import FORMATS, Format
from dpnn.data.pack.source import Source, Split
from dpnn.errors import DataError


class Files:
    """The records are files."""

    def __init__(self, paths: list[Path], shape: tuple[int, ...]) -> None:
        self.codec, self.shape = ("frames", shape) if shape else ("image", ())
        self._paths = paths
        self.nbytes = float(np.mean([path.stat().st_size for path in paths if path.is_file()] or [1]))

    def read(self, number: int) -> bytes:
        if os.environ.get("FULL", "") == os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")):
            # Only now: MPI has written its own files.
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            return self._paths[number].read_bytes()
        except IsADirectoryError as error:
            raise DataError(f"{self.name(number)}: it is a folder") from error

    def name(self, number: int) -> str:
        return str(self._paths[number])


def read_files(folder: Path, options: Options) -> Source:
    said = (folder / "shape").read_text()
    shape = () if said == "picture" else tuple(map(int, said.split()))
    splits, first = [], 0
    for part in ("train", "test"):
        paths = sorted((folder / part).glob("*"))
        if paths:
            labels = np.array([int(path.name.split("-")[0]) for path in paths], np.int32)
            ids = np.arange(first, first + len(paths), dtype=np.uint64)
            splits.append(Split(part, Files(paths, shape), labels, ids))
            first += len(paths)
    return Source(splits, num_classes=3, class_names=("ant", "bee", "cat"))


FORMATS["files"] = Format(read_files, lambda path: False)

if __name__ == "__main__":
    sys.exit(cli.main())
