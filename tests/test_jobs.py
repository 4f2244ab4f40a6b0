"""What lies in jobs/ is good: job files as they are. Its batch scripts: tests/cluster/test_batch_scripts.py."""

from pathlib import Path

import pytest

from dpnn import config

JOBS = Path(__file__).parents[1] / "jobs"
FILES = sorted(path for path in JOBS.glob("*.toml") if path.name != "site.toml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_job_file_is_a_job(file):
    assert config.load(file).model.name == "lenet"
