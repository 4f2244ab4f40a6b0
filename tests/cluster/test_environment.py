"""`cluster.environment`: a packed venv that the batch script of `dpnn submit` unpacks on each node's own disk."""

import re
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from dpnn.cli import main
from dpnn.errors import JobError

from .conftest import lines, plugin

ROOT = Path(__file__).parents[2]
SETS = ("train.epochs=2", "train.eval_every=0", "parallel.stall_abort_s=60")
REQUEST = ["--nodes", "2", "--ranks-per-node", "1", "--time", "10:00", *(w for text in SETS for w in ("--set", text))]


@pytest.fixture
def packed(tmp_path) -> Path:
    """A venv that finds this environment's packages, packed; where it was made there is nothing any more."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text(f"{ROOT}\nimport site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    archive = tmp_path / "env.tar.gz"
    subprocess.run(["tar", "-C", venv, "-czf", archive, "."], check=True, timeout=60)
    venv.rename(tmp_path / "elsewhere")
    return archive


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    """submit(site, *arguments) -> (exit code, stdout, stderr) of `dpnn submit job.toml`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text((ROOT / "jobs" / "digits.toml").read_text())

    def ask(site: str, *arguments: str) -> tuple[int, str, str]:
        (tmp_path / "site.toml").write_text(f"[cluster]\n{site}\n")
        capsys.readouterr()
        code = main(["submit", "job.toml", *REQUEST, "--site", "site.toml", *arguments])
        return (code, *capsys.readouterr())

    return ask


@pytest.mark.timeout(180)
@pytest.mark.parametrize("launcher", ["srun", pytest.param("mpirun", marks=pytest.mark.soak)])
def test_a_job_trains_from_the_nodes_own_disks_and_leaves_nothing_there(
    under_slurm, submit, packed, tmp_path, monkeypatch, launcher
):
    monkeypatch.setenv("TMPDIR", str(under_slurm.disk))
    monkeypatch.setenv("SITE", str(packed.parent))
    own = [library for name in ("libmpi.so.40", "libmpi.so.12") if (library := Path(sys.prefix, "lib", name)).exists()]
    for library in own:  # that of a wheel isn't packed; the system may have another
        monkeypatch.setenv("MPI4PY_LIBMPI", str(library))
    assert main(["pack", "digits", "data/digits"]) == 0
    line = f"srun --mpi={plugin()}" if launcher == "srun" else launcher
    code, told, _ = submit(f'launcher = "{line}"\nenvironment = "$SITE/{packed.name}"\nsbatch = ["--output=out"]')
    assert code == 0
    job = told.split()[-1]
    folders = [under_slurm.folder / "tmp" / node / f"dpnn-{job}" for node in ("n0", "n1")]
    under_slurm.wait_for(lambda: all((folder / "bin" / "python").exists() for folder in folders), 60)
    under_slurm.wait_for(lambda: under_slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 100)
    assert under_slurm.state(job) == "COMPLETED", (tmp_path / "out").read_text()
    run = tmp_path / "runs" / f"job-{job}"
    (start,), (end,) = lines("start", run), lines("end", run)
    assert (start["ranks"], end["exit"]) == (2, 0)
    assert not any(folder.exists() for folder in folders)


@pytest.mark.timeout(120)
def test_a_job_that_can_not_unpack_it_ends_and_says_so(under_slurm, submit, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "no such folder"))
    _, told, _ = submit(f'environment = "{packed}"\nsbatch = ["--output=out"]')
    job = told.split()[-1]
    under_slurm.wait_for(lambda: under_slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 60)
    assert "ExitCode=4:0" in under_slurm.call("scontrol", "show", "job", job)
    assert f"{packed} can't be unpacked in {tmp_path}/no such folder of each node" in (tmp_path / "out").read_text()


def test_the_script_uses_it_and_nothing_else(submit, packed):
    code, script, _ = submit(f'environment = "{packed}"\nmodules = ["python/3.11"]', "--dry-run")
    assert code == 0
    assert '"$environment/bin/python" -P -m dpnn launch -n "$SLURM_NTASKS" train' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False, timeout=30).returncode == 0


@pytest.fixture
def no_environment(tmp_path) -> Path:
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "LICENSE", "venv/bin/python")
    return tmp_path / "other.tar.gz"


@pytest.mark.parametrize(
    ("site", "arguments", "culprit"),
    [
        ('environment = "nowhere.tar"', [], r"cluster.environment: nowhere.tar can't be read .* tar -C VENV -czf"),
        ('environment = "job.toml"', [], r"cluster.environment: job.toml can't be read"),
        ('environment = "other.tar.gz"', [], r"other.tar.gz has no bin/python at its top; pack one with"),
        ('environment = "e"\ncontainer = "c"\nlauncher = "srun"', [], r"leave out cluster.environment"),
        ('environment = "e"\nlauncher = "srun"', ["--", "hetjob", "--nodes=1"], r"heterogeneous .* cluster.container"),
    ],
)
def test_what_can_not_work_is_refused_before_it_is_queued(submit, no_environment, site, arguments, culprit):
    code, _, told = submit(site, "--dry-run", *arguments)
    assert code == JobError.exit_code
    assert re.search(culprit, told)
