"""`metrics.jsonl`: what happened in a run, one JSON object a line, each with `kind` (DESIGN, section 7)."""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import msgspec
import numpy as np

from dpnn.comm.pulse import PULSE
from dpnn.errors import DataError

T = TypeVar("T")

_PERIOD_S = 1.0


class Metrics:
    """Appends lines to a file; with None (ranks other than 0) nothing is written.

    Step lines are kept back for up to about a second, then written together; any other kind is written at once. A run
    that goes on appends to the same file: a last line that was cut short is ended first.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[bytes] = []
        self._due = 0.0
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)
        self._file: int | None = None
        if path is not None:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                raise unwritable(path, error) from error
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                self._lines.append(b"")

    def write(self, kind: str, **values: Any) -> None:
        """One line. Numbers that aren't finite become null. DataError where the disk doesn't take it."""
        if self._file is None:
            return
        self._lines.append(self._encoder.encode({"kind": kind, **values}))
        if kind != "step" or monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write what was kept back: in one piece, as other processes may append to the file too."""
        if self._file is None or not self._lines:
            return
        self._lines.append(b"")
        rest = memoryview(b"\n".join(self._lines))
        self._lines.clear()
        self._due = monotonic() + _PERIOD_S
        try:
            with PULSE.waiting(f"the file system to take {self._path}", monotonic()):
                while rest:
                    rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise unwritable(self._path, error) from error

    def close(self) -> None:
        """Write the rest; further lines are dropped."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file. A line that was cut short, by a kill or a full disk, is skipped."""
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(msgspec.json.decode(line, type=dict[str, Any]))
        except msgspec.DecodeError:
            continue
    return lines


class _End(msgspec.Struct, tag_field="kind", tag="end"):
    exit: int


class _Lost(msgspec.Struct, tag_field="kind", tag="event"):
    event: str
    ranks: tuple[int, ...] = ()
    replicas: tuple[int, ...] = ()


class _Eval(msgspec.Struct, tag_field="kind", tag="eval"):
    step: int


def last_exit(path: Path, since: int = 0) -> int | None:
    """The exit code in the last `end` line behind byte `since` of a file; None where it can't be read, or has none."""
    end = _last(path, b'"end"', _End, since)
    return None if end is None else end.exit


def last_evaluated(path: Path) -> int:
    """After how many steps the run was last evaluated; 0 where it wasn't, or the file can't be read."""
    evaluated = _last(path, b'"eval"', _Eval)
    return 0 if evaluated is None else evaluated.step


def lost(path: Path, since: int) -> tuple[set[int], set[int]]:
    """The ranks that are told to be lost behind byte `since` of a file, and the replicas whose samples are."""
    ranks, replicas = set[int](), set[int]()
    for found in _lines(path, b"_lost", _Lost, since):
        ranks.update(found.ranks if found.event == "worker_lost" else ())
        replicas.update(found.replicas if found.event == "samples_lost" else ())
    return ranks, replicas


def _last(path: Path, mark: bytes, kind: type[T], since: int = 0) -> T | None:
    """The last line of a kind, behind byte `since`; lines with `mark` may be of it."""
    return next(iter(deque(_lines(path, mark, kind, since), 1)), None)


def _lines(path: Path, mark: bytes, kind: type[T], since: int) -> Iterator[T]:
    """Those of a kind, behind byte `since`, as far as they can be read; lines with `mark` may be of it."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(since)
        for line in file:
            if mark in line:
                with suppress(msgspec.DecodeError, UnicodeDecodeError):  # cut short, or another kind
                    yield msgspec.json.decode(line, type=kind)


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's; anything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def unwritable(path: Path | None, error: OSError) -> DataError:
    """The error for a file of the run folder that the disk doesn't take."""
    return DataError(f"{path} can't be written ({error.strerror}); make room there, or set output.dir")
