"""The flat arrays of parameters."""

import numpy as np
import pytest

from dpnn.errors import DataError

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


def test_what_is_split_can_be_filled_in_again(build):
    store = build(wide()).store
    store.draw(1)
    values = {name: value.copy() for name, value in store.split(store.params).items()}
    before = store.params.copy()
    store.params[:] = 0
    store.fill(store.params, values, "checkpoint")
    assert np.array_equal(store.params, before)


def test_a_checkpoint_of_another_network_is_refused_by_name(build):
    store = build(wide()).store
    values = dict(store.split(store.params))
    weight = values.pop("conv1.weight")
    with pytest.raises(DataError, match=r"step-1\.h5: conv1\.weight is missing"):
        store.fill(store.params, values, "step-1.h5")
    with pytest.raises(DataError, match=r"conv1\.weight has the shape \(3, 2, 9\)"):
        store.fill(store.params, {**values, "conv1.weight": weight.reshape(3, 2, 9)}, "step-1.h5")
    with pytest.raises(DataError, match=r"other\.weight is not a parameter of this network"):
        store.fill(store.params, {**values, "conv1.weight": weight, "other.weight": weight}, "step-1.h5")
