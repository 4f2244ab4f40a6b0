"""Lists of classes behave as an array of rows would."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnn.data.labels import Lists, check_labels, histogram
from dpnn.errors import DataError


@st.composite
def dense(draw):
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    return np.array(
        draw(st.lists(st.lists(st.integers(0, 1), min_size=k, max_size=k), min_size=n, max_size=n)), np.uint8
    )


def rows_of(lists, k):
    out = np.full((len(lists), k), 9, np.uint8)
    lists.put_dense(np.arange(len(lists)), out)
    return out


@given(dense(), st.data())
def test_lists_are_indexed_like_rows(rows, data):
    n, k = rows.shape
    lists = Lists.from_dense(rows)
    assert np.array_equal(rows_of(lists, k), rows)
    some = np.array(data.draw(st.lists(st.integers(0, n - 1))), np.int64)
    assert np.array_equal(rows_of(lists[some], k), rows[some])
    lo, hi = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    assert np.array_equal(rows_of(lists.part(lo, hi), k), rows[lo:hi])
    assert np.array_equal(rows_of(lists[lo:hi], k), rows[lo:hi])
    assert np.array_equal(rows_of(Lists.join([lists.part(0, lo), lists.part(lo, n)]), k), rows)
    assert histogram(lists, k) == rows.sum(0).tolist()


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_named(label):
    with pytest.raises(DataError, match=rf"here, y\[1\] = {label}: the label of sample 1 is not in 0\.\.2"):
        check_labels(np.array([0, label, 2]), 3, "here")
    with pytest.raises(DataError, match=rf"here, y_indices\[2\] = {label}: the label of sample 2 is not in 0\.\.2"):
        check_labels(Lists(np.array([0, 2, 2, 3]), np.array([0, 1, label])), 3, "here")
