"""The flat arrays of parameters."""

import numpy as np

from .conftest import wide


def test_trained_parameters_lie_in_forward_order_and_statistics_behind_them(build):
    built = build(wide())
    statistic = [bool(piece.spec.statistic) for piece in built.store.pieces]
    assert statistic == sorted(statistic)
    forward = [p.name for p in built.graph.params() if not p.spec.statistic]
    assert [piece.name for piece in built.store.pieces if not piece.spec.statistic] == forward
    assert built.store.n_trained == built.graph.n_params
    ends = [piece.end for piece in built.store.pieces]
    assert [piece.offset for piece in built.store.pieces] == [0, *ends[:-1]]


def test_parameters_are_views_of_the_flat_array(build):
    store = build(wide()).store
    store.param("conv1.weight")[...] = 3.0
    assert (store.params[: 3 * 2 * 3 * 3] == 3.0).all()


def test_initial_values_depend_on_seed_and_name_alone(build):
    one, other = build(wide()).store, build(wide(sync=True)).store
    one.draw(5)
    other.draw(5)
    assert np.array_equal(one.params, other.params)
    other.draw(6)
    assert not np.array_equal(one.params, other.params)
