"""What a run tells of itself, on the first rank: `metrics.jsonl` for programs, progress for people."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

import numpy as np

from dpnn import __version__
from dpnn.data import Bad
from dpnn.observe.folder import RunFolder
from dpnn.observe.metrics import Metrics
from dpnn.observe.progress import Progress, terminal


@dataclass(frozen=True)
class Took:
    """The seconds that one step took: in all, and its parts."""

    step: float
    read: float
    """Waiting for the batch."""
    wait: float
    """Waiting for other ranks, after the backward pass."""
    update: float

    @property
    def compute(self) -> float:
        """All that is none of the parts."""
        return self.step - self.read - self.wait - self.update


class Journal:
    """Tells of a run of `total_steps`; on ranks other than the first (`first` is False) every call does nothing."""

    def __init__(self, folder: RunFolder, total_steps: int, first: bool) -> None:
        self._folder, self._total, self._first = folder, total_steps, first
        self._metrics = Metrics(folder.metrics if first else None)
        self._progress = Progress(total_steps, live=terminal() is not None) if first else None

    def start(self, text: str, **values: Any) -> None:
        """The run starts, or goes on."""
        versions = {"dpnn": __version__, "python": platform.python_version(), "numpy": np.__version__}
        self._metrics.write("start", **versions, **values, total_steps=self._total)
        self._say(text)

    def step(self, epoch: int, step: int, loss: float, lr: float, samples: int, took: Took, **values: Any) -> None:
        """A step was taken. `epoch` and `step` count from 1, `step` since the start of the run."""
        if self._progress is None:
            return
        self._metrics.write(
            "step", step=step, epoch=epoch, loss=loss, lr=lr, images_s=samples / took.step,
            read=took.read, compute=took.compute, wait=took.wait, update=took.update, **values,
        )  # fmt: skip
        self._progress.step(epoch, step, loss, lr, samples)

    def scores(self, text: str, epoch: int, step: int, **values: Any) -> None:
        """The network was evaluated after `epoch` epochs and `step` steps."""
        self._metrics.write("eval", epoch=epoch, step=step, **values)
        self._say(f"epoch {epoch}: {text}")

    def flush(self) -> None:
        """Write what is kept back: what a checkpoint holds is told before, since a killed run goes on behind it."""
        self._metrics.flush()

    def event(self, event: str, text: str = "", **values: Any) -> None:
        """Something else happened; `text` is for people, where they should know."""
        self._metrics.write("event", event=event, **values)
        if text:
            self._say(text)

    def bad_samples(self, bad: Sequence[Bad]) -> None:
        """Bad samples were skipped, on this rank, whichever it is."""
        if bad:
            metrics = self._metrics if self._first else Metrics(self._folder.metrics)
            for sample in bad:
                metrics.write("event", event="bad_sample", **sample._asdict())
                self._say(f"skipped a bad sample: {sample}")
            if not self._first:
                metrics.close()

    def end(self, steps: int, samples: int, bad_samples: int, seconds: float, code: int) -> None:
        """The run has ended with this exit code; `steps` since the start of the run, all else since this start."""
        values = {"seconds": seconds, "images_s": samples / seconds, "bad_samples": bad_samples}
        self._metrics.write("end", steps=steps, **values, exit=code)
        self.close()
        path = self._folder.path
        if code and self._first:
            left = f"stopped after step {steps} of {self._total}; go on with: dpnn train --resume {quote(str(path))}"
            print(f"dpnn: {left}", file=sys.stderr, flush=True)
        self._say(f"run folder: {path}")

    def close(self) -> None:
        """Write what is kept back, and leave the terminal alone."""
        self._metrics.close()
        if self._progress:
            self._progress.close()

    def _say(self, text: str) -> None:
        if self._progress:
            self._progress.say(text)
