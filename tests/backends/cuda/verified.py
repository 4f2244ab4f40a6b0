"""Which CUDA kernels were verified: by what, how, when, and as which text. For `pytest --verified FOLDER`.

What passed tests compiled and ran goes to FOLDER/kernels-verified.json, a row for each kernel and what it was verified
by, beside the rows that are there; kernels-verified.md shows them. So do the rows of another machine, by
`python tests/backends/cuda/verified.py THEIRS.json FOLDER`.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dpnn.backends.cuda.source import source

Note = tuple[str, str, str, str]
"""File, kernel, by what it was verified, and how."""
Rows = dict[tuple[str, str, str], dict[str, Any]]
"""By file, kernel and by what."""
ROOT = Path(__file__).parents[3]
JSON, PAGE = "kernels-verified.json", "kernels-verified.md"
NVCC, NVRTC, STAND_IN = "nvcc", "NVRTC", "stand-in"
HEAD = """# How each CUDA kernel was verified

Written by the tests: `make verified` (compilers and stand-in), `make gpu` (a GPU). Don't edit it.

A kernel is named where it was part of a test that passed. *Compiled*: for which architectures, without warnings or
spills. *Stand-in*: its source, compiled by g++, ran on the CPU; forward, backward and shuffled are orders of its
threads and blocks, watched says that every access to memory was seen. *GPU*: it ran there, in the same tests. Behind
each stand the day and a commit that has this text. **Out of date**: the kernel's text, headers included, is another one
now. What Python does around a kernel isn't covered by this.

| kernel | compiled | stand-in | GPU |
|---|---|---|---|
"""


class Verified:
    """Notes what tests do, if they pass and no other test of that fails, and writes it when all are done."""

    def __init__(self, folder: Path, done: set[Note]) -> None:
        """`done`: where a test leaves its notes."""
        self._folder, self._done = folder, done
        self._passed: set[Note] = set()
        self._doubtful: set[Note] = set()
        self._good = True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._good = True
        self._done.clear()
        result = yield
        (self._passed if self._good else self._doubtful).update(self._done)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._good &= report.passed

    def pytest_sessionfinish(self) -> None:
        doubtful = {note[:3] for note in self._doubtful}
        write(self._folder, rows_of(note for note in self._passed if note[:3] not in doubtful))


def text_of(file: str) -> str:
    """What names the present text of kernels/FILE, headers included."""
    return hashlib.sha256(source(file).encode()).hexdigest()[:12]


def rows_of(notes: Iterable[Note]) -> Rows:
    """Rows of today."""
    rows: Rows = {}
    head = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": _commit()}
    for file, kernel, by, how in notes:
        new = {"file": file, "kernel": kernel, "by": by, "how": [], "text": text_of(file), **head}
        rows.setdefault((file, kernel, by), new)["how"].append(how)
    for row in rows.values():
        row["how"].sort()
    return rows


def read(file: Path) -> Rows:
    """The rows of a file; none where there is no file."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return {(row["file"], row["kernel"], row["by"]): row for row in rows}


def write(folder: Path, new: Rows) -> None:
    """Bring new rows to those in a folder. A file that was compiled anew has no other kernels than those.

    One of the present text isn't replaced by one of another text.
    """
    rows = read(folder / JSON)
    for key, row in new.items():
        old = rows.get(key, {"text": "", "how": ()})
        if row["text"] == old["text"]:
            rows[key] = {**row, "how": sorted({*row["how"], *old["how"]})}
        elif old["text"] != text_of(row["file"]):
            rows[key] = row
    compiled = {file for file, _, by in new if by == NVRTC}
    kept = {key: row for key, row in rows.items() if key[0] not in compiled or (*key[:2], NVRTC) in new}
    lines = ",\n".join(json.dumps(kept[key]) for key in sorted(kept))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (folder / PAGE).write_text(page(kept), encoding="utf-8")


def page(rows: Rows) -> str:
    """The rows as a table to be read."""
    kernels: dict[tuple[str, str], dict[str, list[str]]] = {}
    for file, kernel, by in sorted(rows):
        column = {NVCC: "compiled", NVRTC: "compiled", STAND_IN: "stand-in"}.get(by, "GPU")
        kernels.setdefault((file, kernel), {}).setdefault(column, []).append(_cell(rows[file, kernel, by]))
    cells = [[f"{file}: `{kernel}`", *_columns(found)] for (file, kernel), found in kernels.items()]
    return HEAD + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _columns(found: dict[str, list[str]]) -> list[str]:
    return ["; ".join(found.get(column, ["**no**"])) for column in ("compiled", "stand-in", "GPU")]


def _cell(row: dict[str, Any]) -> str:
    by = () if row["by"] == STAND_IN else (row["by"],)
    old = "" if row["text"] == text_of(row["file"]) else "**out of date**: "
    return f"{old}{' '.join((*by, *filter(None, row['how'])))} ({row['date']}, {row['commit']})"


def _commit() -> str:
    """The commit of the code here, with a plus where the kernels are others."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "kernels"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout else "")


if __name__ == "__main__":
    theirs, here = read(Path(sys.argv[1])), _commit()
    # A machine that was sent files may have no history of them; here it is known which commit has the text.
    for row in theirs.values():
        if row["text"] == text_of(row["file"]):
            row["commit"] = here
    write(Path(sys.argv[2]), theirs)
