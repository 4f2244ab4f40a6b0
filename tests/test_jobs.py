"""What lies in jobs/ is good: job files as they are, and what a batch script would have its ranks do."""

import os
import subprocess
from pathlib import Path

import pytest

from dpnn import cli, config

JOBS = Path(__file__).parents[1] / "jobs"
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$LINE"
"""


@pytest.mark.parametrize("file", sorted(JOBS.glob("*.toml")), ids=lambda file: file.stem)
def test_a_job_file_is_a_job(file):
    assert config.load(file).model.name == "lenet"


def test_the_script_for_gpus_starts_a_job_on_them(tmp_path, monkeypatch, capsys):
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LINE": str(tmp_path / "line")}
    job = tmp_path / "job.toml"
    job.write_text((JOBS / "digits.toml").read_text().replace("data/digits/train", "digits"))
    subprocess.run(["bash", JOBS / "gpu.sbatch", job, "--set", "train.epochs=1"], env=env, check=True, timeout=30)
    line = (tmp_path / "line").read_text().split("\n")[:-1]
    command = line.index("dpnn")
    assert all(word.startswith("--") for word in line[:command])
    assert line[command + 1] == "train"
    monkeypatch.chdir(tmp_path)  # where the digits are packed
    assert cli.main(["plan", *line[command + 2 :]]) == 0
    assert "lenet" in capsys.readouterr().out
