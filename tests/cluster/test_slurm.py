"""`dpnn submit`: the script it writes, and that script under a real Slurm with two nodes."""

import re
import subprocess
from contextlib import suppress
from pathlib import Path

import h5py
import pytest

from dpnn.cli import main
from dpnn.cluster.slurm import seconds
from dpnn.errors import JobError

from .conftest import lines, plugin

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("mpirun", pytest.param("srun", marks=pytest.mark.soak))
COMMON = ["--nodes", "2", "--ranks-per-node", "1", "--time", "10:00"]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """`dpnn submit job.toml ...` in an empty folder, without a site file of the user's."""
    job = (ROOT / "jobs" / "digits.toml").read_text()
    (tmp_path / "job.toml").write_text(job)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("DPNN_SITE", raising=False)

    def ask(*arguments: str, site: str = "") -> int:
        (tmp_path / "site.toml").write_text(site)
        return main(["submit", "job.toml", *COMMON, "--site", "site.toml", *arguments])

    return ask


@pytest.mark.parametrize(
    ("time", "wanted"),
    [("5", 300), ("5:30", 330), ("2:00:00", 7200), ("1-2", 93600), ("1-2:30", 95400), ("1-02:30:01", 95401)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(time, wanted):
    assert seconds(time) == wanted


@pytest.mark.parametrize("time", ["", "soon", "1:2:3:4", "-5"])
def test_another_time_is_refused(time):
    with pytest.raises(JobError, match="--time"):
        seconds(time)


def test_the_script_asks_for_what_was_asked(asked, capsys):
    options = ["--account", "chem", "--partition", "gpu", "--gpus-per-node", "4", "--cpus-per-rank", "8"]
    assert asked(*options, "--dry-run", "--", "--mail-type=END", "--comment=a b") == 0
    script = capsys.readouterr().out
    for line in (
        "--nodes=2", "--ntasks-per-node=1", "--time=10:00", "--account=chem", "--partition=gpu", "--gpus-per-node=4",
        "--cpus-per-task=8", "--signal=B:USR1@300", "--requeue", "--mail-type=END", "'--comment=a b'",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_the_site_file_says_how_ranks_are_started(asked, capsys):
    site = """
    [cluster]
    launcher = "srun --mpi=pmix"
    modules = ["openmpi/5.0"]
    setup = ["source ~/dpnn/bin/activate"]
    container = "apptainer exec dpnn.sif"
    stage = "$TMPDIR/dpnn"
    requeue = false
    sbatch = ["--exclusive"]
    """
    assert asked("--dry-run", site=site) == 0
    script = capsys.readouterr().out
    assert "module load openmpi/5.0\nsource ~/dpnn/bin/activate\n" in script
    assert "\nsrun --mpi=pmix --cpu-bind=none --kill-on-bad-exit=1 apptainer exec dpnn.sif dpnn " in script
    assert '--set "data.stage=$TMPDIR/dpnn"' in script
    assert "#SBATCH --no-requeue\n" in script
    assert "#SBATCH --exclusive\n" in script
    assert "scontrol requeue" not in script


def test_the_script_of_a_job_with_blanks_in_its_path_is_sound(asked, capsys, tmp_path):
    (tmp_path / "my 'jobs").mkdir()
    (tmp_path / "job.toml").rename(tmp_path / "my 'jobs" / "a job.toml")
    assert main(["submit", "my 'jobs/a job.toml", *COMMON, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH '--job-name=a job'\n" in script
    (line,) = (line for line in script.splitlines() if line.startswith("set -- "))
    words = subprocess.run(["bash", "-c", f'{line}; printf "%s" "$1"'], capture_output=True, text=True, check=True)
    assert words.stdout == "my 'jobs/a job.toml"


def test_servers_are_spread_over_the_nodes(asked, capsys):
    """Ranks are dealt in turn, since the last ones are the servers; but the parts of a replica stay together."""
    downpour = ["parallel.strategy=downpour", "parallel.servers=1"]
    downpour += ["train.global_batch=0", "train.replica_batch=8", "optimizer.momentum=0"]
    sets = [word for setting in downpour for word in ("--set", setting)]
    assert asked(*sets, "--dry-run") == 0
    assert "#SBATCH --distribution=cyclic\n" in capsys.readouterr().out
    assert (
        asked("--ranks-per-node", "3", *sets, "--set", "parallel.servers=2", "--set", "parallel.parts=2", "--dry-run")
        == 0
    )
    assert "distribution" not in capsys.readouterr().out
    assert asked("--dry-run") == 0
    assert "distribution" not in capsys.readouterr().out


def test_only_downpour_is_started_so_that_it_outlives_a_node(asked, capsys):
    site = '[cluster]\nlauncher = "srun --mpi=pmi2"'
    downpour = ["parallel.strategy=downpour", "parallel.servers=1"]
    downpour += ["train.global_batch=0", "train.replica_batch=8", "optimizer.momentum=0"]
    assert asked("--dry-run", *(word for setting in downpour for word in ("--set", setting)), site=site) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --no-kill\n" in script
    assert "\nexport SLURM_KILL_BAD_EXIT=0 SLURM_NO_KILL=set SLURM_WAIT=0" in script
    assert "--kill-on-bad-exit" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert asked("--dry-run", site=site) == 0
    script = capsys.readouterr().out
    assert "--no-kill" not in script
    assert "--kill-on-bad-exit=1" in script


def test_each_task_of_an_array_has_a_run_of_its_own(asked, capsys):
    assert asked("--array", "0-3", "--set", "seed=%a", "--dry-run") == 0
    script = capsys.readouterr().out
    assert 'run="runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in script
    assert '--set seed="$SLURM_ARRAY_TASK_ID"' in script
    assert 'requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in script


@pytest.mark.parametrize(
    ("arguments", "site", "culprit"),
    [
        (["--time", "4:00"], "", "--time 4:00 is no longer than the 300 s"),
        (["--nodes", "0"], "", "--nodes 0: 1 or more"),
        (["--set", "train.epoch=3"], "", "train.epoch = 3: there is no such key"),
        (["--set", "parallel.parts=3"], "", "parallel.parts = 3"),
        ([], "[cluster]\nmodule = ['x']", "cluster.module .* did you mean cluster.modules"),
        ([], "[cluster]\nlauncher = 'aprun'", 'cluster.launcher = "aprun"'),
        ([], "[cluster]\ncontainer = 'apptainer exec x.sif'", "cluster.container needs"),
        (["--site", "nowhere.toml"], "", "the site file nowhere.toml can't be read"),
        (["--array", "0-3", "--chain", "2"], "", "--chain"),
        (["--chain", "-1"], "", "--chain -1: 0 or more"),
        (["--cpus-per-rank", "-8"], "", "--cpus-per-rank -8: 0 or more"),
        (["--set", "seed=%a"], "", "seed=%a: .* --array 0-3"),
        (["--", "hetjob", "--nodes=1"], "", 'heterogeneous job .* cluster.launcher = "srun --mpi=pmix"'),
    ],
)
def test_what_can_not_work_is_refused_before_it_is_queued(asked, capsys, arguments, site, culprit):
    assert asked(*arguments, site=site) == JobError.exit_code
    assert re.search(culprit, capsys.readouterr().err)


def test_without_slurm_the_way_out_is_told(asked, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert asked() == JobError.exit_code
    assert "no sbatch on the PATH" in capsys.readouterr().err


@pytest.fixture
def submit(under_slurm, asked, capsys):
    """Submit a training of so many epochs; the numbers of the jobs."""

    def start(epochs: int, *arguments: str, launcher: str = "mpirun") -> list[str]:
        if not Path("data/digits").exists():
            assert main(["pack", "digits", "data/digits"]) == 0
        sets = [f"train.epochs={epochs}", "train.eval_every=0", "parallel.stall_abort_s=60"]
        options = [word for text in sets for word in ("--set", text)]
        assert asked(*options, *arguments, site=f'[cluster]\nlauncher = "{launcher}"') == 0
        return [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("submitted")]

    return start


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", LAUNCHERS)
def test_a_job_near_its_limit_is_queued_again_and_goes_on(slurm, submit, tmp_path, how):
    (job,) = submit(12, launcher=f"srun --mpi={plugin()}" if how == "srun" else how)
    run = tmp_path / "runs" / f"job-{job}"
    slurm.wait_for(lambda: lines("step", run), 60)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(lambda: slurm.state(job) == "PENDING", 60)
    assert lines("end", run)[-1]["exit"] == 75
    slurm.wait_until_left(job)
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # else in two minutes
    slurm.wait_for(lambda: slurm.state(job) == "COMPLETED", 100)
    starts, steps = lines("start", run), lines("step", run)
    assert len(starts) == 2
    assert all(line["ranks"] == 2 for line in starts)
    assert [line["step"] for line in steps] == list(range(1, starts[0]["total_steps"] + 1))
    assert lines("end", run)[-1]["exit"] == 0


@pytest.mark.timeout(120)
def test_a_chain_goes_on_with_one_run_and_its_rest_does_nothing(slurm, submit, tmp_path):
    first, second, third = submit(12, "--chain", "3")
    run = tmp_path / "runs" / f"job-{first}"
    slurm.wait_for(lambda: lines("step", run), 60)
    slurm.call("scancel", "--batch", "--signal=USR1", first)
    slurm.wait_for(lambda: slurm.state(third) == "COMPLETED", 80)
    assert [slurm.state(job) for job in (first, second)] == ["FAILED", "COMPLETED"]
    assert [line["exit"] for line in lines("end", run)] == [75, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.timeout(120)
def test_a_cancelled_job_leaves_a_checkpoint_and_is_not_queued_again(slurm, submit, tmp_path):
    (job,) = submit(3000)
    run = tmp_path / "runs" / f"job-{job}"
    slurm.wait_for(lambda: lines("step", run), 60)
    slurm.call("scancel", "--batch", "--signal=TERM", job)
    slurm.wait_for(lambda: slurm.state(job) == "FAILED", 30)
    assert "ExitCode=75:0" in slurm.call("scontrol", "show", "job", job)
    assert lines("end", run)[-1]["exit"] == 75
    assert list((run / "checkpoints").iterdir())


def bits(run: Path) -> dict[str, bytes]:
    """All numbers of a run's newest checkpoint: a file, or a folder of them."""
    newest, found = max((run / "checkpoints").iterdir()), {}
    for path in [newest] if newest.is_file() else sorted(newest.iterdir()):

        def keep(name: str, what: object, part: str = path.name if newest.is_dir() else "") -> None:
            if isinstance(what, h5py.Dataset) and name.startswith(("params/", "optimizer/")):
                found[part, name] = what[()].tobytes()

        with h5py.File(path) as file:
            file.visititems(keep)
    assert found
    return found


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("how", ["mpirun", "srun"])
def test_cut_by_slurms_own_time_limit_a_run_ends_with_the_same_bits(slurm, submit, tmp_path, how):
    """Slurm looks at time limits twice a minute: a signal 50 s before the end of a minute comes within 40 s.

    The other run is never cut. Both compute by the reference: what is chosen by timing could differ.
    """
    launcher = f"srun --mpi={plugin()}" if how == "srun" else how
    same = ["--set", "backend.name=reference", "--set", "parallel.bucket_mb=1", "--set", "backend.threads=1"]
    (whole,) = submit(200, *same, launcher=launcher)
    slurm.wait_for(lambda: slurm.state(whole) == "COMPLETED", 600)
    (job,) = submit(200, *same, "--time", "1", "--before", "50", launcher=launcher)
    run, other = (tmp_path / "runs" / f"job-{number}" for number in (job, whole))

    def ended() -> bool:
        if slurm.state(job) == "PENDING" and lines("end", run):
            slurm.wait_until_left(job)
            with suppress(RuntimeError):  # begun meanwhile, by itself
                slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # else in two minutes
        return any(line["exit"] != 75 for line in lines("end", run))

    slurm.wait_for(ended, 800)
    slurm.wait_for(lambda: slurm.state(job) == "COMPLETED", 30)
    *cut, last = [line["exit"] for line in lines("end", run)]
    assert cut, "it was never cut"
    assert {*cut} == {75}
    assert last == 0
    steps = [line["step"] for line in lines("step", run)]
    assert steps == list(range(1, len(lines("step", other)) + 1))
    assert bits(run) == bits(other)
