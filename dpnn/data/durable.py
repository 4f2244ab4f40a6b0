"""Files that are either there whole or not at all, also after a crash of the machine."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write under; on leaving, the file is synced and takes the name `path`.

    Where the block raises, the temporary file is removed and `path` stays as it was. A killed process leaves a file
    whose name begins with a dot and ends in `.tmp`: nobody reads it.
    """
    # Processes on two machines, or in two containers, may have the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{secrets.randbelow(10**9):09}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when the file, or the folder's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
