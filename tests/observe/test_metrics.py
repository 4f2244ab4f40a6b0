"""Every line of metrics.jsonl is one JSON object, on disk soon, and survives kills and resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpnn.errors import DataError
from dpnn.observe import metrics
from dpnn.observe.metrics import Metrics, last_evaluated, last_exit, read


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows, in seconds: set its only item."""
    now = [100.0]
    monkeypatch.setattr(metrics, "monotonic", lambda: now[0])
    return now


def test_each_line_is_an_object_with_its_kind(tmp_path: Path):
    log = Metrics(tmp_path / "metrics.jsonl")
    log.write("start", seed=3, mesh=[4, 1], versions={"dpnn": "0.1"})
    log.write("step", step=1, loss=0.5)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "start", "seed": 3, "mesh": [4, 1], "versions": {"dpnn": "0.1"}},
        {"kind": "step", "step": 1, "loss": 0.5},
    ]
    assert read(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]


def test_numbers_that_are_not_finite_become_null_and_numpys_numbers_plain(tmp_path: Path):
    log = Metrics(tmp_path / "m")
    values = {
        "a": float("nan"),
        "b": np.float32("inf"),
        "c": -np.float64("inf"),
        "d": np.float32(0.5),
        "e": np.int64(7),
    }
    log.write("event", **values, path=Path("x"), flag=np.bool_(True))
    log.close()
    expected = {"a": None, "b": None, "c": None, "d": 0.5, "e": 7, "path": "x", "flag": True}
    assert read(tmp_path / "m") == [{"kind": "event", **expected}]


def test_steps_reach_the_disk_once_a_second_and_all_else_at_once(tmp_path: Path, clock: list[float]):
    path = tmp_path / "m"
    log = Metrics(path)
    log.write("start")
    assert len(read(path)) == 1
    for step in range(10):
        clock[0] += 0.09
        log.write("step", step=step)
    assert len(read(path)) == 1
    clock[0] += 0.2
    log.write("step", step=10)
    assert [line.get("step") for line in read(path)] == [None, *range(11)]
    log.write("step", step=11)
    assert len(read(path)) == 12
    log.write("event", name="checkpoint")
    assert [line["kind"] for line in read(path)][-2:] == ["step", "event"]
    log.write("step", step=12)
    log.flush()
    assert read(path)[-1] == {"kind": "step", "step": 12}
    log.write("step", step=13)
    log.close()
    assert [line.get("step") for line in read(path)][-3:] == [None, 12, 13]


def test_a_run_that_goes_on_appends(tmp_path: Path):
    for step in range(3):
        log = Metrics(tmp_path / "m")
        log.write("step", step=step)
        log.close()
    assert [line["step"] for line in read(tmp_path / "m")] == [0, 1, 2]


def test_a_line_that_was_cut_short_is_ended_and_skipped(tmp_path: Path):
    path = tmp_path / "m"
    path.write_bytes(b'{"kind":"step","step":1}\n{"kind":"step","st')
    assert read(path) == [{"kind": "step", "step": 1}]
    log = Metrics(path)
    log.write("step", step=2)
    log.close()
    assert path.read_bytes().splitlines()[1:] == [b'{"kind":"step","st', b'{"kind":"step","step":2}']
    assert [line["step"] for line in read(path)] == [1, 2]


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([b'{"kind":"end","exit":75}', b'{"kind":"start"}'], 75),
        ([b'{"kind":"end","exit":0}', b'{"kind":"end","exit":4,"error":"rank 1: gone"}', b'{"kind":"end","ex'], 4),
        ([b'{"kind":"event","event":"end","exit":3}', b'{"kind":"\xff\x00","end"', b""], None),
        ([b'{"kind":"step","exit":3}', b'{"kind":"end","exit":null}', b'{"kind":"end"}', b'["end"]'], None),
    ],
)
def test_the_last_exit_is_that_of_the_last_whole_end_line(tmp_path: Path, lines: list[bytes], code: int | None):
    (tmp_path / "m").write_bytes(b"\n".join(lines))
    assert last_exit(tmp_path / "m") == code
    assert last_exit(tmp_path / "m", since=1000) is None


def test_a_file_that_cannot_be_read_has_no_exit(tmp_path: Path):
    assert last_exit(tmp_path / "m") is None
    assert last_exit(tmp_path) is None


def test_opening_alone_changes_nothing(tmp_path: Path):
    (tmp_path / "m").write_bytes(b'{"kind":"end"}\n')
    Metrics(tmp_path / "m").close()
    assert (tmp_path / "m").read_bytes() == b'{"kind":"end"}\n'


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    log = Metrics(None)
    log.write("start")
    log.write("step", step=1)
    log.close()
    assert os.listdir(tmp_path) == []


def test_lines_after_close_are_dropped(tmp_path: Path):
    log = Metrics(tmp_path / "m")
    log.close()
    log.write("event")
    log.close()
    assert read(tmp_path / "m") == []


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"missing/m can't be written .No such file"):
        Metrics(tmp_path / "missing" / "m")


FULL_DISK = """
import resource, sys
from pathlib import Path
from dpnn.errors import DataError
from dpnn.observe.metrics import Metrics
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
log = Metrics(Path(sys.argv[1]))
try:
    for step in range(100):
        log.write("event", step=step)
except DataError as error:
    print(error)
log.close()
"""


def test_a_full_disk_is_an_error_and_what_was_written_stays(tmp_path: Path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "m")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert "m can't be written (File too large)" in done.stdout
    lines = read(tmp_path / "m")
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert len(lines) > 20


def test_the_last_evaluation_is_found_behind_all_else(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert last_evaluated(path) == 0
    one = Metrics(path)
    one.write("eval", epoch=1, step=15, loss=1.0)
    one.write("event", event="eval")
    one.close()
    with path.open("ab") as file:
        file.write(b'{"kind":"eval","step":3')
    assert last_evaluated(path) == 15
