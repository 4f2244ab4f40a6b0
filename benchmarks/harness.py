"""How every benchmark measures and reports (DESIGN, section 10).

Ours and the peer take turns, so that a busy machine slows both. In one process the best time of each counts
(`alternate`); long cases have a process for each side (`Worker`), and the median counts (`medians`). A ratio above 1
always means that ours is better. A goal is a ratio; whether it is met changes nothing but the word printed.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self
from unittest import mock

TURN_S = 0.2
"""A turn of `medians` lasts at least about so long."""
RATE = 1e-6
"""The learning rate of both sides of a step: so small that the loss stays as it is. The same few images again and again
would soon leave no gradient, and what is measured then are the smallest numbers, which processors are slow with."""
PAUSE_S = 0.2
"""Between two turns: OpenBLAS's threads go on looking for work for a tenth of a second."""


@dataclass(frozen=True)
class Row:
    """One case. `ours` and `peer` in `unit`."""

    case: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    ratio: float
    goal: float

    def __str__(self) -> str:
        word = "met" if self.ratio >= self.goal else "short"
        return (
            f"{self.case:<40} {self.ours:>10.4g} {self.peer:>10.4g} {self.unit:<9} {self.peer_name:<28} "
            f"{self.ratio:>6.2f} {self.goal:>5.2f} {word}"
        )


