"""Ranks load a checkpoint together: none holds more than its own, and all learn of damage that one of them meets."""

from pathlib import Path

import numpy as np
import pytest

from dpnn.checkpoint import Checkpoint, Slice, newest, write
from dpnn.errors import DataError
from dpnn.state import load, passing_over_damaged

from .test_reading import STATES, room, wanted
from .test_slices import make, save
from .test_whole import flip


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("writers", [0, 3])
def test_each_rank_gets_its_own(world, shared_path, writers):
    folder = shared_path
    found, _ = world.first(lambda: save_all(folder, writers, (20,)))
    slices = room(world.rank, world.size)
    load(world, found, slices)
    for piece, right in zip(
        (p for pieces in slices.values() for p in pieces), wanted(world.rank, world.size), strict=True
    ):
        assert piece.array.tobytes() == right.array.tobytes()


def save_all(folder: Path, writers: int, steps: tuple[int, ...]):
    for n in steps:
        save(folder, make(n), writers, keep=9) if writers else write(folder, make(n), keep=9)
    return newest(folder)


@pytest.mark.parallel([2, 3])
def test_damage_that_one_rank_meets_is_told_to_all_and_the_one_before_is_loaded(world, shared_path):
    """The two newest are damaged, in what the last rank reads; the last but one can't even be opened there."""
    folder, tried = shared_path, []

    def attempt(known):
        found, damaged = world.first(lambda: newest(folder, known))
        tried.append(found.steps)
        slices = room(world.rank, world.size)
        load(world, found, slices)
        assert damaged == list(known.values())
        assert np.array_equal(slices[""][0].array, slices["momentum"][0].array - 1000)
        return found.steps

    world.first(lambda: save_all(folder, world.size, (10, 20, 30)))
    name = f"part-{world.size - 1:04d}-of-{world.size:04d}.h5"
    if world.rank == 0:
        found, _ = newest(folder)
        extent = max((e for e in found.extents if e.file.name == name), key=lambda e: e.hi - e.lo)
        flip(extent.file, extent.offset + 3)
    gone = folder / "step-000000020" / name
    with pytest.MonkeyPatch.context() as patched:
        if world.rank == world.size - 1:
            real = Path.open
            patched.setattr(
                Path,
                "open",
                lambda path, *how, **more: real(path.with_name("x") if path == gone else path, *how, **more),
            )
        world.meet()
        assert passing_over_damaged(attempt) == 10
    assert tried == [30, 20, 10]


@pytest.mark.parallel([2])
def test_where_the_newest_is_the_only_one_all_ranks_say_that_it_is_damaged(world, shared_path):
    folder = shared_path
    found, _ = world.first(lambda: save_all(folder, 0, (20,)))
    if world.rank == 0:
        flip(found.path, found.extents[-1].offset)
    world.meet()
    told = rf"no checkpoint in {folder} is good.*{found.extents[-1].dataset} are damaged"
    with pytest.raises(DataError, match=told):
        passing_over_damaged(
            lambda known: load(world, world.first(lambda: newest(folder, known))[0], room(world.rank, 2))
        )


NUMBERS, SMALL = 4 << 20, 1 << 18


@pytest.mark.parallel([2])
def test_a_rank_needs_no_more_memory_than_its_own_slices(world, shared_path):
    """Of 48 MiB the first rank takes 3, and looks at all."""
    folder = shared_path

    def make_large():
        array = np.arange(NUMBERS, dtype=np.float32)
        whole = Checkpoint({"w": array}, {state: {"w": array} for state in STATES[1:]}, 1, 0, 9)
        return write(folder, whole, keep=1)

    world.first(make_large)
    lo, hi = ((0, SMALL), (SMALL, NUMBERS))[world.rank]
    slices = {state: [Slice("w", lo, (NUMBERS,), np.zeros(hi - lo, np.float32))] for state in STATES}
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what is held now
    before = memory("VmRSS")
    found, _ = world.first(lambda: newest(folder))
    load(world, found, slices)
    grown = memory("VmHWM") - before  # with the slices: np.zeros takes memory when it is written
    assert all(pieces[0].array[-1] == hi - 1 for pieces in slices.values())
    own = sum(pieces[0].array.nbytes for pieces in slices.values())
    print(f"rank {world.rank}: {grown / 2**20:.1f} MiB more for {own / 2**20:.1f} MiB of {3 * NUMBERS * 4 / 2**20:.0f}")
    assert grown < own + (8 << 20)


def memory(what: str) -> int:
    """Of this process, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024
