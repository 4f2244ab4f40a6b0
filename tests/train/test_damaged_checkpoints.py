"""A damaged checkpoint is passed over and said, wherever the damage is and whoever meets it; the run goes on.

All go on from copies of few runs of six steps, with checkpoints after 2, 4 and 6.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dpnn import checkpoint, cli
from dpnn.checkpoint import look
from tests.train.runs import events, words

from .conftest import HERE

PLAIN = f"model.name={HERE / 'networks.py'}:plain"
SHORT = (
    PLAIN, "optimizer.name=momentum", "optimizer.lr=0.01",
    "train.epochs=0", "train.steps=6", "train.eval_every=0", "output.checkpoint_every=0.13",
)  # fmt: skip
PARTS = ("parallel.parts=2", 'parallel.placement={"dense*" = 1, "*" = 0}', "parallel.microbatches=1")
ALONE = ("parallel.parts=1", "parallel.placement=auto")
SERVERS = ("parallel.strategy=downpour", "parallel.servers=2", "train.global_batch=0", "train.replica_batch=16")


@pytest.fixture
def copy(trained, tmp_path) -> Callable[..., Path]:
    """copy(ranks, *settings) -> a run that may be damaged."""
    return lambda ranks, *settings: Path(shutil.copytree(trained(ranks, *SHORT, *settings), tmp_path / "run"))


def saved(folder: Path) -> list[Path]:
    """The checkpoints, newest first."""
    return sorted((folder / "checkpoints").iterdir(), reverse=True)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def flip_number(file: Path, state: str = "") -> str:
    """A bit in the middle of the longest array of a file."""
    found = look(file if file.stem.startswith("step") else file.parent)
    arrays = [stored for (of, _), stored in found.arrays.items() if of == state]
    extents = [found.extents[index] for stored in arrays for index in stored.extents]
    longest = max((extent for extent in extents if extent.file == file), key=lambda extent: extent.hi - extent.lo)
    flip(file, longest.offset + (longest.hi - longest.lo) // 2 * 4)
    return f"{file}: the bytes of {longest.dataset} are damaged"


def flip_info(file: Path) -> str:
    flip(file, file.read_bytes().index(b"global_batch"))
    return f"{file}: the bytes of info are damaged"


def flip_tail(file: Path) -> str:
    flip(file, file.stat().st_size - 30)
    return f"{file}: the metadata are damaged"


def cut(file: Path) -> str:
    os.truncate(file, file.stat().st_size // 2)
    return f"{file} is cut short"


def lose(file: Path) -> str:
    file.unlink()
    return f"{file} can't be read (No such file or directory)"


def check(folder: Path, told: list[str], step: int) -> None:
    """The run has passed over what was damaged, saying why, has gone on after `step`, and its end is good."""
    reasons = [line["path"] for line in events(folder, "damaged_checkpoint")]
    assert [reason[: len(what)] for reason, what in zip(reasons, told, strict=True)] == told
    assert [line["step"] for line in events(folder, "resumed")] == [step]
    checkpoint.read(saved(folder)[0])


@pytest.mark.parametrize("harm", [flip_number, partial(flip_number, state="momentum"), flip_info, flip_tail, cut])
def test_in_a_file(copy, trained, identical, harm):
    folder = copy(1)
    told = harm(saved(folder)[0])
    assert cli.main(["train", "--resume", str(folder)]) == 0
    check(folder, [told], 4)
    identical(folder, trained(1, *SHORT))


def test_in_the_newest_and_those_before(copy, trained, identical):
    """What is found by reading, and what is seen at once."""
    folder = copy(1)
    newest, before, _ = saved(folder)
    newer = shutil.copy(newest, newest.with_stem("step-000000007"))
    told = [flip_number(newer), cut(newest), flip_number(before)]
    assert cli.main(["train", "--resume", str(folder)]) == 0
    newer.unlink()
    check(folder, told, 2)
    identical(folder, trained(1, *SHORT))


def test_in_all(copy, capfd, messages):
    folder = copy(1)
    told = [harm(path) for harm, path in zip((flip_number, cut, flip_number), saved(folder), strict=True)]
    assert cli.main(["train", "--resume", str(folder)]) == 3
    (message,) = messages(capfd.readouterr().err)
    assert f"no checkpoint in {folder / 'checkpoints'} is good" in message
    assert all(what in message for what in told)


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        *((harm, "part-0001-of-0002.h5") for harm in (flip_number, flip_tail, cut, lose)),
        *((harm, "info.h5") for harm in (flip_info, flip_tail, cut, lose)),
    ],
)
def test_in_a_folder(copy, harm, name):
    folder = copy(2, *PARTS)
    told = harm(saved(folder)[0] / name)
    assert cli.main(["train", "--resume", str(folder), *words(*ALONE)]) == 0
    check(folder, [told], 4)


def test_in_what_another_rank_reads(copy, trained, identical, mpirun):
    """The first rank sees nothing of it."""
    folder = copy(2, *PARTS)
    newest, before, _ = saved(folder)
    told = [flip_number(newest / "part-0001-of-0002.h5"), lose(before / "part-0000-of-0002.h5")]
    ended = mpirun(2, "train", "--resume", folder)
    assert ended.returncode == 0, ended.stderr
    assert f"passed over a damaged checkpoint: {told[0]}" in ended.stdout
    check(folder, told, 2)
    identical(folder, trained(2, *SHORT, *PARTS))


def test_in_all_that_another_rank_reads(copy, mpirun, messages):
    folder = copy(2, *PARTS)
    told = [flip_number(path / "part-0001-of-0002.h5") for path in saved(folder)]
    ended = mpirun(2, "train", "--resume", folder)
    assert ended.returncode == 3
    (message,) = messages(ended.stderr)
    assert all(what in message for what in told)


def test_on_replicas_of_which_one_reads(copy, mpirun):
    folder = copy(2, *PARTS)
    told = [flip_number(saved(folder)[0] / "part-0001-of-0002.h5")]
    ended = mpirun(3, "train", "--resume", folder, *words(*ALONE))
    assert ended.returncode == 0, ended.stderr
    check(folder, told, 4)


@pytest.mark.parametrize("servers", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_in_what_a_server_reads(copy, mpirun, servers):
    """Newer ones are copies of the one that is left, damaged in what two servers have written."""
    folder = copy(3, *SERVERS)
    (good, *_), told = saved(folder), []
    for steps, number in ((8, 1), (7, 0)):
        copied = shutil.copytree(good, good.with_name(f"step-00000000{steps}"))
        told.append(flip_number(copied / f"part-000{number}-of-0002.h5"))
    settings = ("train.steps=9", f"parallel.servers={servers}")
    ended = mpirun(servers + 1, "train", "--resume", folder, *words(*settings))
    assert ended.returncode == 0, ended.stderr
    check(folder, told, 6)


def test_evaluation_says_it_too(copy, mpirun):
    """Of a run the one before is taken; a checkpoint that was named is refused."""
    folder = copy(2, *PARTS)
    newest = saved(folder)[0]
    told = flip_number(newest / "part-0000-of-0002.h5")
    ended = mpirun(2, "eval", folder)
    assert ended.returncode == 0, ended.stderr
    assert f"passed over a damaged checkpoint: {told}" in ended.stderr
    assert "(61 samples)" in ended.stdout
    ended = mpirun(2, "eval", newest)
    assert ended.returncode == 3
    assert told in ended.stderr
    assert "samples" not in ended.stdout
