"""How every benchmark measures and reports (DESIGN, section 10).

Ours and the peer take turns in one process, so that a busy machine slows both; the best time of each counts. A ratio
above 1 always means that ours is better. A goal is a ratio; whether it is met changes nothing but the word printed.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


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
            f"{self.case:<40} {self.ours:>10.4g} {self.peer:>10.4g} {self.unit:<9} {self.peer_name:<24} "
            f"{self.ratio:>6.2f} {self.goal:>5.2f} {word}"
        )


class Benchmark:
    """One program: its options `--quick` and `--json FILE`, its rows, its report."""

    def __init__(self, name: str, description: str, packages: Sequence[str] = ("numpy",)) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
        parser.add_argument("--json", metavar="FILE", help="write the rows, with machine and versions")
        options = parser.parse_args()
        self.quick: bool = options.quick
        self._json: Path | None = Path(options.json).resolve() if options.json else None
        self._name, self._packages = name, packages
        self.rows: list[Row] = []
        print(f"{'case':<40} {'ours':>10} {'peer':>10} {'unit':<9} {'peer is':<24} {'ratio':>6} {'goal':>5}")

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
        return row

    def finish(self) -> None:
        """Write the JSON file, where one is asked for."""
        if self._json is None:
            return
        report = {
            "benchmark": self._name,
            "machine": machine(),
            "versions": versions(self._packages),
            "rows": [asdict(row) for row in self.rows],
        }
        self._json.write_text(json.dumps(report, indent=1) + "\n")


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"processor": model, "cores": cores, "system": platform.platform()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python, of the packages that matter, and the commit where the code is a git checkout."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        found[package] = importlib.metadata.version(package)
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
