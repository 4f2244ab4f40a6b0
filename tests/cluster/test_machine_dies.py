"""Machines that fail, under a real Slurm of two nodes: all that runs on one of them is killed at one moment.

Where MPI is Open MPI its runtime ends the job, which goes on from its checkpoint. With MPICH under `srun --mpi=pmi2`
Downpour goes on without a node that has only workers.
"""

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from dpnn.cli import main
from dpnn.comm.library import version
from dpnn.errors import RankError

from . import local_slurm
from .conftest import lines

ROOT = Path(__file__).parents[2]
SETS = (
    "parallel.strategy=downpour", "parallel.servers=1", "optimizer.lr=0.001", "train.eval_every=0",
    "parallel.stall_abort_s=20", "parallel.silence_s=3", "output.checkpoint_every=1", "backend.threads=1",
)  # fmt: skip
MPICH = pytest.mark.skipif("Open MPI" in version(), reason="Open MPI's runtime ends a job that has lost a node")
OPEN_MPI = pytest.mark.skipif("Open MPI" not in version(), reason="mpirun of Open MPI")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """One whose n1 has a network of its own, which can be cut."""
    why = local_slurm.missing() or ("" if shutil.which("ip") else "no iproute2")
    if why:
        pytest.skip(why)
    cluster = local_slurm.LocalSlurm(tmp_path_factory.mktemp("slurm"), apart=True)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def going(under_slurm, tmp_path, monkeypatch, capsys):
    """going(launcher, ranks, epochs, *settings) -> (a job that has taken steps and made a checkpoint, its run folder).

    Its ranks are dealt to n0 and n1 in turn; the last is the server. A node that was killed is there again afterwards.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DPNN_SITE", raising=False)
    assert main(["pack", "digits", "data/digits"]) == 0
    job = (ROOT / "jobs" / "digits.toml").read_text()
    (tmp_path / "job.toml").write_text(job.replace("global_batch = 64", "replica_batch = 16"))

    def start(launcher: str, ranks: int, epochs: int, *settings: str) -> tuple[str, Path]:
        (tmp_path / "site.toml").write_text(f'[cluster]\nlauncher = "{launcher}"\n')
        sets = [word for text in (*SETS, f"train.epochs={epochs}", *settings) for word in ("--set", text)]
        asked = ["--nodes", "2", "--ranks-per-node", "2", "--time", "10:00", "--site", "site.toml"]
        assert main(["submit", "job.toml", *asked, *sets, "--", f"--ntasks={ranks}"]) == 0
        (number,) = (line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("submitted"))
        run = tmp_path / "runs" / f"job-{number}"
        under_slurm.wait_for(lambda: any(line["event"] == "checkpoint" for line in lines("event", run)), 60)
        return number, run

    yield start
    for node in ("n0", "n1"):
        if not under_slurm.runs(node):
            under_slurm.start(node)
    under_slurm.wait_until_idle()


def rank_of(job: str, rank: int) -> int:
    """The process of a rank."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if wanted <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                return int(pid)
    raise LookupError(f"job {job} has no rank {rank}")


def events(run: Path, name: str) -> list[dict]:
    return [line for line in lines("event", run) if line["event"] == name]


def whole(run: Path) -> bool:
    """Whether the run has ended well, with all its steps."""
    start, end = lines("start", run)[-1], lines("end", run)[-1]
    return (end["exit"], end["steps"]) == (0, start["total_steps"])


@MPICH
@pytest.mark.timeout(120)
def test_a_killed_and_a_stopped_worker_are_known_by_their_silence(slurm, going):
    """The last one takes all steps that are left. And srun doesn't wait for who is stopped for ever."""
    job, run = going("srun --mpi=pmi2", 4, 12)
    os.kill(rank_of(job, 1), signal.SIGKILL)
    os.kill(rank_of(job, 2), signal.SIGSTOP)
    slurm.wait_for(lambda: slurm.state(job) in ENDS, 90)
    assert slurm.state(job) == "COMPLETED"
    assert whole(run)
    lost = {event["rank"]: event["reason"] for event in events(run, "worker_lost")}
    assert lost == dict.fromkeys((1, 2), "it said nothing for 3 s")
    slurm.wait_until_left(job)
    with pytest.raises(LookupError):
        rank_of(job, 2)


@MPICH
@pytest.mark.timeout(120)
def test_where_a_machine_with_workers_dies_the_others_go_on(slurm, going):
    """Also when Slurm has noticed that the node is down."""
    job, run = going("srun --mpi=pmi2", 3, 12)
    slurm.kill("n1")
    slurm.wait_for(lambda: events(run, "worker_lost"), 30)
    slurm.call("scontrol", "update", "NodeName=n1", "State=down", "Reason=dead")
    slurm.wait_for(lambda: slurm.state(job) in ENDS, 60)
    assert slurm.state(job) == "COMPLETED"
    assert whole(run)
    assert [event["rank"] for event in events(run, "worker_lost")] == [1]


@OPEN_MPI
@pytest.mark.soak
@pytest.mark.timeout(120)
def test_where_srun_ends_all_ranks_with_the_first_that_dies_the_job_is_queued_again(slurm, going):
    job, run = going("srun --mpi=pmix", 4, 12)
    os.kill(rank_of(job, 1), signal.SIGKILL)
    slurm.wait_for(lambda: slurm.state(job) == "PENDING", 60)
    assert not lines("end", run)
    slurm.call("scancel", job)
    slurm.wait_until_left(job)


@pytest.mark.parametrize("launcher", [
    pytest.param("srun --mpi=pmi2", marks=MPICH),
    pytest.param("mpirun", marks=[OPEN_MPI, pytest.mark.soak]),
    pytest.param("srun --mpi=pmix", marks=[OPEN_MPI, pytest.mark.soak]),
])  # fmt: skip
@pytest.mark.timeout(180)
def test_a_job_that_has_lost_the_machine_with_its_server_goes_on_from_a_checkpoint(slurm, going, launcher):
    """It ends, though nobody tells it of the loss, and is queued again."""
    job, run = going(launcher, 4, 12)
    slurm.kill("n1")
    slurm.wait_for(lambda: lines("end", run), 60)
    assert [line["exit"] for line in lines("end", run)] == [RankError.exit_code]
    slurm.start("n1")
    slurm.wait_for(lambda: slurm.state(job) == "PENDING", 60)
    slurm.wait_until_left(job)
    slurm.wait_until_idle()
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # else in two minutes
    slurm.wait_for(lambda: slurm.state(job) == "COMPLETED", 100)
    assert len(lines("start", run)) == 2
    assert lines("start", run)[-1]["from_step"] > 0
    assert whole(run)
