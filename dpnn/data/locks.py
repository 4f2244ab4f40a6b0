"""Whether HDF5 writes, and locks, on a file system."""

import tempfile
from pathlib import Path

import h5py

VERSION = h5py.version.hdf5_version


def locks(folder: Path) -> bool:
    """Whether a file in `folder` can be locked, as other programs want it; OSError where none can be written."""
    with tempfile.TemporaryDirectory(prefix=".dpnn-", dir=folder) as inside:
        path = Path(inside, "a.h5")
        with h5py.File(path, "w", locking=False) as file:
            file["x"] = [1]
        try:
            with h5py.File(path, "r", locking=True):
                return True
        except OSError:
            return False
