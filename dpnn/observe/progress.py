"""Progress for people, on rank 0: one live line on a terminal, now and then a plain line in a batch log."""

import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_PROCID")
_LIVE_PERIOD_S, _LOG_PERIOD_S = 0.2, 10.0
_MEMORY_S = 2.0
"""The speed that is shown forgets what is older than about this."""
_LONG_MEMORY_S, _BAR = 20.0, 24


def terminal() -> int | None:
    """The columns of the terminal that rank 0's output ends up on; None where it is no terminal.

    Under a launcher only `dpnn launch` knows, and says so in DPNN_TERMINAL: Open MPI gives rank 0 a terminal of its own
    even where its output goes into a file.
    """
    said = os.environ.get("DPNN_TERMINAL", "")
    if said.isdecimal():
        return int(said) or 80
    if any(name in os.environ for name in _LAUNCHERS) or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


class _Line:
    """One line that is shown every 0.2 s in place (`live`), or else every 10 s anew, in `out`. No threads."""

    def __init__(self, live: bool, out: TextIO | None) -> None:
        self._out = out or sys.stdout
        self._live = _live_line(self._out) if live else None
        self._period = _LIVE_PERIOD_S if live else _LOG_PERIOD_S
        self._start = self._shown = monotonic()
        self._due = self._start + self._period
        self._speed = 0.0

    def say(self, text: str) -> None:
        """Print a line that stays; it stands above the live line."""
        with self._unharmed():
            if self._live is None:
                print(text, file=self._out, flush=True)
            else:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the line where it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _put(self, text: str, now: float) -> None:
        """Show the line."""
        self._shown, self._due = now, now + self._period
        with self._unharmed():
            if self._live is None:
                print(text, file=self._out, flush=True)
            else:
                self._live.update(_one_line(text), refresh=True)

    def _measure(self, samples: int, now: float, memory_s: float) -> None:
        """The speed, after so many samples since the line was last shown; what is older than `memory_s` fades."""
        interval = max(now - self._shown, 1e-9)
        new = 1.0 if self._speed == 0.0 else 1.0 - math.exp(-interval / memory_s)
        self._speed += new * (samples / interval - self._speed)

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Where the output takes no more (its reader is gone, its disk is full) the run goes on, in silence."""
        try:
            yield
        except OSError:
            self._live = None
            self._out = open(os.devnull, "w")  # noqa: SIM115
            if sys.stdout is not None and sys.stdout.fileno() == 1:
                os.dup2(self._out.fileno(), 1)  # what is still in the buffer would fail again at the end


class Progress(_Line):
    """Shows how far a run is.

    `total_steps`: of the whole run. `live`: whether in place, or line by line. `out`: stdout by default.
    """

    def __init__(self, total_steps: int, live: bool, out: TextIO | None = None) -> None:
        super().__init__(live, out)
        self._total = total_steps
        self._last: tuple[int, int, float, float] | None = None
        """The step that isn't shown yet: epoch, step, loss, rate."""
        self._steps = 0
        self._samples = 0

    def step(self, epoch: int, step: int, loss: float, rate: float, samples: int) -> None:
        """A step is done. `epoch` and `step` count from 1, `step` since the start of the run."""
        self._last = (epoch, step, loss, rate)
        self._steps += 1
        self._samples += samples
        if monotonic() >= self._due:
            self._show()

    def close(self) -> None:
        """Show the last step, and leave the line where it is."""
        self._show()
        super().close()

    def _show(self) -> None:
        if self._last is None:
            return
        now = monotonic()
        text = self._text(*self._last, now)
        self._last, self._samples = None, 0
        self._put(text, now)

    def _text(self, epoch: int, step: int, loss: float, rate: float, now: float) -> str:
        self._measure(self._samples, now, _MEMORY_S)
        left = timedelta(seconds=round((now - self._start) / self._steps * (self._total - step)))
        return (
            f"epoch {epoch}  step {step}/{self._total}  loss {loss:.4f}  lr {rate:.4g}  "
            f"{self._speed:,.0f} images/s  {left} left"
        )


class Packing(_Line):
    """Shows how far a packing is. `live`: whether in place, or line by line. `out`: stdout by default."""

    def __init__(self, live: bool, out: TextIO | None = None) -> None:
        super().__init__(live, out)
        self._done = 0
        """Samples, when the line was last shown."""

    def count(self, done: int, total: int) -> None:
        """`done` of `total` samples are packed."""
        now = monotonic()
        if now < self._due and (done < total or self._live is None):
            return
        self._measure(done - self._done, now, _LONG_MEMORY_S)
        self._done = done
        left = timedelta(seconds=round((total - done) / max(self._speed, 1e-9)))
        filled = _BAR * done // total
        self._put(
            f"packing {'━' * filled}{'─' * (_BAR - filled)} {done / total:4.0%}  {done:,} of {total:,} samples  "
            f"{self._speed:,.0f}/s  {left} left",
            now,
        )


def _one_line(text: str) -> "Text":
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


def _live_line(out: TextIO) -> "Live":
    """Rich's live display without its threads, and without taking over stdout, stderr and the cursor.

    An abort ends the process at once: nobody would give them back, and errors must reach stderr. The line has no end
    until it is done, so Open MPI's mpirun shows it only with `--output :raw`, else it waits for whole lines.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(file=out, force_terminal=True, width=terminal())
    live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    live.start()
    console.show_cursor(True)
    return live
