"""The folder of a run's checkpoints: what they are called, and which go."""

import contextlib
import shutil
from pathlib import Path


def stem(steps: int) -> str:
    return f"step-{steps:09d}"


def part_name(part: int, parts: int) -> str:
    return f"part-{part:04d}-of-{parts:04d}.h5"


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for suffix in ("", ".h5", ".old") for path in folder.glob(f"step-?????????{suffix}"))


def prune(folder: Path, new: Path, keep: int) -> None:
    """Delete older checkpoints than the `keep` newest up to `new`, what it replaces, and what killed writers left.

    Of steps after `new` nothing is deleted: others may be writing it.
    """
    hidden = [path for path in folder.glob(".step-*.tmp") if path.name[1 : len(new.stem) + 1] <= new.stem]
    replaced = [path for path in listed(folder) if path.stem == new.stem and path != new]
    older = [path for path in listed(folder) if path.stem < new.stem]
    for path in [*hidden, *replaced, *older[: max(0, len(older) + 1 - keep)]]:
        delete(path)


def delete(path: Path) -> None:
    """A file, or a folder: that is hidden first, lest half of it be taken for a checkpoint. What can't be, stays."""
    with contextlib.suppress(OSError):
        if not path.is_dir():
            path.unlink()
            return
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(path)
