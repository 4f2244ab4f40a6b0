"""The order of arrival, written down and read again."""

from collections import deque

import numpy as np
import pytest

from dpnn.errors import DataError, RankError
from dpnn.strategies.downpour.order import STOP, Order, Replay
from dpnn.strategies.downpour.protocol import Kind

SERVED = [(0, Kind.LEASE), (2, Kind.FETCH), (2, Kind.PUSH), (0, Kind.PUSH)]


@pytest.fixture
def recorded(tmp_path):
    """The file of a server that served SERVED, then was stopped, then served one more fetch."""
    path = tmp_path / "order" / "server-0-of-1"
    order = Order(path)
    for replica, kind in SERVED:
        order.served(replica, kind)
    assert order.stops(True)
    order.served(1, Kind.FETCH)
    order.flush()
    return path


def test_the_file_is_a_row_of_numbers(recorded):
    assert np.fromfile(recorded, np.uint32).tolist() == [2, 17, 16, 0, STOP, 9]


def test_without_a_file_nothing_is_written(tmp_path):
    order = Order()
    order.served(0, Kind.PUSH)
    order.flush()
    assert not order.stops(False)
    assert list(tmp_path.iterdir()) == []


def test_many_entries_stand_in_the_file_before_the_run_ends(tmp_path):
    order, entries = Order(tmp_path / "order"), [replica % 7 * 8 + replica % 2 for replica in range(10_000)]
    for entry in entries:
        order.served(*divmod(entry, 8))
    assert (tmp_path / "order").stat().st_size >= 4 * 5_000
    order.flush()
    assert np.fromfile(tmp_path / "order", np.uint32).tolist() == entries


def test_who_comes_first_is_served_first():
    ready = deque([2, 0, 1])
    assert [Order().pick(ready, lambda replica: Kind.PUSH) for _ in range(4)] == [2, 0, 1, None]


def test_it_is_replayed_whatever_arrives_first(recorded):
    """Every replica asks for what it will be served next, all at once and in the wrong order; nobody else asks."""
    replay, kinds = Replay(recorded), dict(zip((2, 1, 0), (Kind.FETCH, Kind.FETCH, Kind.LEASE), strict=True))
    left = {0: [Kind.PUSH], 1: [], 2: [Kind.PUSH]}
    ready, served = deque([2, 1, 0]), []
    for _ in SERVED:
        assert not replay.stops(True)  # asked to by a signal: that one isn't the earlier run's
        replica = replay.pick(ready, kinds.__getitem__)
        served.append((replica, kinds[replica]))
        replay.served(*served[-1])
        if left[replica]:
            kinds[replica] = left[replica].pop()
            ready.append(replica)
    assert served == SERVED
    assert replay.pick(ready, kinds.__getitem__) is None
    assert replay.stops(False)
    assert not replay.stops(False)
    assert replay.pick(ready, kinds.__getitem__) == 1
    assert not ready


def test_a_fetch_follows_at_once_where_nothing_else_came_next(recorded):
    replay = Replay(recorded)
    assert Order().follows(2, Kind.FETCH)
    assert replay.follows(2, Kind.FETCH)
    assert not replay.follows(0, Kind.FETCH)
    for entry in SERVED[:3]:
        replay.served(*entry)
    assert not replay.follows(1, Kind.FETCH)  # the run was stopped in between


def test_who_asks_for_something_else_waits(recorded):
    ready = deque([0])
    assert Replay(recorded).pick(ready, lambda replica: Kind.PUSH) is None
    assert list(ready) == [0]


def test_a_run_that_goes_on_behind_the_end_of_the_file_is_an_error(recorded):
    recorded.write_bytes(recorded.read_bytes()[:8])
    replay = Replay(recorded)
    for replica, kind in SERVED[:2]:
        assert replay.pick(deque([replica]), lambda replica, kind=kind: kind) == replica
        replay.served(replica, kind)
    assert replay.pick(deque(), lambda replica: Kind.PUSH) is None
    with pytest.raises(RankError, match=f"all that {recorded} holds: it was cut short"):
        replay.pick(deque([2]), lambda replica: Kind.PUSH)


def test_a_file_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"server-1-of-2 can't be read .*parallel\.record = true"):
        Replay(tmp_path / "server-1-of-2")


def test_a_full_disk_is_an_error(tmp_path):
    (tmp_path / "order").symlink_to("/dev/full")
    order = Order(tmp_path / "order")
    order.served(0, Kind.PUSH)
    with pytest.raises(DataError, match=r"order can't be written .*make room there, or leave parallel\.record out"):
        order.flush()
