"""What every op of every backend keeps to: rows, accumulation, 0 rows, views, evaluation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.reference import Reference


def run(it: Any, inputs: Any, dys: Any, **step: Any) -> list[Any]:
    """Forward and backward: copies of the output, of the gradients of inputs and of those of parameters."""
    it.put(inputs, dys, **step)
    y = it.forward().copy()
    return [y, *(dx.copy() for dx in it.backward() if dx is not None), *(d.copy() for d in it.d_params.values())]


def test_agrees_with_the_reference_in_float64(backend: Any, bench: Any, case: Any) -> None:
    it, exact = (bench(one, case.layer, *case.shapes) for one in (backend, Reference(np.float64)))
    inputs, dys = it.samples(3)
    close = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 2e-5}[backend.dtype]
    for role, value in it.params.items():
        exact.params[role][...] = value
    for ours, wanted in zip(run(it, inputs, dys), run(exact, inputs, dys), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=close, atol=close * max(1, np.abs(wanted).max()))


def test_rows_beyond_those_of_the_step_are_neither_read_nor_written(backend: Any, bench: Any, case: Any) -> None:
    tight, roomy = (bench(backend, case.layer, *case.shapes, capacity=capacity) for capacity in (2, 5))
    inputs, dys = tight.samples(2)
    for a, b in zip(run(tight, inputs, dys), run(roomy, inputs, dys), strict=True):
        np.testing.assert_array_equal(a, b)
    written = [dx for dx in roomy.d_inputs if dx is not None]
    if roomy.node.layer.batched:
        written.append(roomy.output_buffer)
    assert written
    for array in written:
        assert np.isnan(array[2:]).all()


def test_a_smaller_micro_batch_may_follow_a_larger_one(backend: Any, bench: Any, case: Any) -> None:
    used, fresh = (bench(backend, case.layer, *case.shapes, capacity=3) for _ in range(2))
    run(used, *used.samples(3))
    one = used.samples(1, seed=1)
    for a, b in zip(run(used, *one), run(fresh, *one), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_first_micro_batch_assigns_gradients_and_later_ones_add(backend: Any, bench: Any, case: Any) -> None:
    it = bench(backend, case.layer, *case.shapes)
    n = len(it.d_params)
    parts = [it.samples(rows, seed=rows) for rows in (3, 2)]
    alone = [run(it, *part, total=5) for part in parts]
    run(it, *parts[0], total=5, first=True)
    both = run(it, *parts[1], total=5, first=False)
    for i, (a, b, together) in enumerate(zip(*alone, both, strict=True)):
        wanted = a + b if i >= len(both) - n else b
        np.testing.assert_allclose(together, wanted, rtol=1e-5, atol=1e-6)


def test_no_rows_give_zero_gradients_and_leave_the_rest_alone(backend: Any, bench: Any, case: Any) -> None:
    it = bench(backend, case.layer, *case.shapes)
    nothing = it.samples(0)
    run(it, *nothing, batch=4, total=9)
    for d_param in it.d_params.values():
        np.testing.assert_array_equal(d_param, 0)
    if not it.node.layer.batched:
        np.testing.assert_array_equal(it.output_buffer, 0)
    rows = it.samples(2)
    run(it, *rows)
    before = {role: d.copy() for role, d in it.d_params.items()}
    run(it, *nothing, batch=0, total=0, first=False)
    for role, d_param in it.d_params.items():
        np.testing.assert_array_equal(d_param, before[role])


def test_evaluation_needs_no_gradients_and_leaves_parameters_alone(backend: Any, bench: Any, case: Any) -> None:
    it = bench(backend, case.layer, *case.shapes, mode="eval")
    inputs, _ = it.samples(2)
    assert np.isfinite(it.put(inputs).forward()).all()
    assert all(np.isnan(d).all() for d in it.d_params.values())
    first = it.put([x[:1] for x in inputs], total=2).forward().copy()
    second = it.put([x[1:] for x in inputs], total=2).forward().copy()
    whole = it.put(inputs).forward()
    apart = np.concatenate([first, second]) if it.node.layer.batched else first + second
    np.testing.assert_allclose(whole, apart, rtol=1e-5, atol=1e-6)


def test_an_input_that_is_not_trained_gets_no_gradient(backend: Any, bench: Any, case: Any) -> None:
    class FirstLayer(bench):
        def d_input(self, node: nn.Node, position: int = 0) -> None:
            return None

    with_dx, without = (kind(backend, case.layer, *case.shapes) for kind in (bench, FirstLayer))
    n = len(with_dx.d_params)
    inputs, dys = with_dx.samples(2)
    a, b = run(with_dx, inputs, dys), run(without, inputs, dys)
    for ours, wanted in zip(b[len(b) - n :], a[len(a) - n :], strict=True):
        np.testing.assert_array_equal(ours, wanted)
    if not without.group.backward_view and without.group.in_place is None:
        assert all(np.isnan(dx).all() for dx in without.d_inputs if dx is not None)


def test_dropped_numbers_depend_on_sample_epoch_seed_and_layer_only(backend: Any, bench: Any) -> None:
    it = bench(backend, nn.Dropout(0.4), (3, 5, 7), capacity=40)
    x, ids = np.ones((40, 3, 5, 7)), np.arange(40) * 2**33 + 5
    y = it.put([x, ids], seed=3, epoch=2).forward().copy()
    assert set(np.unique(y)) == {0, backend.dtype.type(1 / 0.6)}
    assert abs((y == 0).mean() - 0.4) < 0.03
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(it.put([x, ids[order]], seed=3, epoch=2).forward(), y[order])
    np.testing.assert_array_equal(it.put([x[:1], ids[7:8]], seed=3, epoch=2).forward(), y[7:8])
    assert (it.put([x, ids], seed=4, epoch=2).forward() != y).any()
    assert (it.put([x, ids], seed=3, epoch=3).forward() != y).any()
    assert (y[0] != y[1]).any()
    other = bench(backend, nn.Dropout(0.4), (3, 5, 7), capacity=40, name="other")
    assert (other.put([x, ids], seed=3, epoch=2).forward() != y).any()


def test_dropout_copies_in_evaluation(backend: Any, bench: Any) -> None:
    it = bench(backend, nn.Dropout(0.4), (3, 5), mode="eval")
    inputs, _ = it.samples(3)
    np.testing.assert_array_equal(it.put(inputs).forward(), inputs[0].astype(backend.dtype))


def test_batchnorm_uses_its_running_statistics_in_evaluation(backend: Any, bench: Any) -> None:
    it = bench(backend, nn.BatchNorm(eps=1e-3), (3, 2, 2), mode="eval")
    (x,), _ = it.samples(3)
    weight, bias, mean, var = (
        it.params[role][:, None, None] for role in ("weight", "bias", "running_mean", "running_var")
    )
    wanted = (x - mean) / np.sqrt(var + 1e-3) * weight + bias
    np.testing.assert_allclose(it.put([x]).forward(), wanted, rtol=1e-5, atol=1e-6)


def test_the_largest_number_of_a_window_that_comes_first_gets_the_gradient(backend: Any, bench: Any) -> None:
    it = bench(backend, nn.MaxPool(2), (1, 2, 4))
    x = np.array([[0.0, 7, 3, 3], [7, 7, 3, 3]]).reshape(1, 1, 2, 4)
    it.put([x], [np.array([5.0, 2]).reshape(1, 1, 1, 2)]).forward()
    np.testing.assert_array_equal(it.backward()[0][0, 0], [[0, 5, 2, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("score", [1e4, -1e4])
def test_losses_of_extreme_scores_are_finite(backend: Any, bench: Any, score: float) -> None:
    for layer, labels, shape in (
        (nn.SoftmaxCrossEntropy(), np.array([1, 0]), ()),
        (nn.SigmoidCrossEntropy(), np.array([[0, 1], [1, 0]]), (2,)),
    ):
        it = bench(backend, layer, (2,), shape)
        scores = np.array([[score, 0], [score, 0]])
        assert it.put([scores, labels]).forward() == pytest.approx(abs(score) / 2, abs=1)
        assert np.isfinite(it.backward()[0]).all()


def test_views_are_declared(backend: Any, bench: Any) -> None:
    flatten, fork = bench(backend, nn.Flatten(), (2, 3, 3)), bench(backend, nn.Fork(readers=2), (4,))
    plain = not backend.channels_last  # else flattening has to copy
    assert (flatten.group.forward_view, flatten.group.backward_view) == (plain, plain)
    assert (fork.group.forward_view, fork.group.backward_view) == (True, False)


def test_a_layer_that_no_one_knows_is_declined(backend: Any, bench: Any) -> None:
    @dataclass(frozen=True)
    class Wavelet(nn.ReLU):
        pass

    node = nn.Node(1, "wave", Wavelet(name="wave"), (0,), ((3,),), (3,), (), True, False)
    assert backend.groups([node], "train") == []
