"""Memory and disks that run out, and file systems that don't answer, while a run trains: each for real.

Disks are small file systems in memory, mounted where only the run sees them; what doesn't answer is a file system of
the test's own (programs/frozen.py); what kills for memory is the kernel. Ranks that fail are in test_failures.py.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpnn import checkpoint
from dpnn.comm.launch import command
from tests.train.runs import told, words

pytestmark = pytest.mark.mpi

HERE = Path(__file__).parent
FROZEN = HERE / "programs" / "frozen.py"
LIMIT_S = 30
"""For an end within seconds, from the fault on, on a machine that may be busy."""
STALL_S = 3
SOAK = pytest.mark.soak
ALLREDUCE = (2, ())
DOWNPOUR = (
    3,
    (
        f"model.name={HERE}/networks.py:plain", "train.global_batch=0", "train.replica_batch=16",
        "parallel.strategy=downpour", "parallel.servers=1", "optimizer.name=sgd", "optimizer.lr=0.01",
    ),
)  # fmt: skip
AVERAGE = (2, (f"model.name={HERE}/networks.py:plain", "parallel.strategy=average", "parallel.every=4"))
PARTS = (
    2,
    (
        f"model.name={HERE}/networks.py:plain",
        "parallel.parts=2",
        'parallel.placement={"dense*" = 1, "*" = 0}',
        "parallel.microbatches=2",
    ),
)
EVERYWHERE = [
    pytest.param(ALLREDUCE, id="allreduce"),
    pytest.param(AVERAGE, id="average", marks=SOAK),
    pytest.param(DOWNPOUR, id="downpour", marks=SOAK),
    pytest.param(PARTS, id="parts", marks=SOAK),
]
LONG = ("train.epochs=1000", "train.eval_every=0", "output.checkpoint_every=0.2", "output.keep=3")


def newest(folder: Path) -> int:
    """Steps of the newest checkpoint; all that have their name are good."""
    paths = sorted(folder.glob("step-*"))
    return max((checkpoint.read(path).steps for path in paths), default=0)


def ended(program, limit_s: float = LIMIT_S, since: str = ""):
    """What came out, at most so many seconds after it has said `since`."""
    program.wait_for(since)
    done = program.finish(limit_s)
    program.until_gone(limit_s)
    return done


def until_saved(program, folder: Path, limit_s: float = 60) -> None:
    """Until there is a checkpoint in a folder."""
    end = time.monotonic() + limit_s
    while not any(folder.glob("step-*")):
        assert program.process.poll() is None, program.stderr
        assert time.monotonic() < end, program.stdout + program.stderr
        time.sleep(0.01)


@pytest.fixture
def line(watched):
    """line(ranks, *args, ...) -> the words that start the program on so many ranks."""
    return lambda ranks, *args: command(ranks, [*map(str, args)], (str(watched),))


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_a_rank_that_crashes_takes_the_job_along(start_line, line, job, strategy):
    ranks, settings = strategy
    run = job()
    program = start_line(line(ranks, "train", run.path, *words(*LONG, *settings)))
    until_saved(program, run.out / "checkpoints")
    os.kill(program.pids()[1], signal.SIGSEGV)
    done = ended(program)
    assert done.returncode not in (0, 75)
    assert newest(run.out / "checkpoints") > 0


@pytest.mark.soak
def test_a_replica_that_is_stopped_is_waited_for_no_longer_than_the_limit(start_line, line, job, messages):
    """In `average`; that the other strategies do so, too, is in test_failures.py and test_stalls.py."""
    ranks, settings = AVERAGE
    run = job()
    settings = (*LONG, *settings, f"parallel.stall_abort_s={STALL_S}")
    program = start_line(line(ranks, "train", run.path, *words(*settings)))
    until_saved(program, run.out / "checkpoints")
    os.kill(program.pids()[1], signal.SIGSTOP)
    done = ended(program)
    assert done.returncode == 4
    (message,) = messages(done.stderr)
    assert message.startswith(f"dpnn: rank 0: waited {STALL_S} s for ")
    assert re.search(r"^  rank 1 \(.*\) is stopped \(SIGSTOP\): ", done.stderr, re.MULTILINE)


# --- memory


@pytest.fixture
def memory_group():
    """The list of processes of a control group that may have 64 MiB, and a count of those killed for want of more."""
    if os.geteuid() != 0:
        pytest.skip("only root may make a control group")
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # versions 1 and 2
    name, controllers = f"dpnn-test-{os.getpid()}", second / "cgroup.controllers"
    if first.is_dir():
        folder, counter = first / name, "oom_control"
        limits = {"memory.limit_in_bytes": "64M", "memory.swappiness": "0"}
    elif controllers.exists() and "memory" in controllers.read_text().split():
        folder, counter = second / name, "events"
        limits = {"memory.max": "64M", "memory.swap.max": "0"}
    else:
        pytest.skip("no control group limits memory here")
    try:
        if counter == "events":
            (second / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        for file, text in limits.items():
            if (folder / file).exists():
                (folder / file).write_text(text)
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")

    def killed() -> int:
        lines = (folder / f"memory.{counter}").read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])

    yield SimpleNamespace(processes=folder / "cgroup.procs", killed=killed)
    until = time.monotonic() + 10
    while folder.exists():  # processes leave it as they end
        try:
            folder.rmdir()
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_a_rank_that_the_kernel_kills_for_memory_takes_the_job_along(start_line, line, job, memory_group, strategy):
    ranks, settings = strategy
    run = job()
    program = start_line(
        line(ranks, "train", run.path, *words(*LONG, *settings)),
        env={"FAULT": f"0 9 hoard {memory_group.processes}"},
    )
    done = ended(program, since="fault: ")
    assert memory_group.killed() == 1
    assert done.returncode not in (0, 75)
    assert newest(run.out / "checkpoints") > 0


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_memory_that_a_rank_cannot_have_is_its_message(start_line, line, job, messages, strategy):
    """So little is left that no thread can be started either."""
    ranks, settings = strategy
    run = job()
    program = start_line(line(ranks, "train", run.path, *words(*LONG, *settings)), env={"FAULT": "0 9 exhaust"})
    done = ended(program, since="fault: ")
    assert done.returncode == 1
    (message,) = messages(done.stderr)
    assert message.startswith("dpnn: rank 0: out of memory (")
    assert "Unable to allocate 1.00 GiB" in message
    assert "more parallel.microbatches" in message
    assert newest(run.out / "checkpoints") > 0


# --- disks


@pytest.fixture
def disk(start_line, tmp_path):
    """disk(options, at=...) -> SimpleNamespace(start, outside): a file system in memory, where only `start` sees it.

    `options`: of the mount. `start(line)`: a program that sees it. `outside(path)`: what the test calls a path in it.
    """

    def mount(options: str, at: Path) -> SimpleNamespace:
        at.mkdir(exist_ok=True)
        script = 'mount -t tmpfs -o "$1" none "$2" && echo mounted && exec sleep 1000'
        try:
            trial = subprocess.run(
                ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(at)], capture_output=True, text=True, timeout=20
            )
        except FileNotFoundError:
            pytest.skip("no unshare (util-linux)")
        if trial.returncode:
            pytest.skip(f"no disk can be mounted here: {trial.stderr.strip()}")
        holder = start_line(["unshare", "-m", "sh", "-c", script, "sh", options, str(at)])
        holder.wait_for("mounted")
        pid = holder.process.pid
        inside = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--wd={tmp_path}"]
        return SimpleNamespace(
            start=lambda line, **how: start_line([*inside, *line], **how),
            outside=lambda path: Path(f"/proc/{pid}/root{path}"),
        )

    return mount


def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(disk, start_line, line, job, messages, tmp_path):
    """The metrics or a checkpoint, whichever is written first; what was written before stays good."""
    run = job(out="disk/run")
    small = disk("size=2m", tmp_path / "disk")
    folder = small.outside(run.out)
    program = small.start(line(2, "train", run.path, *words(*LONG)))
    until_saved(program, folder / "checkpoints")
    filler = small.outside(tmp_path / "disk" / "filler")
    fill(filler)
    done = ended(program)
    assert done.returncode == 3
    (message,) = messages(done.stderr)
    assert str(run.out) in message
    assert "can't be written (No space left on device)" in message
    assert "make room there" in message
    steps = newest(folder / "checkpoints")
    assert steps > 0
    fill(filler)
    again = line(2, "train", "--resume", run.out, *words(f"train.epochs={steps // 15 + 2}"))
    done = ended(small.start(again))
    assert done.returncode in (2, 3)
    (message,) = messages(done.stderr)
    assert "can't be written (No space left on device)" in message
    assert newest(folder / "checkpoints") == steps
    assert small.start(["mount", "-o", "remount,size=8m", str(tmp_path / "disk")]).finish().returncode == 0
    done = ended(small.start(again), 30)
    assert done.returncode == 0, done.stderr
    assert f"going on at epoch {steps // 15 + 1}, step {steps + 1}" in done.stdout


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_a_folder_that_takes_no_more_files_ends_the_run_with_its_checkpoints_good(
    disk, line, job, messages, tmp_path, strategy
):
    """The second checkpoint is one file too many."""
    ranks, settings = strategy
    run = job(out="disk/run")
    small = disk("nr_inodes=8" if ranks == 2 and settings != PARTS[1] else "nr_inodes=12", tmp_path / "disk")
    done = ended(small.start(line(ranks, "train", run.path, *words(*LONG, *settings))), since="parameters, on")
    assert done.returncode == 3
    (message,) = messages(done.stderr)
    assert f"the checkpoint {run.out}/checkpoints/" in message
    assert "can't be written (No space left on device); earlier ones are unharmed: make room there" in message
    assert newest(small.outside(run.out) / "checkpoints") > 0


def test_choices_that_the_disk_does_not_take_are_named(disk, job, messages, tmp_path, watched):
    run = job(out="disk/run")
    small = disk("nr_inodes=5", tmp_path / "disk")
    done = ended(small.start([sys.executable, str(watched), "train", str(run.path), *words(*LONG)]))
    assert done.returncode == 3
    (message,) = messages(done.stderr)
    assert f"{run.out}/choices.json can't be written (No space left on device); make room there" in message


def test_without_room_in_shared_memory_gradients_are_summed_by_mpi(disk, line, job):
    run = job()
    small = disk("size=3m", Path("/dev/shm"))
    network = f"model.name={HERE}/networks.py:large"
    done = ended(small.start(line(2, "train", run.path, *words(network, "train.epochs=1"))), 30)
    assert done.returncode == 0, done.stderr
    assert "no_shared_memory" in [event["event"] for event in told(run.out, "event")]
    assert "gradients are summed by MPI, not in shared memory: " in done.stdout
    assert "MiB in /dev/shm: No space left on device" in done.stdout


def fill(path: Path) -> None:
    """Take all that is left of a disk."""
    with path.open("ab", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass


# --- file systems that don't answer


@pytest.fixture
def frozen(start_line, line, tmp_path):
    """frozen(folder, behind, ranks, *args, ...) -> (program, flag): `folder` shows the files of `behind`, and nobody
    gets an answer there while the file `flag` exists.
    """
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or os.geteuid() != 0:
        pytest.skip("/dev/fuse can't be used here")

    def start(folder: Path, behind: Path, ranks: int, *args, **how):
        folder.mkdir(parents=True, exist_ok=True)
        behind.mkdir(parents=True, exist_ok=True)
        flag = tmp_path / "flag"
        inside = ["unshare", "-m", sys.executable, str(FROZEN), str(folder), str(behind), str(flag)]
        return start_line([*inside, *line(ranks, *args)], **how), flag

    return start


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_data_that_do_not_come_any_more_end_the_run(frozen, job, images, tmp_path, strategy):
    ranks, settings = strategy
    run = job(data=tmp_path / "data")
    program, flag = frozen(
        tmp_path / "data", images, ranks, "train", run.path,
        *words(*LONG, *settings, f"parallel.stall_abort_s={STALL_S}"),
        env={"FAULT": f"0 20 touch {tmp_path}/flag"},
    )  # fmt: skip
    done = ended(program, STALL_S + LIMIT_S, since="fault: ")
    assert flag.exists()
    assert done.returncode in (3, 4)
    told = f"no batch came from {tmp_path}/data/train for {STALL_S} s: its file system doesn't answer"
    # Who waits for a rank that waits for data reaches its limit at the same time.
    assert told in done.stderr or re.search(r"^  rank 0 .*reading a batch", done.stderr, re.MULTILINE)
    assert newest(run.out / "checkpoints") > 0


@pytest.mark.parametrize("strategy", EVERYWHERE)
@pytest.mark.parametrize("what", ["run", "run/checkpoints"])
def test_a_run_folder_that_does_not_answer_ends_the_run(frozen, job, messages, tmp_path, strategy, what):
    """Metrics can't be written, or a checkpoint can't. The message, or one of the lines for every rank, says so."""
    ranks, settings = strategy
    run = job()
    behind = tmp_path / "behind"
    program, flag = frozen(
        tmp_path / what, behind, ranks, "train", run.path,
        *words(*LONG, *settings, f"parallel.stall_abort_s={STALL_S}"),
    )  # fmt: skip
    folder = behind / "checkpoints" if what == "run" else behind
    until_saved(program, folder)
    flag.touch()
    done = ended(program, STALL_S + LIMIT_S)
    assert done.returncode == 4
    assert any(f" {STALL_S} s" in message for message in messages(done.stderr)), done.stderr
    lines = [line for line in done.stderr.splitlines() if re.match("  rank [0-9]+ ", line)]
    assert len(lines) == ranks
    assert re.search("the file system|checkpoint", "".join([*messages(done.stderr), *lines]))
    assert newest(folder) > 0


def test_a_file_system_that_answers_again_in_time_is_only_waited_for(frozen, job, identical, trained, tmp_path):
    run = job()
    program, flag = frozen(
        run.out, tmp_path / "behind", 2, "train", run.path, env={"FAULT": f"0 20 touch {tmp_path}/flag"}
    )
    program.wait_for("fault: ")
    time.sleep(1.5)
    assert program.process.poll() is None
    flag.unlink()
    done = ended(program)
    assert done.returncode == 0, done.stderr
    identical(tmp_path / "behind", trained(2))
