"""The slices of the flat arrays that the servers hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnn.strategies.downpour.protocol import ANSWER, REQUEST, record, shards


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


@pytest.mark.parametrize("dtype", [REQUEST, ANSWER])
def test_a_record_and_its_bytes_are_one(dtype):
    one, sent = record(dtype)
    other, received = record(dtype)
    one[0] = tuple(range(1, len(dtype.names) + 1))
    received[:] = sent
    np.testing.assert_array_equal(one, other)
