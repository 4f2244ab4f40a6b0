"""The slices of the flat arrays that the servers hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnn.strategies.downpour.protocol import Answer, Letter, Request, deal, pieces, shards


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


@given(sizes=st.lists(st.integers(0, 10**9), min_size=1, max_size=8), more=st.integers(0, 24), data=st.data())
def test_every_part_has_servers_of_its_own_and_the_fullest_is_as_empty_as_can_be(sizes, more, data):
    first = data.draw(st.integers(0, len(sizes) - 1))
    found = deal(sizes, len(sizes) + more, first)
    assert len(found) == len(sizes) + more
    assert found[0].part == first
    shares = [[(lo, hi) for of, lo, hi in found if of == part] for part in range(len(sizes))]
    assert shares == [shards(size, len(share)) for size, share in zip(sizes, shares, strict=True)]
    # One server more for the part whose servers hold most would be one less for a part whose servers then hold more.
    most = max(size / len(share) for size, share in zip(sizes, shares, strict=True))
    for size, share in zip(sizes, shares, strict=True):
        assert len(share) == 1 or size / (len(share) - 1) >= most


def test_fewer_servers_than_parts_cannot_be_dealt():
    with pytest.raises(ValueError, match="1 servers for 2 parts"):
        deal([10, 10], 1)


@given(n=st.integers(0, 10**9))
def test_pieces_cover_a_shard_in_order_and_are_few_and_long(n):
    found = pieces(n)
    assert [lo for lo, _ in found] == [0, *(hi for _, hi in found[:-1])][: len(found)]
    assert sum(hi - lo for lo, hi in found) == n
    assert len(found) <= 4
    assert all(hi - lo >= 1 << 17 for lo, hi in found[:-1])


@pytest.mark.parametrize("kind", [Request, Answer])
def test_a_record_is_read_as_it_was_written(kind):
    record = kind(*range(1, len(kind._fields) + 1))
    sent, received = Letter(kind), Letter(kind)
    sent.write(record)
    received.bytes[:] = sent.bytes
    assert received.read() == record
