"""Runs whose ranks are killed at random moments, under `dpnn launch`; whom and when is drawn from a seed.

It is all done from outside: moments are counted by the books that the processes keep, processes are found in /proc.
"""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from tests.train import runs
from tests.train.accounts import Books

PROGRAMS = Path(__file__).parent / "programs"
LIMIT_S = 100
AT_ONCE, AT_THE_END = 0.25, 0.25
"""How often all that die in a run do so within some milliseconds; how often one dies when all batches are begun."""


@dataclass(frozen=True)
class Kill:
    """So many seconds after all processes together have begun so many batches."""

    rank: int
    batches: int
    delay_s: float
    signal: signal.Signals

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.signal.name}, {1000 * self.delay_s:.0f} ms after batch {self.batches}"


def draw(rng: random.Random, ranks: list[int], batches: int) -> list[Kill]:
    """A kill for each of the ranks, in any order, at any time of a run of so many batches, from the first one on."""
    moments = [(rng.randint(1, batches), rng.uniform(0, 0.02)) for _ in ranks]
    if rng.random() < AT_ONCE:
        moments = [(moments[0][0], delay_s) for _, delay_s in moments]
    if rng.random() < AT_THE_END:
        moments[-1] = batches, rng.uniform(0, 0.3)
    return [
        Kill(rank, moment, delay_s, rng.choice([signal.SIGKILL] * 4 + [signal.SIGSEGV]))
        for rank, (moment, delay_s) in zip(rng.sample(ranks, len(ranks)), sorted(moments), strict=True)
    ]


@dataclass
class Case:
    """A run on `ranks`, of which the last are `servers`."""

    ranks: int
    servers: int
    settings: tuple[str, ...]
    every: int
    """Steps from one average to the next; 0: nothing is averaged."""
    launch: tuple[str, ...]
    """What `dpnn launch` is told."""


@dataclass
class Outcome:
    """A run that has ended by itself, and of which nothing is left."""

    folder: Path
    books: Books
    killed: list[Kill] = field(default_factory=list)
    """Those that came before the process had ended by itself."""

    def told(self, kind: str) -> list[dict]:
        """Lines of a kind of metrics.jsonl."""
        return runs.told(self.folder, kind)

    def events(self, event: str) -> list[dict]:
        """Events of that name."""
        return runs.events(self.folder, event)

    @property
    def dead(self) -> set[int]:
        """The ranks that were killed."""
        return {kill.rank for kill in self.killed}


def run(
    start: Callable,
    job: SimpleNamespace,
    case: Case,
    kills: list[Kill],
    books: Path,
    env: dict[str, str],
    limit_s: float,
) -> Outcome:
    """Start a job (`start(*args, env)`: this Python with such arguments), kill, and see it end; what came of it."""
    books.mkdir()
    program = start(
        PROGRAMS / "launched.py", PROGRAMS / "counted.py", "launch", "-n", case.ranks, *case.launch, "train", job.path,
        *runs.words(*case.settings), env={"COUNTS": str(books), **env},
    )  # fmt: skip
    outcome = Outcome(job.out, Books(books, case.ranks))
    end = time.monotonic() + limit_s
    pids, shared = dict[int, int](), set[Path]()
    for kill in kills:
        while outcome.books.n_batches() < kill.batches and program.process.poll() is None:
            assert time.monotonic() < end, f"{kill} never came: {program.stderr}"
            time.sleep(0.005)
        if not pids:
            pids = program.pids()
            shared = {path for pid in pids.values() for path in shared_memory(pid)}
        time.sleep(kill.delay_s)
        if deadly(pids.get(kill.rank, 0), kill.signal):
            outcome.killed.append(kill)
    ended = program.finish(limit_s)
    program.until_gone(limit_s)
    assert ended.returncode == 0, ended.stderr
    left = [str(path) for path in shared if path.exists()]
    assert left == [], f"shared memory that is left: {left}"
    (begun,), (last,) = outcome.told("start"), outcome.told("end")
    how = f"exit {last['exit']} after {last['steps']} of {begun['total_steps']} steps"
    assert (last["exit"], last["steps"]) == (0, begun["total_steps"]), f"{how}: {ended.stderr}"
    return outcome


def deadly(pid: int, number: signal.Signals) -> bool:
    """Kill a process; whether that was what has ended it."""
    try:
        running = bool(pid) and Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
        if running:
            os.kill(pid, number)
    except (OSError, IndexError):
        return False
    return running


def shared_memory(pid: int) -> set[Path]:
    """Files in /dev/shm that a process has in its memory."""
    try:
        return set(map(Path, re.findall(r"/dev/shm/[^\s]+", Path(f"/proc/{pid}/maps").read_text())))
    except OSError:
        return set()
