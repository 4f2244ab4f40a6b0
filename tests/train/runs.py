"""What tests of whole runs tell them, and read of what they have told."""

from pathlib import Path

import pytest
from mpi4py import MPI

from dpnn.observe import metrics

TOLERANT = pytest.mark.skipif(
    "Open MPI v5" not in MPI.Get_library_version(), reason="only Open MPI 5 tells of processes that have died"
)


def words(*settings: str) -> list[str]:
    """Settings as a command line has them."""
    return [word for setting in settings for word in ("--set", setting)]


def told(folder: Path, kind: str) -> list[dict]:
    """Lines of a kind of a run's metrics."""
    return [line for line in metrics.read(folder / "metrics.jsonl") if line["kind"] == kind]


def events(folder: Path, name: str) -> list[dict]:
    """Events of that name."""
    return [line for line in told(folder, "event") if line["event"] == name]
