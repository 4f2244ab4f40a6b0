"""What soak tests leave: the results of their runs in `benchmarks/results/`, with commit and seeds."""

import json
from pathlib import Path

from benchmarks.harness import machine, versions

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def write_down(name: str, rows: list[dict]) -> None:
    """Each row is a run that came out as it has to, with so many `kills`. Written anew with every row."""
    head = {"benchmark": name, "machine": machine(), "versions": versions(("numpy", "mpi4py"))}
    report = {**head, "kills": sum(row["kills"] for row in rows), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
