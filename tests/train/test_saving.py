"""Checkpoints are written while training goes on; whatever happens to one meanwhile, the ones before it stay good."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dpnn import checkpoint
from dpnn.observe import metrics

from .test_failures import check_record

EPOCH = 15
"""Steps of an epoch, and from one checkpoint to the next."""
PROGRAM = Path(__file__).parent / "programs" / "disk.py"
PARTS = ("parallel.parts=2", "parallel.placement=depth", "parallel.microbatches=2")
AVERAGE = ("parallel.strategy=average", f"model.name={PROGRAM.parents[1]}/networks.py:plain", "parallel.every=4")
LONG = ("train.epochs=1000", "train.eval_every=0")


@pytest.fixture
def saves(mpirun, python, job, messages):
    """saves(ranks, disk, *settings) -> what came of a run whose disk does `disk`, as programs/disk.py says."""

    def run(ranks, disk, *settings) -> SimpleNamespace:
        made = job()
        line = ["train", made.path, *(word for setting in settings for word in ("--set", setting))]
        env = {"DISK": disk}
        ended = mpirun(ranks, *line, script=PROGRAM, env=env) if ranks > 1 else python(PROGRAM, *line, env=env)
        print(ended.stderr)
        folder, lines = made.out / "checkpoints", metrics.read(made.out / "metrics.jsonl")
        return SimpleNamespace(
            code=ended.returncode, messages=messages(ended.stderr), out=made.out, folder=folder, lines=lines,
            names=sorted(path.name for path in folder.glob("*")),
        )  # fmt: skip

    return run


def assert_same_bits(one: Path, other: Path) -> None:
    """Two checkpoints."""
    a, b = checkpoint.read(one), checkpoint.read(other)
    assert (a.epoch, a.step, a.steps) == (b.epoch, b.step, b.steps)
    arrays, others = dict(a.arrays()), dict(b.arrays())
    assert arrays.keys() == others.keys()
    assert [name for name in arrays if arrays[name].tobytes() != others[name].tobytes()] == []


@pytest.mark.parametrize("settings", [(), PARTS, AVERAGE], ids=["whole", "parts", "average"])
def test_training_goes_on_and_what_is_written_is_that_of_the_step(saves, trained, settings):
    """No byte of the first checkpoint is written before seven more steps are taken."""
    run = saves(2, f"* {EPOCH} until {EPOCH + 7}", *settings)
    assert run.code == 0
    undisturbed = trained(2, *settings) / "checkpoints"
    assert run.names == sorted(path.name for path in undisturbed.iterdir())
    assert len(run.names) == 2
    for name in run.names:
        assert_same_bits(run.folder / name, undisturbed / name)
    told = [line["step"] for line in run.lines if line["kind"] == "step" or line.get("event") == "checkpoint"]
    first = told.index(EPOCH, EPOCH)
    assert told[first - 1] >= EPOCH + 7
    assert [line["kind"] for line in run.lines[-2:]] == ["event", "end"]


def test_a_slow_disk_may_take_longer_than_a_rank_waits_for_another(saves):
    """It takes 60 ms for each array, and for what lies before it."""
    run = saves(2, f"* {EPOCH} slow 0.06", "parallel.stall_abort_s=2", "train.epochs=1")
    assert run.code == 0
    assert run.names == [f"step-{EPOCH:09d}.h5"]
    arrays = dict(checkpoint.read(run.folder / run.names[0]).arrays())
    assert 2 * len(arrays) * 0.06 > 2


def test_only_the_newest_stay(saves):
    run = saves(1, "* 1 slow 0", "output.checkpoint_every=0.2", "output.keep=2")
    assert run.code == 0
    assert [line["step"] for line in run.lines if line.get("event") == "checkpoint"] == list(range(3, 31, 3))
    assert run.names == ["step-000000027.h5", "step-000000030.h5"]


@pytest.mark.parametrize(("ranks", "epochs"), [(2, 1000), (1, 2)], ids=["in the middle", "at the end"])
def test_a_blocked_disk_ends_the_run(saves, ranks, epochs):
    step = EPOCH if ranks == 2 else 2 * EPOCH
    run = saves(ranks, f"0 {step} block", *LONG, f"train.epochs={epochs}", "parallel.stall_abort_s=2")
    assert run.code == 4
    (message,) = run.messages
    assert f"the checkpoint after step {step} in {run.folder} has waited 2 s for the file system of " in message
    assert f"step-{step:09d}.h5 to take its bytes" in message
    assert "raise parallel.stall_abort_s" in message
    check_record(run.out, message, 4)


@pytest.mark.soak
def test_a_full_disk_ends_the_run(saves):
    run = saves(1, f"0 {2 * EPOCH} limit 20000", *LONG)
    assert run.code == 3
    (message,) = run.messages
    assert f"{run.folder}/step-000000030.h5 can't be written (File too large); earlier ones are unharmed" in message
    assert run.names == ["step-000000015.h5"]
    assert checkpoint.newest(run.folder)[0].steps == EPOCH
    check_record(run.out, message, 3)


def test_a_full_disk_of_one_part_ends_the_run(saves):
    run = saves(2, f"1 {2 * EPOCH} limit 20000", *LONG, *PARTS)
    assert run.code == 3
    (message,) = run.messages
    assert message.startswith(f"dpnn: rank 1: the checkpoint {run.folder}/.step-000000030.")
    assert "/part-0001-of-0002.h5 can't be written (File too large); earlier ones are unharmed" in message
    assert checkpoint.newest(run.folder)[0].steps == EPOCH
    check_record(run.out, message, 3)


def test_a_folder_that_is_deleted_meanwhile_ends_the_run(saves):
    run = saves(1, f"0 {EPOCH} vanish", *LONG)
    assert run.code == 3
    (message,) = run.messages
    assert f"{run.folder}/step-000000015.h5 can't be written (No such file or directory)" in message
    check_record(run.out, message, 3)


def test_numbers_that_are_not_finite_end_the_run(saves):
    """Found while the next steps are taken; no checkpoint is made of them."""
    run = saves(1, f"0 {2 * EPOCH} infinite", *LONG)
    assert run.code == 5
    (message,) = run.messages
    assert " is no longer finite after step 30; no checkpoint is written: go on from an earlier one" in message
    assert run.names == ["step-000000015.h5"]


@pytest.mark.parametrize(
    ("ranks", "settings"), [pytest.param(1, (), marks=pytest.mark.soak), (2, PARTS)], ids=["whole", "parts"]
)
def test_killed_while_it_writes_a_run_goes_on_from_the_one_before(
    saves, mpirun, python, trained, identical, ranks, settings
):
    """Of several parts the last one is killed: others are whole, and are none of the checkpoint made afterwards."""
    run = saves(ranks, f"{ranks - 1} {2 * EPOCH} SIGKILL", *settings)
    assert run.code not in (0, 75)
    assert checkpoint.newest(run.folder)[0].steps == EPOCH
    left = set(run.folder.glob(".*"))
    assert left
    again = ("train", "--resume", run.out)
    ended = mpirun(ranks, *again) if ranks > 1 else python("-m", "dpnn", *again)
    assert ended.returncode == 0, ended.stderr
    identical(run.out, trained(ranks, *settings))
    assert list(run.folder.glob(".*")) == []
