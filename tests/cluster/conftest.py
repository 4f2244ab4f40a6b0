"""One Slurm of our own for all tests of this folder that need one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpnn.comm.library import version

from . import local_slurm


def lines(kind: str, run: Path) -> list[dict]:
    """Of a run's metrics."""
    path = run / "metrics.jsonl"
    every = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, every) if line["kind"] == kind]


def plugin() -> str:
    """The plugin of srun that fits this environment's MPI."""
    return "pmix" if "Open MPI" in version() else "pmi2"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[local_slurm.LocalSlurm]:
    """A real Slurm of two nodes, n0 and n1, with two cores each."""
    why = local_slurm.missing()
    if why:
        pytest.skip(why)
    cluster = local_slurm.LocalSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def under_slurm(slurm, monkeypatch) -> local_slurm.LocalSlurm:
    """The same, and the environment in which this process, and so a job, meets it."""
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "OMPI_MCA", "PMIX_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", slurm.conf)
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    return slurm
