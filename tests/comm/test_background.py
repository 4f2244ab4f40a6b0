"""Work beside a rank's own: it may be slow, but not stand still; what it raises is raised where it is asked for."""

import threading
import time

import pytest

from dpnn.comm.background import Background
from dpnn.comm.ranks import Ranks
from dpnn.errors import DataError, RankError


def test_it_goes_on_while_others_work_and_tells_its_result():
    go_on = threading.Event()
    work = Background("a sum", lambda note: go_on.wait(20) and 1 + 1, 20)
    assert not work.done()
    go_on.set()
    assert work.result() == 2
    assert work.done()


def test_what_it_raises_is_raised_at_every_look():
    def fail(note):
        raise DataError("no room")

    work = Background("a copy", fail, 20)
    with pytest.raises(DataError, match="no room"):
        work.result()
    with pytest.raises(DataError, match="no room"):
        work.done()


def test_who_stands_still_is_named():
    go_on = threading.Event()

    def stand(note):
        note("the file system of /disk to take its bytes")
        go_on.wait(20)

    work = Background("the checkpoint after step 7", stand, 0.2)
    with pytest.raises(RankError) as caught:
        work.result()
    go_on.set()
    assert str(caught.value) == (
        "the checkpoint after step 7 has waited 0.2 s for the file system of /disk to take its bytes, and has not got "
        "on; if that is only slow, raise parallel.stall_abort_s"
    )


def test_who_gets_on_may_take_long():
    def crawl(note):
        for i in range(10):
            note(f"piece {i}")
            time.sleep(0.1)
        return "done"

    assert Background("a copy", crawl, 0.9).result() == "done"


@pytest.mark.parallel([2])
def test_ranks_end_together_however_long_one_takes_that_gets_on(world):
    """The last one takes twice as long as a rank waits for another."""
    ranks = Ranks(world.comm, timeout_s=1.5)

    def count(note):
        for tick in range(30 if world.rank == world.size - 1 else 0):
            note(f"tick {tick}")
            time.sleep(0.1)
        return world.rank

    assert Background("counting", count, 1.5).together(ranks) == world.rank


@pytest.mark.parallel([2])
def test_what_one_raises_all_raise(world):
    def fail(note):
        if world.rank == 1:
            raise DataError("no room")

    with pytest.raises(DataError, match="rank 1: no room"):
        Background("a copy", fail, 20).together(world)
