"""docs/kernels-verified.* tell of every CUDA kernel as it is now; and what a run of tests writes there."""

import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest

from . import verified
from .shim import names
from .verified import NVRTC, PAGE, ROOT, STAND_IN, Verified

DOCS = ROOT / "docs"
FILES = sorted(file.name for file in files("dpnn.kernels").iterdir() if file.name.endswith(".cu"))
AGAIN = "run `make verified` and commit what it writes"


@pytest.fixture(scope="module")
def rows() -> verified.Rows:
    return verified.read(DOCS / verified.JSON)


@pytest.mark.parametrize("file", FILES)
def test_every_kernel_was_compiled_and_run_on_the_stand_in_as_it_is_now(rows, file):
    kernels = names(file)
    assert kernels
    assert {kernel for its, kernel, _ in rows if its == file} == kernels, AGAIN
    for kernel in kernels:
        for by, ways in (NVRTC, {"sm_80", "sm_90"}), (STAND_IN, {"forward", "backward"}):
            row = rows.get((file, kernel, by), {"text": "", "how": ()})
            assert row["text"] == verified.text_of(file), f"{kernel}, {by}: {AGAIN}"
            assert ways <= set(row["how"]), f"{kernel}, {by}: {AGAIN}"


def test_the_page_shows_the_rows(rows):
    assert {file for file, *_ in rows} == set(FILES)
    assert (DOCS / PAGE).read_text() == verified.page(rows), AGAIN


NOTES = {("loss.cu", "softmax", STAND_IN, "forward"), ("loss.cu", "softmax", NVRTC, "sm_90")}


def session(folder: Path, *tests: tuple[bool, set[verified.Note]]) -> verified.Rows:
    """What is written after tests that pass or fail, and leave notes."""
    done: set[verified.Note] = set()
    plugin = Verified(folder, done)
    for passed, notes in tests:
        test = plugin.pytest_runtest_protocol()
        next(test)
        done |= notes
        plugin.pytest_runtest_logreport(SimpleNamespace(passed=passed))
        with pytest.raises(StopIteration):
            next(test)
    plugin.pytest_sessionfinish()
    return verified.read(folder / verified.JSON)


def test_what_a_failed_test_ran_is_not_verified(tmp_path):
    other = ("loss.cu", "softmax", STAND_IN, "backward")
    assert {row["by"] for row in session(tmp_path, (True, NOTES), (False, {other})).values()} == {NVRTC}


def test_rows_of_another_machine_and_of_before_stay_as_long_as_the_text_does(tmp_path):
    session(tmp_path, (True, NOTES))
    rows = session(tmp_path, (True, {("loss.cu", "softmax", "a GPU", "")}), (True, NOTES))
    assert set(rows) == {("loss.cu", "softmax", by) for by in (STAND_IN, NVRTC, "a GPU")}
    again = {("loss.cu", "softmax", STAND_IN, "watched")}
    rows = session(tmp_path, (True, again))
    assert rows["loss.cu", "softmax", STAND_IN]["how"] == ["forward", "watched"]
    rows["loss.cu", "softmax", STAND_IN]["text"] = rows["loss.cu", "softmax", "a GPU"]["text"] = "another"
    assert verified.page(rows).count("out of date**: ") == 2
    (tmp_path / verified.JSON).write_text(json.dumps(list(rows.values())))
    rows = session(tmp_path, (True, again))
    assert rows["loss.cu", "softmax", STAND_IN]["how"] == ["watched"]
    assert rows["loss.cu", "softmax", "a GPU"]["text"] == "another"


def test_a_kernel_that_a_file_has_no_longer_is_left_out(tmp_path):
    session(tmp_path, (True, {("loss.cu", "gone", STAND_IN, "forward")}))
    assert {kernel for _, kernel, _ in session(tmp_path, (True, NOTES))} == {"softmax"}
