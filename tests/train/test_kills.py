"""kill -9 at random moments, again and again: what comes out is a run that nobody disturbed, bit for bit.

When, and whom, is drawn from a printed seed. The test looks on from outside and kills from outside.
"""

import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpnn import checkpoint
from dpnn.observe import metrics
from tests.soak import write_down

ROOT = Path(__file__).parents[2]
LAUNCHING = ROOT / "tests" / "comm" / "programs" / "launching.py"
NETWORKS = Path(__file__).parent / "networks.py"
SAMPLES, EPOCH, STEPS = 231, 15, 30
CADENCE = 2
"""Steps from one checkpoint to the next."""
LIMIT_S = 60
OFTEN = f"output.checkpoint_every={CADENCE / EPOCH}"
SINGLE = "backend.threads=1"
"""Case -> (ranks, settings). BatchNorm, dropout, augmentation, momentum and weight decay are on."""
CASES = {
    "allreduce": (2, ()),
    "average": (
        2,
        (
            f"model.name={NETWORKS}:heads",
            "parallel.strategy=average",
            f"parallel.every={CADENCE}",
            "parallel.state=average",
        ),
    ),
    "parts": (2, ("parallel.parts=2", "parallel.placement=depth", "parallel.microbatches=2")),
    "downpour": (
        2,
        (
            f"model.name={NETWORKS}:heads",
            "data.lanes=1",
            SINGLE,
            "train.global_batch=0",
            "train.replica_batch=16",
            "parallel.strategy=downpour",
            "parallel.servers=1",
            "parallel.fetch_ahead=0",
        ),
    ),
}
SOAKED = {"allreduce": 14, "average": 10, "parts": 9, "downpour": 7}
"""Runs of each case, each with so many kills:"""
KILLS = 5


@dataclass(frozen=True)
class Moment:
    """When, and whom.

    `sight`: "start"; "step" and "writing", once a checkpoint of at least `step` is there, or is being written; "end",
    once the run has told its end. `delay_s`: from then on. `whom`: "rank 1", "ranks" (all), "launcher", "everything".
    """

    sight: str
    step: int
    delay_s: float
    whom: str

    def __str__(self) -> str:
        at = f" {self.step}" if self.step else ""
        return f"{self.whom} {1000 * self.delay_s:.0f} ms after {self.sight}{at}"


