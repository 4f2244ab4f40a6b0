"""What a packing leaves behind until it is complete, so that a killed one can go on: FOLDER/.packing.

`plan.json` says what is packed, and how. For each finished shard there is a file that says what the manifest needs to
know of it. When the manifests are written, the folder gets another name, which takes no time, and is then removed.
"""

import hashlib
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np

from dpnn.data.durable import replacing, sync
from dpnn.data.labels import Lists
from dpnn.data.manifest import NAME, Shard
from dpnn.data.pack.moments import Moments
from dpnn.data.pack.source import Records, Samples, Source, plain
from dpnn.data.pack.stored import Rejected
from dpnn.errors import DataError, JobError

PARTS = ("train", "test")
REJECTED = "rejected.csv"
_FOLDER, _DONE, _PLAN = ".packing", ".packing.done", "plan.json"
_TEMPORARY = r"\..+\.tmp"
_LOOKED_AT = 64
"""Samples of a part that are read to know whether a source is still the same."""


class Sizes(msgspec.Struct, frozen=True):
    """Bytes of the samples of a shard."""

    least: int
    total: int
    most: int


class Finished(msgspec.Struct, frozen=True):
    """A shard that is there, or that has no samples left; and which samples it lacks."""

    shard: Shard | None
    moments: Moments | None
    sizes: Sizes | None
    rejected: tuple[Rejected, ...]


class Plan(msgspec.Struct, frozen=True):
    """What is packed, and how: a packing goes on only where both are the same."""

    source: str
    """A digest of the listing, and of some samples."""
    options: dict[str, str]


class Journal:
    """The journal of the packing into one folder."""

    def __init__(self, folder: Path) -> None:
        self._target, self._folder = folder, folder / _FOLDER

    def check_free(self, force: bool) -> None:
        """JobError where the folder holds packed data, and no packing that isn't complete; and not `force`."""
        shutil.rmtree(self._target / _DONE, ignore_errors=True)
        for part in PARTS:
            if not force and (self._target / part / NAME).exists() and not self._folder.exists():
                raise JobError(f"{self._target / part} holds packed data already; name another folder, or use --force")

    def begin(self, plan: Plan, force: bool) -> None:
        """Go on with this packing, or clear the folder for it. One rank, before any writes.

        JobError where another packing was begun there, and not `force`.
        """
        found = None if force else self._plan()
        if found is None:
            self._clear()
            self._folder.mkdir(parents=True)
            with replacing(self._folder / _PLAN) as temporary:
                temporary.write_bytes(msgspec.json.encode(plan))
            sync(self._target)
        elif found != plan:
            raise JobError(
                f"{self._target} holds a packing that was begun with {_difference(found, plan)}: give the command as "
                "before to go on with it, name another folder, or begin anew with --force"
            )
        for folder in (self._folder, *(self._target / part for part in PARTS)):
            _remove(folder, _TEMPORARY)

    def write(self, shard: str, finished: Finished) -> None:
        """A shard of this name is finished."""
        with replacing(self._folder / f"{shard}.json") as temporary:
            temporary.write_bytes(msgspec.json.encode(finished))

    def read(self, shard: str) -> Finished | None:
        """What was written of a shard of this name."""
        try:
            return msgspec.json.decode((self._folder / f"{shard}.json").read_bytes(), type=Finished)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def end(self) -> None:
        """All is complete."""
        self._folder.rename(self._target / _DONE)
        shutil.rmtree(self._target / _DONE, ignore_errors=True)

    def _plan(self) -> Plan | None:
        """The plan of a packing that isn't complete."""
        try:
            return msgspec.json.decode((self._folder / _PLAN).read_bytes(), type=Plan)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError:  # of another version
            return Plan("", {})

    def _clear(self) -> None:
        """Remove what an earlier packing has left; the manifests first, so that nothing opens as good meanwhile."""
        for part in PARTS:
            (self._target / part / NAME).unlink(missing_ok=True)
        if self._folder.exists():
            self._folder.rename(self._target / _DONE)
        shutil.rmtree(self._target / _DONE, ignore_errors=True)
        _remove(self._target, rf"{re.escape(REJECTED)}|{_TEMPORARY}")
        for part in PARTS:
            _remove(self._target / part, rf"{part}-\d+-of-\d+\.h5|{re.escape(REJECTED)}|{_TEMPORARY}")


def digest_of(source: Source) -> str:
    """Of the listing of a source, and of some of its samples: when it has changed, by all likelihood so has this."""
    digest = hashlib.sha256(repr((source.num_classes, *map(plain, source.class_names))).encode())
    for split in source.splits:
        labels = (split.labels.indptr, split.labels.indices) if isinstance(split.labels, Lists) else (split.labels,)
        digest.update(f"{split.name} {type(split.samples).__name__} {split.samples.shape}".encode())
        for array in (split.ids, *labels):
            digest.update(np.ascontiguousarray(array).data.cast("B"))
        for number in np.unique(np.linspace(0, len(split.ids) - 1, _LOOKED_AT).astype(int)).tolist():
            digest.update(plain(split.samples.name(number)).encode())
            digest.update(_look(split.samples, number))
    return digest.hexdigest()


def _look(samples: Samples | Records, number: int) -> bytes:
    try:
        if isinstance(samples, Records):
            return samples.read(number)
        return samples.read(np.array([number])).tobytes()
    except DataError as error:
        return plain(str(error)).encode()


def _difference(found: Plan, plan: Plan) -> str:
    """How a packing that was begun differs from what is asked for."""
    options = [
        f"{name} = {found.options[name]} (now {value})"
        for name, value in plan.options.items()
        if found.options.get(name, value) != value
    ]
    return ", ".join(options) or "another source"


def _remove(folder: Path, pattern: str) -> None:
    """Remove the files of these names."""
    if folder.is_dir():
        for path in folder.iterdir():
            if re.fullmatch(pattern, path.name):
                path.unlink(missing_ok=True)
