"""A checkpoint that several ranks write in parts is read like one that a single rank wrote, or is refused."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue

import h5py
import numpy as np
import pytest

from dpnn.checkpoint import Checkpoint, InParts, Note, Slice, newest, read, write
from dpnn.errors import DataError, NotFiniteError
from dpnn.evaluate import find_checkpoint

from .test_whole import ROOT, assert_equal, flip, killed_again_and_again, names

MARK = "0a1b2c3d"
PARAMS = {"conv1.weight": (5, 3, 2), "scale": (), "none": (0, 2), "fc.weight": (4, 10), "fc.bias": (10,)}


def make(steps: int) -> Checkpoint:
    """All numbers differ, and say after how many steps they were made."""

    def arrays(first: float) -> dict[str, np.ndarray]:
        return {
            name: first + steps + np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
            for name, shape in PARAMS.items()
        }

    optimizer = {"momentum": arrays(1000.0), "squares": arrays(2000.0)}
    return Checkpoint(arrays(0.0), optimizer, steps // 10, steps % 10, steps, {"seed": 3, "job": "seed = 3\n"})


def cut(arrays: dict[str, np.ndarray], part: int, parts: int) -> list[Slice]:
    """What a part holds of the arrays laid out flat, one behind the other, and cut in nearly equal runs."""
    n = sum(array.size for array in arrays.values())
    lo, hi = part * n // parts, (part + 1) * n // parts
    slices, offset = [], 0
    for name, array in arrays.items():
        a, b = (min(max(bound - offset, 0), array.size) for bound in (lo, hi))
        if a < b or (array.size == 0 and part == 0):
            slices.append(Slice(name, a, array.shape, array.reshape(-1)[a:b]))
        offset += array.size
    return slices


def nobody(whom: str) -> None:
    """Nobody is told that the writing gets on."""


def save_part(folder: Path, found: Checkpoint, part: int, parts: int, mark: str = MARK) -> None:
    optimizer = {state: cut(arrays, part, parts) for state, arrays in found.optimizer.items()}
    InParts(folder, parts, mark).write(found.steps, part, cut(found.params, part, parts), optimizer, nobody)


def complete(folder: Path, found: Checkpoint, parts: int, keep: int, note: Note = nobody) -> Path:
    return InParts(folder, parts, MARK).complete(found.steps, found.epoch, found.step, found.info, keep, note)


def save(folder: Path, found: Checkpoint, parts: int, keep: int) -> Path:
    """Write a checkpoint in parts, the last one first."""
    for part in reversed(range(parts)):
        save_part(folder, found, part, parts)
    return complete(folder, found, parts, keep)


@pytest.mark.parametrize("parts", [1, 2, 3, 100])
def test_what_is_written_in_parts_is_read_as_a_whole(tmp_path: Path, parts: int):
    path = save(tmp_path / "new" / "folder", make(123), parts, keep=3)
    assert path == tmp_path / "new" / "folder" / "step-000000123"
    assert names(path) == ["info.h5", *(f"part-{part:04d}-of-{parts:04d}.h5" for part in range(parts))]
    assert names(path.parent) == [path.name]
    assert_equal(read(path), make(123))


def test_parameters_are_cut_in_the_middle(tmp_path: Path):
    path = save(tmp_path, make(1), 3, keep=1)
    with h5py.File(path / "part-0001-of-0003.h5") as file:
        assert list(file["params"]) == ["conv1.weight", "fc.weight", "scale"]
        assert list(file["params/conv1.weight"]) == ["27"]
        dataset = file["optimizer/momentum/fc.weight/0"]
        assert (dataset.shape, tuple(dataset.attrs["shape"])) == ((23,), (4, 10))


def test_evaluation_takes_a_folder_a_file_and_a_run(tmp_path: Path):
    file = write(tmp_path / "checkpoints", make(1), keep=2)
    path = save(tmp_path / "checkpoints", make(2), 2, keep=2)
    assert [find_checkpoint(each, {})[0].steps for each in (file, path, tmp_path)] == [1, 2, 2]
    for inner in path.iterdir():
        with pytest.raises(DataError, match=f"{inner} is only a part of a checkpoint; name its folder, {path}"):
            find_checkpoint(inner, {})


def test_until_it_is_complete_nobody_sees_it(tmp_path: Path):
    save(tmp_path, make(10), 2, keep=3)
    save_part(tmp_path, make(20), 0, 2)
    assert names(tmp_path) == [f".step-000000020.{MARK}.tmp", "step-000000010"]
    assert (newest(tmp_path) or pytest.fail("nothing found"))[0].steps == 10


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["params", "optimizer/squares"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float, place: str):
    broken = make(5)
    dict(broken.arrays())[f"{place}/fc.weight"][0, 7] = bad
    save_part(tmp_path / "good", broken, 0, 3)
    with pytest.raises(NotFiniteError, match=f"{place}/fc.weight is no longer finite after step 5"):
        save_part(tmp_path / "folder", broken, 1, 3)
    assert not (tmp_path / "folder").exists()


def remove(path: Path) -> str:
    path.unlink()
    return "can't be read .No such file"


def truncate(path: Path) -> str:
    os.truncate(path, path.stat().st_size // 2)
    return "is cut short"


def flip_number(path: Path) -> str:
    with h5py.File(path) as file:
        place = file["optimizer/momentum/fc.weight/0"].id.get_offset()
    flip(path, place + 5)
    return "the bytes of optimizer/momentum/fc.weight/0 are damaged"


def flip_metadata(path: Path) -> str:
    flip(path, 100)
    return "the metadata are damaged"


@pytest.mark.parametrize("harm", [remove, truncate, flip_number, flip_metadata])
def test_a_harmed_part_is_named_and_the_one_before_is_taken(tmp_path: Path, harm: Callable[[Path], str]):
    save(tmp_path, make(10), 3, keep=2)
    part = save(tmp_path, make(20), 3, keep=2) / "part-0001-of-0003.h5"
    reason = harm(part)
    with pytest.raises(DataError, match=f"{part}:? {reason}") as refused:
        read(part.parent)
    damage = str(refused.value)
    found, damaged = newest(tmp_path, {part.parent: damage}) or pytest.fail("nothing found")
    assert found.path.name == "step-000000010"
    assert_equal(read(found.path), make(10))
    assert len(damaged) == 1
    assert str(part) in damaged[0]


@pytest.mark.parametrize("harm", [remove, truncate, flip_metadata])
def test_a_harmed_info_is_named(tmp_path: Path, harm: Callable[[Path], str]):
    info = save(tmp_path, make(10), 2, keep=2) / "info.h5"
    reason = harm(info)
    with pytest.raises(DataError, match=f"{info}:? {reason}"):
        read(info.parent)


def test_a_part_of_another_step_is_refused(tmp_path: Path):
    path, other = (save(tmp_path, make(steps), 2, keep=2) for steps in (10, 20))
    shutil.copy(other / "part-0001-of-0002.h5", path)
    with pytest.raises(DataError, match=r"part-0001-of-0002\.h5 is of step 20, not 10"):
        read(path)


W = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize(
    ("first", "second", "culprit"),
    [
        (Slice("w", 0, (3, 4), W[:5]), Slice("w", 6, (3, 4), W[6:]), r"0001.*goes on at 6, not at 5: there is a gap"),
        (Slice("w", 0, (3, 4), W[:5]), Slice("w", 4, (3, 4), W[4:]), r"0001.*goes on at 4, not at 5: parts overlap"),
        (Slice("w", 6, (3, 4), W[6:]), Slice("w", 5, (3, 4), W[5:6]), r"0001.*goes on at 5, not at 0: there is a gap"),
        (Slice("w", 0, (3, 4), W), Slice("w", 0, (3, 4), W), r"goes on at 0, not at 12: parts overlap"),
        (Slice("w", 0, (3, 4), W[:5]), Slice("w", 5, (3, 4), W[5:11]), r"0001.*ends at 11, not at 12"),
        (Slice("w", 0, (3, 3), W[:5]), Slice("w", 5, (3, 3), W[5:]), r"0001.*ends at 12, not at 9"),
        (Slice("w", 0, (3, 4), W[:5]), Slice("w", 5, (4, 3), W[5:]), r"0001.*has another shape or type"),
        (Slice("w", 0, (3, 4), W[:5]), Slice("w", 5, (3, 4), W[5:].astype(float)), r"0001.*has another shape or type"),
    ],
)
def test_parts_that_do_not_make_a_whole_are_refused(tmp_path: Path, first: Slice, second: Slice, culprit: str):
    for part, piece in enumerate((first, second)):
        InParts(tmp_path, 2, MARK).write(1, part, [piece], {}, nobody)
    path = InParts(tmp_path, 2, MARK).complete(1, 0, 0, {}, 1, nobody)
    with pytest.raises(DataError, match=culprit):
        read(path)


def test_files_and_folders_stand_in_the_order_of_steps_and_the_newest_stay(tmp_path: Path):
    write(tmp_path, make(5), keep=3)
    save(tmp_path, make(10), 2, keep=3)
    write(tmp_path, make(15), keep=3)
    save(tmp_path, make(100), 3, keep=3)
    assert names(tmp_path) == ["step-000000010", "step-000000015.h5", "step-000000100"]
    assert (newest(tmp_path) or pytest.fail("nothing found"))[0].steps == 100
    write(tmp_path, make(110), keep=2)
    assert names(tmp_path) == ["step-000000100", "step-000000110.h5"]
    assert (newest(tmp_path) or pytest.fail("nothing found"))[0].steps == 110


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    old, new = make(5), replace(make(5), info={"seed": 4})
    save(tmp_path, old, 3, keep=2)
    assert_equal(read(save(tmp_path, new, 2, keep=2)), new)
    assert names(tmp_path) == ["step-000000005"]
    assert_equal(read(write(tmp_path, old, keep=2)), old)
    assert names(tmp_path) == ["step-000000005.h5"]
    assert_equal(read(save(tmp_path, new, 2, keep=2)), new)
    assert names(tmp_path) == ["step-000000005"]


def test_one_that_was_about_to_be_replaced_is_still_found(tmp_path: Path):
    save(tmp_path, make(5), 2, keep=1).rename(tmp_path / "step-000000005.old")
    assert_equal(read((newest(tmp_path) or pytest.fail("nothing found"))[0].path), make(5))
    save(tmp_path, make(5), 2, keep=1)
    assert names(tmp_path) == ["step-000000005"]


def test_what_killed_writers_left_is_pruned_and_what_is_under_way_is_not(tmp_path: Path):
    for steps in (10, 20, 30):
        save_part(tmp_path, make(steps), 0, 3, mark="killed")
    (tmp_path / ".step-000000010.killed.tmp" / ".part-0001-of-0003.h5.77.tmp").write_bytes(b"half")
    (tmp_path / ".step-000000020.h5.77.tmp").write_bytes(b"half")
    assert newest(tmp_path) is None
    save(tmp_path, make(20), 2, keep=1)
    assert names(tmp_path) == [".step-000000030.killed.tmp", "step-000000020"]
    save(tmp_path, make(30), 3, keep=1)
    assert names(tmp_path) == ["step-000000030"]


def test_parts_that_an_earlier_try_left_are_none_of_this_one(tmp_path: Path):
    """Whoever waits for the parts goes on waiting, and none of the old numbers gets into the checkpoint."""
    old, new = replace(make(40), steps=20), make(20)
    for part in range(3):
        save_part(tmp_path, old, part, 3, mark="killed")
    save_part(tmp_path, new, 0, 3)
    waits = Queue[str]()
    with ThreadPoolExecutor(1) as pool:
        path = pool.submit(complete, tmp_path, new, 3, 1, note=waits.put)
        assert waits.get(timeout=20).endswith(f".step-000000020.{MARK}.tmp/part-0001-of-0003.h5")
        save_part(tmp_path, new, 2, 3)
        save_part(tmp_path, new, 1, 3)
        assert_equal(read(path.result(timeout=20)), new)
    assert names(tmp_path) == ["step-000000020"]


def test_whoever_waits_for_parts_sees_that_they_get_on(tmp_path: Path):
    save_part(tmp_path, make(20), 0, 2)
    hidden = tmp_path / f".step-000000020.{MARK}.tmp"
    waits = Queue[str]()
    with ThreadPoolExecutor(1) as pool:
        path = pool.submit(complete, tmp_path, make(20), 2, 1, note=waits.put)
        waits.get(timeout=20)
        for nbytes in (1, 2):
            (hidden / ".part-0001-of-0002.h5.77.tmp").write_bytes(bytes(nbytes))
            assert waits.get(timeout=20).endswith("part-0001-of-0002.h5")
        assert waits.empty()
        save_part(tmp_path, make(20), 1, 2)
        path.result(timeout=20)


def test_a_folder_that_is_deleted_while_parts_are_waited_for_is_said(tmp_path: Path):
    save_part(tmp_path / "run", make(20), 0, 2)
    waits = Queue[str]()
    with ThreadPoolExecutor(1) as pool:
        path = pool.submit(complete, tmp_path / "run", make(20), 2, 1, note=waits.put)
        waits.get(timeout=20)
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(DataError, match=r"run/step-000000020 can't be written .No such file or directory"):
            path.result(timeout=20)


def test_a_part_that_may_not_grow_leaves_the_older_checkpoints(tmp_path: Path):
    save(tmp_path, make(1), 2, keep=1)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))" + WRITER
    command = [sys.executable, "-B", "-c", limited, str(tmp_path), "2", "3"]  # -B: its bytecode would be cut short too
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "part-0001-of-0002.h5 can't be written (file too large); earlier ones" in done.stderr.replace("File", "file")
    assert names(tmp_path / f".step-000000002.{MARK}.tmp") == []
    assert (newest(tmp_path) or pytest.fail("nothing found"))[0].steps == 1


WRITER = """
import importlib, sys
from pathlib import Path
tests = importlib.import_module("tests.checkpoint.test_slices")
for steps in range(int(sys.argv[2]), int(sys.argv[3])):
    tests.save(Path(sys.argv[1]), tests.make(steps), 2, keep=2)
    print(steps, flush=True)
"""


def test_writers_that_are_killed_leave_a_good_checkpoint(tmp_path: Path):
    written = killed_again_and_again(tmp_path, WRITER, 0.05, make, str(10**9))
    save(tmp_path, make(written + 1), 3, keep=1)
    assert names(tmp_path) == [f"step-{written + 1:09d}"], "what the killed left behind is gone"
