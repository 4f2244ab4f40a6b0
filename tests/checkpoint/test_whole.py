"""A checkpoint is whole or refused; whatever happens while one is written, a good one remains."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from dpnn import checkpoint
from dpnn.checkpoint import Checkpoint, newest, read, write
from dpnn.errors import DataError, NotFiniteError

ROOT = Path(__file__).parents[2]


def make(steps: int, n: int = 1000) -> Checkpoint:
    """Every number of the checkpoint says after how many steps it was made."""
    return Checkpoint(
        params={"conv1.weight": np.full((n, 3), steps, np.float32), "scale": np.array(steps, np.float32)},
        optimizer={"momentum": {"conv1.weight": np.full((n, 3), -steps, np.float64), "none": np.zeros((0, 2))}},
        epoch=steps // 10,
        step=steps % 10,
        steps=steps,
        info={"seed": 3, "job": "seed = 3\n", "mean": [0.1, 0.25], "big": "x" * 100_000},
    )


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert (one.epoch, one.step, one.steps, one.info) == (other.epoch, other.step, other.steps, other.info)
    mine, theirs = dict(one.arrays()), dict(other.arrays())
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert (mine[name].dtype, mine[name].shape) == (theirs[name].dtype, theirs[name].shape)
        assert mine[name].tobytes() == theirs[name].tobytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_again(tmp_path: Path):
    path = write(tmp_path / "new" / "folder", make(123), keep=3)
    assert path == tmp_path / "new" / "folder" / "step-000000123.h5"
    assert_equal(read(path), make(123))


def test_hundreds_of_parameters_are_kept(tmp_path: Path):
    arrays = {f"layer{i}.weight": np.full(3, i, np.float32) for i in range(700)}
    assert_equal(read(write(tmp_path, Checkpoint(arrays, {}, 0, 0, 1), keep=1)), Checkpoint(arrays, {}, 0, 0, 1))


def test_arrays_that_are_not_contiguous_are_kept(tmp_path: Path):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-1].T
    restored = read(write(tmp_path, Checkpoint({"w": array}, {}, 0, 0, 1), keep=1)).params["w"]
    assert np.array_equal(restored, array)


def test_any_hdf5_tool_finds_parameters_by_name_and_can_check_them_with_zlib(tmp_path: Path):
    with h5py.File(write(tmp_path, make(7), keep=1)) as file:
        dataset = file["params/conv1.weight"]
        assert dataset.chunks is None
        assert dataset.attrs["crc32"] == zlib.crc32(dataset[()].tobytes())
        assert file["optimizer/momentum/conv1.weight"].shape == (1000, 3)
        assert (file.attrs["format"], file.attrs["version"], file.attrs["complete"]) == (b"dpnn-checkpoint", 1, 1)


def test_the_newest_stay(tmp_path: Path):
    for steps in (5, 10, 15, 100):
        write(tmp_path, make(steps), keep=2)
    assert names(tmp_path) == ["step-000000015.h5", "step-000000100.h5"]
    found = newest(tmp_path)
    assert found is not None
    latest, damaged = found
    assert (latest.path.name, latest.steps, damaged) == ("step-000000100.h5", 100, [])


def test_a_damaged_newer_one_neither_hides_nor_displaces_the_good_ones(tmp_path: Path):
    for steps in (10, 20):
        write(tmp_path, make(steps), keep=3)
    broken = tmp_path / "step-000000020.h5"
    os.truncate(broken, 500)
    latest, damaged = newest(tmp_path) or pytest.fail("nothing found")
    assert (latest.path.name, latest.steps) == ("step-000000010.h5", 10)
    assert len(damaged) == 1
    assert "step-000000020.h5 is cut short" in damaged[0]
    write(tmp_path, make(15), keep=1)
    assert names(tmp_path) == ["step-000000015.h5", "step-000000020.h5"]
    assert (newest(tmp_path) or pytest.fail("nothing found"))[0].steps == 15


def test_without_checkpoints_there_is_no_newest(tmp_path: Path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None


def test_where_all_are_damaged_it_is_said(tmp_path: Path):
    os.truncate(write(tmp_path, make(1), keep=1), 10)
    with pytest.raises(DataError, match=r"no checkpoint in .* is good"):
        newest(tmp_path)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    write(tmp_path, make(5), keep=2)
    path = write(tmp_path, Checkpoint({"w": np.ones(2)}, {}, 0, 5, 5), keep=2)
    assert names(tmp_path) == [path.name]
    assert read(path).params.keys() == {"w"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float):
    broken = make(5)
    broken.params["conv1.weight"][7, 1] = bad
    with pytest.raises(NotFiniteError, match=r"params/conv1\.weight is no longer finite after step 5"):
        write(tmp_path / "folder", broken, keep=1)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, share: float):
    path = write(tmp_path, make(5), keep=1)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DataError, match=r"step-000000005\.h5 is cut short"):
        read(path)


@pytest.mark.parametrize("name", ["params/conv1.weight", "params/scale", "optimizer/momentum/conv1.weight", "info"])
def test_a_flipped_byte_names_its_dataset(tmp_path: Path, name: str):
    path = write(tmp_path, make(5), keep=1)
    with h5py.File(path) as file:
        offset = file[name].id.get_offset()
        nbytes = file[name].nbytes
    flip(path, offset + nbytes // 2)
    with pytest.raises(DataError, match=f"{path}: the bytes of {name} are damaged"):
        read(path)


def test_a_flipped_byte_anywhere_is_found_before_hdf5_can_choke_on_it(tmp_path: Path):
    path = write(tmp_path, Checkpoint({"w": np.ones(3)}, {"momentum": {"w": np.ones(3)}}, 0, 0, 1), keep=1)
    for place in range(0, path.stat().st_size, 3):
        flip(path, place)
        with pytest.raises(DataError):
            read(path)
        flip(path, place)
    assert read(path).steps == 1


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x41]))


@pytest.mark.parametrize(("key", "value"), [("FORMAT", "dpnn-other"), ("VERSION", 2)])
def test_another_format_or_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.output, key, value)
        path = write(tmp_path, make(5), keep=1)
    with pytest.raises(DataError, match=f"{path} has the format .*{value}.*, wanted is dpnn-checkpoint 1"):
        read(path)


def test_other_files_are_refused(tmp_path: Path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.ones(100)
    with pytest.raises(DataError, match=r"other\.h5 is cut short, or is no checkpoint of dpnn"):
        read(tmp_path / "other.h5")
    with pytest.raises(DataError, match=r"missing\.h5 can't be read .No such file"):
        read(tmp_path / "missing.h5")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file/step-000000001\.h5 can't be written .(File exists|Not a directory)"):
        write(tmp_path / "file", make(1), keep=1)


WRITER = """
import json, sys
from pathlib import Path
from dpnn.checkpoint import newest, write
from dpnn.errors import DataError
from tests.checkpoint.test_whole import make, names
folder = Path(sys.argv[1])
write(folder, make(1), keep=3)
limit = int(sys.argv[2])
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    write(folder, make(2, 200_000), keep=1)
    error = ""
