"""The batch scripts of jobs/: they are what `dpnn submit` writes, and they run, under a real Slurm with two nodes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dpnn.cli import main
from dpnn.cluster.site import read_site

from .conftest import lines, plugin

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
MADE = "# Made by: dpnn "
MEETING = Path(__file__).parent / "programs" / "meeting.py"
WRITTEN = [path for path in sorted(JOBS.glob("*.sbatch")) if MADE in path.read_text()]
SMALL = ["--cpus-per-task=1", "--time=9", "--parsable"]
DIGITS = ["train.eval_every=0", "parallel.stall_abort_s=60"]
DOWNPOUR = [*DIGITS, "parallel.strategy=downpour", "parallel.servers=1", "optimizer.lr=0.01"]
ON_TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_a_script_is_what_dpnn_submit_writes(path, capsys, monkeypatch):
    """But for the comment at its head: a change in one place is a change in both."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DPNN_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    first, *rest = path.read_text().splitlines()
    (made,) = (line.removeprefix(MADE) for line in rest if line.startswith(MADE))
    assert main(shlex.split(made)) == 0
    written = capsys.readouterr().out.splitlines()
    assert first == written[0] == "#!/bin/bash"
    assert rest[rest.index(MADE + made) + 1 :] == written[2:]


def test_there_is_a_script_for_each_kind_of_job():
    kinds = {"one-node", "many-nodes", "servers", "gpu", "heterogeneous"}
    assert kinds == {path.stem for path in WRITTEN}


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.sbatch")), ids=lambda path: path.stem)
def test_bash_can_read_a_script(path):
    assert subprocess.run(["bash", "-n", path], check=False, timeout=30).returncode == 0


def test_the_site_file_is_a_site_file():
    assert read_site(str(JOBS / "site.toml")).launcher == "srun"