class Benchmark:
    """One program: its options `--quick` and `--json FILE`, its rows, its report.

    `options`: more options, by name, each with what `add_argument` takes; their values are in `self.options`. The
    JSON file is written anew with every row: a long run that is cut short leaves what it has found.
    """

    def __init__(
        self,
        name: str,
        description: str,
        packages: Sequence[str] = ("numpy",),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
        parser.add_argument("--json", metavar="FILE", help="write the rows, with machine and versions")
        for option, takes in (options or {}).items():
            parser.add_argument(option, **takes)
        self.options = parser.parse_args()
        self.quick: bool = self.options.quick
        self._json: Path | None = Path(self.options.json).resolve() if self.options.json else None
        self._head = {"benchmark": name, "machine": machine(), "versions": versions(packages)}
        self.rows: list[Row] = []
        self.notes: list[str] = []
        print(f"{'case':<40} {'ours':>10} {'peer':>10} {'unit':<9} {'peer is':<28} {'ratio':>6} {'goal':>5}")

    def compare(
        self,
        case: str,
        ours: Callable[[], object],
        peer: Callable[[], object],
        peer_name: str,
        goal: float,
        work: float = 0.0,
        unit: str = "s",
        repeat: int | None = None,
    ) -> Row:
        """Time both, alternating; `work`: units done in one call, for a rate (GB/s) in place of seconds."""
        times = alternate([ours, peer], repeat or (5 if self.quick else 20))
        mine, theirs = (work / t if work else t for t in times)
        return self.record(case, mine, theirs, peer_name, goal, unit, more_is_better=bool(work))

    def record(
        self, case: str, ours: float, peer: float, peer_name: str, goal: float, unit: str, more_is_better: bool = False
    ) -> Row:
        """A row from figures measured elsewhere."""
        row = Row(case, ours, peer, peer_name, unit, ours / peer if more_is_better else peer / ours, goal)
        self.rows.append(row)
        print(row, flush=True)
        self.finish()
        return row

    def note(self, text: str) -> None:
        """A line that isn't a row: what was left out, or what lies behind a row."""
        self.notes.append(text)
        print(f"  {text}", flush=True)
        self.finish()

    def finish(self) -> None:
        """Write the JSON file, where one is asked for."""
        if self._json is None:
            return
        report: dict[str, Any] = {**self._head, "rows": [asdict(row) for row in self.rows]}
        if self.notes:
            report["notes"] = self.notes
        whole = self._json.with_name(self._json.name + ".part")
        whole.write_text(json.dumps(report, indent=1) + "\n")
        whole.replace(self._json)


class WorkerEnded(RuntimeError):
    """The process of a worker is gone."""


class Worker:
    """An object in a process of its own, whose methods are called by name.

    `make(*args)` makes it over there, where OpenMP and OpenBLAS find `threads` when they are loaded. RuntimeError where
    that or a call raises, WorkerEnded where the process dies (mostly for want of memory). Programs that read
    `peak_nbytes` stay small themselves: Linux counts what a process was forked from as its own.
    """

    def __init__(self, name: str, make: Callable[..., object], *args: object, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self.peak_nbytes = 0
        """The most memory that the process had until its last answer (resident)."""
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        with mock.patch.dict(os.environ, OMP_NUM_THREADS=str(threads)):
            self._process.start()
        theirs.close()
        self.pid = self._process.pid
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def call(self, method: str, *args: object) -> Any:
        """What the method returns."""
        return self._ask(method, args, 1)[0]

    def seconds(self, method: str, number: int) -> float:
        """What one call takes, the mean over `number` calls; what it takes to ask for them isn't counted."""
        return self._ask(method, (), number)[1]

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _ask(self, method: str, args: tuple[object, ...], number: int) -> tuple[Any, float]:
        with suppress(BrokenPipeError):  # what is missed is the answer
            self._pipe.send((method, args, number))
        return self._answer()

    def _answer(self) -> tuple[Any, float]:
        try:
            error, result, seconds, self.peak_nbytes = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            raise WorkerEnded(f"{self._name}: its process ended, exit code {self._process.exitcode}") from None
        if error:
            raise RuntimeError(f"{self._name}:\n{error}")
        return result, seconds


def _serve(pipe: Connection, make: Callable[..., object], args: tuple[object, ...]) -> None:
    """The process of a worker. Answers are (error, result, seconds, peak memory); the first one is `make`'s."""
    it: object = None
    question: tuple[str, tuple[object, ...], int] | None = ("", args, 1)
    with suppress(EOFError):
        while question is not None:
            method, args, number = question
            error, result, begin = "", None, time.perf_counter()
            try:
                if method:
                    call = getattr(it, method)
                    for _ in range(number):
                        result = call(*args)
                else:
                    it = make(*args)
            except Exception:
                error = traceback.format_exc()
            seconds = (time.perf_counter() - begin) / number
            pipe.send((error, result, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
            question = pipe.recv()


def medians(calls: Sequence[Callable[[int], float]], budget_s: float, least: int = 3, most: int = 25) -> list[float]:
    """The median time of each call, in seconds.

    A call is told how often to repeat itself in a turn, and returns the seconds that once took (`Worker.seconds`).
    Turns go round for about `budget_s` seconds, but at least `least` and at most `most` times. Long calls are warm
    before: what tells how long they are counts as their first turn.
    """
    begin = time.perf_counter()
    once = [call(1) for call in calls]
    numbers = [max(1, round(TURN_S / seconds)) for seconds in once]
    rounds = [once] if max(numbers) == 1 else []
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() - begin < budget_s):
        rounds.append([])
        for call, number in zip(calls, numbers, strict=True):
            time.sleep(PAUSE_S)
            rounds[-1].append(call(number))
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def alternate(calls: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """The best time of each call, in seconds; a call that is too short to time is repeated within a turn."""
    numbers = []
    for call in calls:
        call()
        numbers.append(max(1, int(0.01 / max(_time(call, 1), 1e-7))))
    best = [float("inf")] * len(calls)
    for _ in range(repeat):
        for i, call in enumerate(calls):
            best[i] = min(best[i], _time(call, numbers[i]))
    return best


def machine() -> dict[str, str | int]:
    """Processor, cores that this process may use, system."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"processor": model, "cores": cores(), "system": platform.platform()}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python, of the packages that matter, and the commit where the code is a git checkout."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


def _time(call: Callable[[], object], number: int) -> float:
    begin = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - begin) / number