except DataError as caught:
    error = str(caught)
found = newest(folder)
print(json.dumps({"error": error, "names": names(folder), "steps": found[0].steps, "damaged": found[1]}))
"""


def fill_up(command: list[str]) -> dict[str, object]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    outcome: dict[str, object] = json.loads(done.stdout)
    return outcome


def assert_survived(outcome: dict[str, object], reason: str) -> None:
    assert f"step-000000002.h5 can't be written ({reason})" in str(outcome["error"])
    assert (outcome["names"], outcome["steps"], outcome["damaged"]) == (["step-000000001.h5"], 1, [])


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path):
    unshare = shutil.which("unshare")
    mount = f'mount -t tmpfs -o size=2m tmpfs {tmp_path} && exec "$0" "$@"'
    disk = [unshare or "", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    if unshare is None or subprocess.run([*disk, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk of their own")
    assert_survived(fill_up([*disk, sys.executable, "-c", WRITER, str(tmp_path), "0"]), "No space left on device")


# It ends while a dataset is written (the first, the second, the last), or one byte before all is.
@pytest.mark.parametrize("share", [0.04, 0.4, 0.9, 1.0])
def test_a_file_that_may_not_grow_leaves_the_older_checkpoints(tmp_path: Path, share: float):
    whole = write(tmp_path / "trial", make(2, 200_000), keep=1).stat().st_size
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), str(int(whole * share) - 1)]
    assert_survived(fill_up(command), "File too large")


ENDLESS = """
import itertools, sys
from pathlib import Path
from dpnn.checkpoint import write
from tests.checkpoint.test_whole import make
for steps in itertools.count(int(sys.argv[2])):
    write(Path(sys.argv[1]), make(steps, 50_000), keep=2)
    print(steps, flush=True)
"""


def killed_again_and_again(
    folder: Path, program: str, longest_s: float, expected: Callable[[int], Checkpoint], *more: str
) -> int:
    """Kill a program that writes checkpoints into the folder, and prints their steps, six times; the newest's steps.

    `program` has the folder, the first number of steps, and `more` as arguments. It goes on for up to `longest_s` after
    its first checkpoint.
    """
    random = np.random.default_rng(1)
    written = 0
    for _ in range(6):
        command = [sys.executable, "-B", "-c", program, str(folder), str(written + 1), *more]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            written = int(writer.stdout.readline())
            time.sleep(random.uniform(0.0, longest_s))
            writer.send_signal(signal.SIGKILL)
            written = max([written, *map(int, writer.stdout.read().split())])
        found = newest(folder)
        assert found is not None
        latest, damaged = found
        assert latest.steps >= written, "what was reported as written is there"
        assert_equal(read(latest.path), expected(latest.steps))
        assert damaged == []
        written = latest.steps
    return written


def test_a_writer_that_is_killed_leaves_a_good_checkpoint(tmp_path: Path):
    written = killed_again_and_again(tmp_path, ENDLESS, 0.1, lambda steps: make(steps, 50_000))
    write(tmp_path, make(written + 1), keep=1)
    assert names(tmp_path) == [f"step-{written + 1:09d}.h5"], "what the killed left behind is gone"