def test_without_a_job_file_a_script_says_what_it_wants(tmp_path):
    done = subprocess.run(
        ["bash", JOBS / "one-node.sbatch"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0
    assert "wanted is a job file: sbatch SCRIPT JOB [--set KEY=VALUE ...]" in done.stderr


def test_a_script_starts_a_run_and_then_goes_on_with_it(tmp_path):
    """By the words that it has for dpnn. One that ends with 0, but without the `end` line of its run, has failed."""
    said, dpnn, run = tmp_path / "said", tmp_path / "dpnn", tmp_path / "runs" / "flowers-7"
    dpnn.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$SAID"\n[ ! "$END" ] || echo "$END" >> "$METRICS"\n')
    dpnn.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SAID": str(said)}
    env |= {"SLURM_JOB_NAME": "flowers", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "METRICS": f"{run}/metrics.jsonl"}

    def words(end: str, code: int) -> list[str]:
        line = ["bash", JOBS / "gpu.sbatch", "my flowers.toml", "--set", "seed=3"]
        done = subprocess.run(line, cwd=tmp_path, env={**env, "END": end}, timeout=30, check=False)
        assert done.returncode == code
        return said.read_text().splitlines()

    sets = ["--set", "backend.name=cuda", "--set", "seed=3"]
    common = ["launch", "-n", "8", "train"]
    assert words("", 4) == [*common, "my flowers.toml", *sets, "--set", "output.dir=runs/flowers-7"]
    run.mkdir(parents=True)
    (run / "job.toml").touch()
    assert words('{"kind":"end","exit":0}', 0) == [*common, "--resume", "runs/flowers-7", *sets]


@pytest.mark.parametrize(
    ("end", "returned", "checkpoint", "code", "queued"),
    [
        (4, 0, True, 4, True),
        (4, 0, False, 4, False),
        (None, 137, True, 137, True),
        (None, 137, False, 137, False),
        (0, 137, True, 0, False),
        (5, 0, True, 5, False),
        (75, 0, False, 75, True),
    ],
)
def test_a_run_is_queued_again_by_its_own_end_and_only_if_it_got_on(tmp_path, end, returned, checkpoint, code, queued):
    """Whatever its launcher says: that ended with `returned`."""
    run = tmp_path / "runs" / "flowers-7"
    (run / "checkpoints" / "step-000000001").mkdir(parents=True)
    does = [f"mkdir -p {run}/checkpoints/step-000000002"] * checkpoint
    does += [f'echo \'{{"kind":"end","steps":2,"exit":{end}}}\' >> {run}/metrics.jsonl'] * (end is not None)
    for name, lines_of in (("dpnn", [*does, f"exit {returned}"]), ("scontrol", [f"touch {tmp_path}/queued"])):
        (tmp_path / name).write_text("\n".join(["#!/bin/bash", *lines_of, ""]))
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NAME": "flowers"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}
    (run / "metrics.jsonl").write_text('{"kind":"end","exit":0}\n')  # of an earlier life
    done = subprocess.run(["bash", JOBS / "gpu.sbatch", "my.toml"], cwd=tmp_path, env=env, timeout=30, check=False)
    assert (done.returncode, (tmp_path / "queued").exists()) == (code, queued)


@pytest.fixture
def sbatch(under_slurm, tmp_path, monkeypatch):
    """sbatch(script, options, arguments) -> its number, submitted in a folder of the user's that has a job file."""
    job = (JOBS / "digits.toml").read_text()
    (tmp_path / "digits.toml").write_text(job)
    replicas = job.replace("global_batch", "replica_batch").replace("epochs = 30", "steps = 30")
    (tmp_path / "replicas.toml").write_text(replicas)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_MPI_TYPE", plugin())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["pack", "digits", "data/digits"]) == 0

    def submit(script: str, options: list[str], arguments: list[str]) -> str:
        return under_slurm.call("sbatch", *SMALL, *options, str(JOBS / f"{script}.sbatch"), *arguments).strip()

    return submit


@pytest.mark.timeout(240)
def test_every_script_trains(under_slurm, sbatch, tmp_path):
    """All are queued at once, on the digits. GPUs are asked for; what they are given is none."""

    def words(*settings: str) -> list[str]:
        return [word for setting in settings for word in ("--set", setting)]

    short = words(*DIGITS, "train.epochs=1")
    downpour = ["replicas.toml", *words(*DOWNPOUR)]
    jobs = {
        "one-node": sbatch("one-node", ["--ntasks-per-node=2"], ["digits.toml", *short]),
        "many-nodes": sbatch("many-nodes", ON_TWO_NODES, ["digits.toml", *short]),
        "servers": sbatch("servers", ON_TWO_NODES, downpour),
        "gpu": sbatch(
            "gpu", [*ON_TWO_NODES, "--gpus-per-node=1"], ["digits.toml", *short, *words("backend.name=auto")]
        ),
        "heterogeneous": sbatch("heterogeneous", ["--nodes=1", "--ntasks-per-node=1"], downpour),
    }
    assert jobs.keys() == {path.stem for path in WRITTEN}
    ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    under_slurm.wait_for(lambda: all(under_slurm.state(job) in ends for job in jobs.values()), 220)
    for script, job in jobs.items():
        run, log = tmp_path / "runs" / f"dpnn-{job}", (tmp_path / f"dpnn-{job}.out").read_text()
        assert [line["exit"] for line in lines("end", run)] == [0], f"{script}: {log}"
        assert [line["ranks"] for line in lines("start", run)] == [2], script
        assert under_slurm.state(job) == "COMPLETED", script


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_benchmark_runs_on_two_nodes(under_slurm, sbatch, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = tmp_path / "scaling.json"
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path / 'log'}"]
    job = sbatch("bench", options, ["--quick", "--json", str(result)])
    under_slurm.wait_for(lambda: under_slurm.state(job) in ("COMPLETED", "FAILED"), 500)
    assert under_slurm.state(job) == "COMPLETED", (tmp_path / "log").read_text()
    assert "2 x" in result.read_text()


def met(*options: str) -> subprocess.CompletedProcess[str]:
    """What ranks say that srun starts with these options."""
    line = ["srun", "--kill-on-bad-exit=1", *options, sys.executable, str(MEETING)]
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        looks = ("squeue", "--steps"), ("scontrol", "show", "job"), ("ps", "-eo", "pid,ppid,stat,etimes,wchan:20,args")
        found = [subprocess.run(look, capture_output=True, text=True, timeout=60, check=False).stdout for look in looks]
        raise TimeoutError("\n".join([f"{error.stdout!r}, {error.stderr!r}", *found])) from error


def test_ranks_that_srun_starts_meet_and_are_dealt_to_the_nodes_in_turn(under_slurm):
    ended = met(f"--mpi={plugin()}", "--nodes=2", "--ntasks=4", "--distribution=cyclic")
    assert ended.stdout == "met on n0 n1 n0 n1\n", ended.stderr


def test_ranks_that_mpirun_starts_are_dealt_to_the_nodes_in_turn(under_slurm, tmp_path):
    line = "import sys; from dpnn.comm.launch import launch; sys.exit(launch(4, [], (sys.argv[1],)))"
    started = shlex.join([sys.executable, "-c", line, str(MEETING)])
    log = tmp_path / "log"
    options = ["--nodes=2", "--ntasks-per-node=2", "--distribution=cyclic", "--time=9", f"--output={log}"]
    job = under_slurm.call("sbatch", "--parsable", *options, "--wrap", started).strip()
    under_slurm.wait_for(lambda: under_slurm.state(job) in ("COMPLETED", "FAILED"), 60)
    assert "met on n0 n1 n0 n1\n" in log.read_text()


def test_a_heterogeneous_job_is_one_world_with_its_last_part_last(under_slurm):
    ended = met(f"--mpi={plugin()}", "--nodes=1", "--ntasks=2", ":", "--nodes=1", "--ntasks=1")
    assert ended.stdout == "met on n0 n0 n1\n", ended.stderr


def test_the_plugin_of_another_mpi_is_refused(under_slurm):
    """Its ranks would all be alone, or abort without a word of what to do."""
    other = {"pmix": "pmi2", "pmi2": "pmix"}[plugin()]
    ended = met(f"--mpi={other}", "--nodes=2", "--ntasks=2")
    assert ended.returncode != 0
    assert "met" not in ended.stdout
    (said,) = (line for line in ended.stderr.splitlines() if line.startswith("dpnn: "))
    assert "started 2 ranks, but the MPI library loaded here" in said
    assert "srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH" in said
