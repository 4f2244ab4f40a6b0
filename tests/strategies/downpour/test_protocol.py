"""The slices of the flat arrays that the servers hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnn.strategies.downpour.protocol import Answer, Letter, Request, pieces, shards


@given(n=st.integers(0, 10**9), servers=st.integers(1, 64))
def test_shards_cover_all_numbers_in_order_and_evenly(n, servers):
    found = shards(n, servers)
    assert len(found) == servers
    assert [lo for lo, _ in found] == [0, *(hi for _, hi in found[:-1])]
    assert found[-1][1] == n
    sizes = [hi - lo for lo, hi in found]
    assert min(sizes) >= 0
    assert all(abs(size - n / servers) <= 16 for size in sizes)
    assert all(lo % 16 == 0 for lo, _ in found)


@pytest.mark.parametrize(("n", "servers"), [(0, 3), (1, 2), (15, 4), (16, 4), (40, 4), (63, 4)])
def test_with_fewer_numbers_than_cache_lines_some_servers_hold_none(n, servers):
    found = shards(n, servers)
    assert found[-1][1] == n
    assert all(lo <= hi for lo, hi in found)
    assert sum(hi - lo for lo, hi in found) == n


@given(n=st.integers(0, 10**9))
def test_pieces_cover_a_shard_in_order_and_are_few_and_long(n):
    found = pieces(n)
    assert [lo for lo, _ in found] == [0, *(hi for _, hi in found[:-1])][: len(found)]
    assert sum(hi - lo for lo, hi in found) == n
    assert len(found) <= 8
    assert all(hi - lo >= 1 << 16 for lo, hi in found[:-1])


@pytest.mark.parametrize("kind", [Request, Answer])
def test_a_record_is_read_as_it_was_written(kind):
    record = kind(*range(1, len(kind._fields) + 1))
    sent, received = Letter(kind), Letter(kind)
    sent.write(record)
    received.bytes[:] = sent.bytes
    assert received.read() == record
