"""Readers take their slices of a checkpoint, whoever wrote it; together they see whether it is damaged."""

import os
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import h5py
import numpy as np
import pytest

from dpnn.checkpoint import Contents, Slice, fill, look, newest, reading, verify, write
from dpnn.errors import DataError

from .test_slices import cut, make, save
from .test_whole import flip

STATES = ("", "momentum", "squares")


def written(folder: Path, writers: int) -> Contents:
    """A checkpoint by so many writers, each with a file; by 0: one file of whole arrays."""
    return look(save(folder, make(20), writers, keep=9) if writers else write(folder, make(20), keep=9))


def room(reader: int, readers: int, dtype: str = "float32", states: tuple[str, ...] = STATES) -> dict[str, list[Slice]]:
    """What one of some readers takes: nearly as many numbers as the others."""
    arrays = {name: np.full(array.shape, np.nan, dtype) for name, array in make(20).params.items()}
    return {state: cut({name: array.copy() for name, array in arrays.items()}, reader, readers) for state in states}


def wanted(reader: int, readers: int) -> list[Slice]:
    """What it then has, of all states."""
    found = make(20)
    arrays = (found.params, found.optimizer["momentum"], found.optimizer["squares"])
    return [piece for kept in arrays for piece in cut(kept, reader, readers)]


def together(parts: list[np.ndarray]) -> np.ndarray:
    return reduce(np.bitwise_xor, parts)


@pytest.fixture
def read_bytes(monkeypatch) -> Callable[[], int]:
    """How many bytes have been read, since it was asked before."""
    counts, real = [], os.preadv

    def preadv(file, buffers, offset):
        counts.append(real(file, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(reading.os, "preadv", preadv)
    return lambda: sum(counts.pop() for _ in range(len(counts)))


@pytest.mark.parametrize(("writers", "readers"), [(0, 1), (0, 3), (1, 2), (3, 1), (3, 2), (3, 3), (3, 50), (30, 4)])
def test_every_reader_gets_its_slices_and_no_byte_is_read_twice(tmp_path, read_bytes, writers, readers):
    found, crcs = written(tmp_path, writers), []
    read_bytes()
    for reader in range(readers):
        slices = room(reader, readers)
        crcs.append(fill(found, slices))
        mine = [piece for pieces in slices.values() for piece in pieces]
        for piece, right in zip(mine, wanted(reader, readers), strict=True):
            assert (piece.name, piece.lo) == (right.name, right.lo)
            assert piece.array.tobytes() == right.array.tobytes()
    verify(found, together(crcs), STATES)
    assert read_bytes() == sum(array.nbytes for _, array in make(20).arrays())


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_numbers_of_another_type_are_converted(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    found, slices = written(tmp_path, 3), room(0, 1, "float64")
    verify(found, fill(found, slices), STATES)
    for piece, right in zip((p for pieces in slices.values() for p in pieces), wanted(0, 1), strict=True):
        assert piece.array.dtype == np.float64
        assert np.array_equal(piece.array, right.array)


def test_a_reader_opens_no_files_but_its_own(tmp_path, monkeypatch):
    """Its part was written by another number of ranks."""
    found, opened, real = written(tmp_path, 9), [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *how, **more: opened.append(path.name) or real(path, *how, **more))
    fill(found, room(1, 3))
    assert opened == [f"part-{part:04d}-of-0009.h5" for part in (3, 4, 5)]
    fill(found, dict.fromkeys(STATES, ()))
    assert len(opened) == 3


@pytest.mark.parametrize("writers", [0, 3])
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_readers_together_name_what_is_damaged(tmp_path, writers, readers):
    """Any number of any array, whether a reader's slice begins, ends or goes on there."""
    found = written(tmp_path, writers)
    for extent in found.extents:
        for number in {0, (extent.hi - extent.lo) // 2, extent.hi - extent.lo - 1} if extent.hi > extent.lo else ():
            flip(extent.file, extent.offset + 4 * number + 1)
            crcs = together([fill(found, room(reader, readers)) for reader in range(readers)])
            with pytest.raises(DataError, match=f"{extent.file}: the bytes of {extent.dataset} are damaged"):
                verify(found, crcs, STATES)
            flip(extent.file, extent.offset + 4 * number + 1)


def test_what_nobody_needs_is_not_looked_at(tmp_path):
    found = written(tmp_path, 0)
    with h5py.File(found.path) as file:
        place = file["optimizer/squares/fc.weight"].id.get_offset()
    flip(found.path, place)
    states = ("", "momentum")
    verify(found, fill(found, room(0, 1, states=states)), states)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (os.remove, "can't be read .No such file"),
        (lambda path: os.truncate(path, 700), "can't be read .it is cut short"),
    ],
)
def test_a_file_that_changes_after_a_look_is_named(tmp_path, harm, told):
    found = written(tmp_path, 2)
    part = found.path / "part-0001-of-0002.h5"
    harm(part)
    fill(found, room(0, 2))
    with pytest.raises(DataError, match=f"{part} {told}"):
        fill(found, room(1, 2))


def test_what_is_known_to_be_damaged_is_passed_over_and_told_again(tmp_path):
    for steps in (10, 20, 30):
        write(tmp_path, make(steps), keep=3)
    files = {steps: tmp_path / f"step-0000000{steps}.h5" for steps in (10, 20, 30)}
    os.truncate(files[20], 100)
    found, damaged = newest(tmp_path, {files[30]: "the newest is bad"}) or pytest.fail("nothing found")
    assert (found.steps, damaged[0]) == (10, "the newest is bad")
    assert damaged[1].startswith(f"{files[20]} is cut short")
    with pytest.raises(DataError, match=r"the newest is bad; .*is cut short.*; the oldest too"):
        newest(tmp_path, {files[30]: "the newest is bad", files[10]: "the oldest too"})
    with pytest.raises(DataError, match="the newest is bad"):
        look(files[30], {files[30]: "the newest is bad"})
