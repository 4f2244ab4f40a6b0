"""Progress is one live line on a terminal, and now and then a plain line in a batch log."""

import io
import os
import re
import sys
from collections.abc import Callable

import pytest

from dpnn.observe import progress
from dpnn.observe.progress import Packing, Progress, terminal

LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_PROCID", "PMIX_RANK")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows, in seconds: set its only item."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lone(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A process that no launcher started; called, it says whether stdout is a terminal."""
    for name in ("DPNN_TERMINAL", *LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "123")
    return lambda tty: monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)


def test_a_batch_log_has_a_line_every_ten_seconds_and_the_last_step(clock: list[float]):
    out = io.StringIO()
    shown = Progress(100, live=False, out=out)
    for step in range(1, 26):
        clock[0] += 1.0
        shown.step(1 + step // 20, step, 2.0 / step, 0.05, 1500)
    shown.say("epoch 1: top-1 error 2 %")
    shown.close()
    assert out.getvalue().splitlines() == [
        "epoch 1  step 10/100  loss 0.2000  lr 0.05  1,500 images/s  0:01:30 left",
        "epoch 2  step 20/100  loss 0.1000  lr 0.05  1,500 images/s  0:01:20 left",
        "epoch 1: top-1 error 2 %",
        "epoch 2  step 25/100  loss 0.0800  lr 0.05  1,500 images/s  0:01:15 left",
    ]


def test_nothing_is_shown_twice(clock: list[float]):
    out = io.StringIO()
    shown = Progress(10, live=False, out=out)
    clock[0] += 20.0
    shown.step(1, 1, 0.5, 0.1, 8)
    shown.close()
    shown.close()
    assert len(out.getvalue().splitlines()) == 1


def test_the_time_left_counts_only_the_steps_of_this_start(clock: list[float]):
    out = io.StringIO()
    shown = Progress(1000, live=False, out=out)
    for step in range(901, 906):  # resumed after 900
        clock[0] += 2.0
        shown.step(9, step, 0.5, 0.1, 64)
    assert "step 905/1000" in out.getvalue()
    assert "0:03:10 left" in out.getvalue()


def test_the_speed_forgets_what_is_long_ago(clock: list[float]):
    out = io.StringIO()
    shown = Progress(1000, live=False, out=out)
    for step in range(1, 31):
        clock[0] += 10.0
        shown.step(1, step, 0.5, 0.1, 1000 if step < 29 else 4000)
    speeds = [int(found) for found in re.findall(r"(\d+) images/s", out.getvalue())]
    assert speeds[27] == 100
    assert speeds[29] == 400


def test_a_run_without_steps_says_nothing():
    out = io.StringIO()
    Progress(0, live=False, out=out).close()
    assert out.getvalue() == ""


def screen(output: str, columns: int) -> list[str]:
    """What a terminal shows after this output; knows what a live line needs."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]", output):
        if token == "\r":
            column = 0
        elif token == "\n":
            lines.append("")
            column = 0
        elif token == "\x1b[2K":
            lines[-1] = ""
        elif token.startswith("\x1b["):
            assert token in ("\x1b[?25l", "\x1b[?25h"), f"no escape sequence {token!r} is expected"
        else:
            lines[-1] = lines[-1][:column].ljust(column) + token + lines[-1][column + 1 :]
            column += 1
            assert column <= columns, "the line would wrap"
    return lines


def test_the_live_line_is_rewritten_in_place_and_said_lines_stay_above(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DPNN_TERMINAL", "100")
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    shown = Progress(100, live=True, out=out)
    for step in range(1, 21):
        clock[0] += 0.125
        shown.step(1, step, 0.5, 0.1, 64)
        if step == 10:
            shown.say("epoch 1: [top-1] error 2 %")
    live = "epoch 1  step 20/100  loss 0.5000  lr 0.1  512 images/s  0:00:10 left"
    assert screen(out.getvalue(), 100) == ["epoch 1: [top-1] error 2 %", live]
    assert out.getvalue().count("step 20/100") == 1
    shown.say("done")
    shown.close()
    assert screen(out.getvalue(), 100) == ["epoch 1: [top-1] error 2 %", "done", live, ""]
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l"), "the cursor is there again"


def test_a_packing_shows_its_share_its_rate_and_the_time_left(clock: list[float]):
    out = io.StringIO()
    shown = Packing(live=False, out=out)
    for done in range(50, 1001, 50):
        clock[0] += 1.0
        shown.count(done, 1000)
    shown.close()
    assert out.getvalue().splitlines() == [
        f"packing {'━' * 12}{'─' * 12}  50%  500 of 1,000 samples  50/s  0:00:10 left",
        f"packing {'━' * 24} 100%  1,000 of 1,000 samples  50/s  0:00:00 left",
    ]


def test_a_packing_on_a_terminal_is_one_line_that_ends_complete(clock: list[float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DPNN_TERMINAL", "100")
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    shown = Packing(live=True, out=out)
    for done in range(1, 1001):
        clock[0] += 0.001
        shown.count(done, 1000)
    shown.close()
    live, end = screen(out.getvalue(), 100)
    assert (live.split()[2:4], end) == (["100%", "1,000"], "")
    assert out.getvalue().count("samples") <= 6


def test_the_live_line_is_refreshed_at_most_five_times_a_second(clock: list[float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DPNN_TERMINAL", "100")
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    shown = Progress(10_000, live=True, out=out)
    for step in range(1, 2001):
        clock[0] += 0.001
        shown.step(1, step, 0.5, 0.1, 64)
    assert 8 <= out.getvalue().count("images/s") <= 10


def test_the_live_line_fits_a_narrow_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DPNN_TERMINAL", "30")
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    shown = Progress(100, live=True, out=out)
    clock[0] += 1.0
    shown.step(1, 1, 0.5, 0.1, 64)
    (line,) = screen(out.getvalue(), 30)
    assert line.startswith("epoch 1  step 1/100")


def test_stdout_and_stderr_are_not_taken_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DPNN_TERMINAL", "100")
    before = sys.stdout, sys.stderr
    shown = Progress(100, live=True, out=io.StringIO())
    assert (sys.stdout, sys.stderr) == before
    shown.close()


@pytest.mark.parametrize(("said", "columns"), [("100", 100), ("0", 80)])
def test_the_launcher_says_whether_there_is_a_terminal(
    lone: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, said: str, columns: int
):
    lone(False)
    monkeypatch.setenv("DPNN_TERMINAL", said)
    assert terminal() == columns


@pytest.mark.parametrize("name", LAUNCHERS)
def test_under_another_launcher_a_terminal_is_not_believed(
    lone: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, name: str
):
    lone(True)
    monkeypatch.setenv(name, "1")
    assert terminal() is None


def test_without_a_launcher_stdout_decides(lone: Callable[[bool], None]):
    lone(True)
    assert terminal() == int(os.environ["COLUMNS"])
    lone(False)
    assert terminal() is None