def draw(seed: int) -> list[Moment]:
    """Each kill in its own part of the run; one of them as it starts, one of them at its end, or in an evaluation."""
    rng = random.Random(seed)
    steps = [rng.randrange(STEPS * i // KILLS, STEPS * (i + 1) // KILLS) for i in range(KILLS)]
    sights = ["start", *rng.choices(["step", "writing"], k=KILLS - 2)]
    rng.shuffle(sights)
    longest = {"start": 2.0, "step": 0.02, "writing": 0.004, "end": 0.1}
    moments = []
    for sight, step in zip([*sights, rng.choice(["end", "step"])], steps, strict=True):
        whom = rng.choice([f"rank {rng.randrange(2)}", "ranks", "launcher", "everything"])
        step = EPOCH * rng.randrange(1, 3) if sight == "step" and rng.random() < 0.3 else step  # evaluation follows
        step = step if sight in ("step", "writing") else 0
        moments.append(Moment(sight, step, rng.uniform(0, longest[sight]), whom))
    return moments


class Killed:
    """A run that is killed and resumed. `start(*args)`: starts a program on the ranks; `seen`: a folder."""

    def __init__(self, start: Callable, run, words: list[str], seen: Path) -> None:
        self._start, self._run, self._words, self._seen = start, run, words, seen
        self.folder: Path = run.out
        self.checkpoints = run.out / "checkpoints"
        self._starts, self._left = 0, dict[str, int]()
        self.kills = 0

    def through(self, moment: Moment) -> None:
        """Start, or go on; and kill. A run that ends before is started once more, and killed as it starts."""
        program, since = self.go_on(), self._nbytes()
        if moment.sight != "start":
            program.wait_for("parameters, on ")
        pids, until = program.pids(), time.monotonic() + LIMIT_S
        while not self._seen_of(moment, since):
            if program.process.poll() is not None:
                assert program.finish().returncode == 0, program.stderr
                return self.through(Moment("start", 0, moment.delay_s, "everything"))
            assert time.monotonic() < until, f"{moment} never came"
            time.sleep(0.001)
        time.sleep(moment.delay_s)
        self._kill(program, moment.whom, pids)
        code = program.finish(LIMIT_S).returncode
        program.until_gone(LIMIT_S)
        assert code != 75, program.stderr
        self.kills += 1
        self._check_checkpoints()
        return None

    def go_on(self):
        seen = self._seen / f"{self._starts:03d}"
        seen.mkdir(parents=True)
        self._starts += 1
        begun = (self.folder / "job.toml").exists()
        line = ("--resume", self.folder) if begun else (self._run.path, *self._words)
        return self._start("train", *line, env={"SEEN": str(seen)})

    def finish(self) -> None:
        ended = self.go_on().finish(60)
        assert ended.returncode == 0, ended.stderr
        newest = self._newest()
        assert newest == STEPS
        # What killed writers left was cleared up by the next one.
        hidden = {path.name for path in self.checkpoints.glob(".*")}
        assert [name for name, at in self._left.items() if name in hidden and at < newest] == []

    def _seen_of(self, moment: Moment, since: int) -> bool:
        if moment.sight == "start":
            return True
        if moment.sight == "end":
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(since)
                return b'"kind":"end"' in file.read()
        hidden = ".step-*" if moment.sight == "writing" else "step-*"
        return any(number(path) >= moment.step for path in self.checkpoints.glob(hidden))

    def _kill(self, program, whom: str, pids: dict[int, int]) -> None:
        pids = pids or program.pids()
        if whom == "launcher":
            program.signal(signal.SIGKILL)
        elif whom == "everything" or not pids:
            program.kill()
        for rank, pid in pids.items():
            if whom in ("ranks", f"rank {rank}"):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    assert program.process.poll() is not None or rank not in program.pids()

    def _check_checkpoints(self) -> None:
        """Those that have their name are good. What is hidden is a killed writer's, and is noted."""
        paths = list(self.checkpoints.iterdir()) if self.checkpoints.exists() else []
        for path in paths:
            if path.name.startswith("."):
                self._left.setdefault(path.name, self._newest())
            else:
                assert checkpoint.read(path).steps == number(path)

    def _newest(self) -> int:
        return max(map(number, self.checkpoints.glob("step-*")), default=0)

    def _nbytes(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0


def number(path: Path) -> int:
    return int(path.name.lstrip(".")[5:14])


def check_steps(folder: Path, undisturbed: Path) -> int:
    """Every step is told, and whenever it was taken its loss was that of the undisturbed run; how many were told."""
    told, wanted = (metrics.read(run / "metrics.jsonl") for run in (folder, undisturbed))
    losses = {line["step"]: line["loss"] for line in wanted if line["kind"] == "step"}
    taken = [(line["step"], line["loss"]) for line in told if line["kind"] == "step"]
    assert {step for step, _ in taken} == set(range(1, STEPS + 1))
    assert [(step, loss) for step, loss in taken if loss != losses[step]] == []
    scores = [{line["epoch"]: line["loss"] for line in lines if line["kind"] == "eval"} for lines in (told, wanted)]
    assert scores[0] == scores[1]
    return len(taken)


def check_samples(seen: Path) -> None:
    """Where a step was taken several times the last time counts: so every sample of an epoch was seen once."""
    batches: dict[tuple[int, int], list[int]] = {}
    for start in sorted(seen.iterdir()):
        now = defaultdict(list)
        for path in start.iterdir():
            for line in path.read_text().splitlines():
                epoch, step, *ids = map(int, line.split())
                now[epoch, step] += ids
        batches |= now
    for epoch in range(STEPS // EPOCH):
        ids = [one for step in range(EPOCH) for one in batches[epoch, step]]
        assert sorted(ids) == list(range(SAMPLES))


@pytest.fixture
def killed_at(start_python, trained, identical, job, watched, tmp_path):
    """killed_at(case, seed) -> how many kills: a whole run, killed and resumed, held against an undisturbed one."""

    def run(case: str, seed: int) -> int:
        ranks, settings = CASES[case]
        moments = draw(seed)
        print(f"{case}, seed {seed}: {'; '.join(map(str, moments))}")
        undisturbed = trained(ranks, OFTEN, *settings)
        words = [word for setting in (OFTEN, *settings) for word in ("--set", setting)]
        seen = tmp_path / f"seen-{case}-{seed}"
        name = f"{case}-{seed}"
        killed = Killed(
            lambda *args, **how: start_python(LAUNCHING, ranks, watched, *args, **how),
            job(name, out=f"run-{name}"), words, seen,
        )  # fmt: skip
        for moment in moments:
            killed.through(moment)
        killed.finish()
        n = identical(killed.folder, undisturbed)
        print(f"{killed.kills} kills: {n} numbers, none of whose bits differ (limit 0)")
        if case != "downpour":  # there a step isn't the worker's, but the servers'
            check_steps(killed.folder, undisturbed)
            check_samples(seen)
        return killed.kills

    return run


@pytest.mark.mpi
def test_five_kills_leave_no_trace(killed_at):
    assert killed_at("allreduce", 2026) == KILLS


@pytest.mark.mpi
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_hundred_kills_leave_no_trace(killed_at):
    """In every strategy, where its runs can be repeated to the bit. Written down with commit and seeds."""
    rows, seed = [], 0
    for case, runs in SOAKED.items():
        for _ in range(runs):
            seed += 1
            kills = killed_at(case, seed)
            rows.append({"case": case, "seed": seed, "kills": kills, "moments": [*map(str, draw(seed))]})
            write_down("soak-kills", rows)
    assert sum(row["kills"] for row in rows) == 200
