"""A whole step: gradients of whole networks, micro-batches, and what is told to the strategy."""

import itertools

import numpy as np
import pytest

from .conftest import Recorder, wide


def run(built, batch, total=None):
    n = built.plan.instructions
    microbatches = sum(type(step).__name__ == "Load" for step in n)
    cuts = [batch.rows * m // microbatches for m in range(microbatches + 1)]
    rows = [hi - lo for lo, hi in itertools.pairwise(cuts)]
    built.executor.run(batch, [(r, r) for r in rows], total or batch.rows)
    return built.executor.loss


@pytest.mark.parametrize("sync", [False, True])
def test_gradients_of_a_whole_network_agree_with_finite_differences(build, batch, sync):
    built = build(wide(sync=sync))
    built.store.draw(3)
    samples = batch(4)
    run(built, samples)
    grads, params = built.store.grads.copy(), built.store.params
    rng = np.random.default_rng(0)
    for i in rng.choice(built.store.n_trained, 60, replace=False):
        value, h = params[i], 1e-6
        losses = []
        for sign in (1, -1):
            params[i] = value + sign * h
            losses.append(run(built, samples))
        params[i] = value
        assert grads[i] == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-4, abs=1e-8)


def test_the_split_normalisation_equals_the_plain_one(build, batch):
    plain, split = build(wide()), build(wide(sync=True))
    for built in (plain, split):
        built.store.draw(3)
        run(built, batch(4))
    assert plain.executor.loss == pytest.approx(split.executor.loss, rel=1e-12)
    assert np.allclose(plain.store.grads, split.store.grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("microbatches", [2, 3])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(build, batch, microbatches):
    from dpnn.nn import Chain, Conv, Dense, Dropout, Flatten

    network = Chain(Conv(3, 3), Flatten(), Dropout(0.5), Dense(3))
    whole, cut = build(network, rows=5), build(network, rows=3, microbatches=microbatches)
    for built in (whole, cut):
        built.store.draw(3)
        run(built, batch(5))
    assert whole.executor.loss == pytest.approx(cut.executor.loss, rel=1e-12)
    assert np.allclose(whole.store.grads, cut.store.grads, rtol=1e-9, atol=1e-14)


def test_a_rank_without_samples_gives_zero_gradients_and_joins_every_message(build, batch):
    built = build(wide())
    built.store.draw(3)
    run(built, batch(4))
    calls = [call[:1] + call[1:] for call in built.strategy.calls if call[0] != "tell"]
    built.strategy.calls.clear()
    built.executor.run(batch(0), [(0, 4)], 4)
    assert not built.store.grads.any()
    assert [call for call in built.strategy.calls if call[0] != "tell"] == calls
    assert ("tell", 0.0) in built.strategy.calls


def test_the_strategy_hears_of_a_step_in_order(build, batch):
    built = build(wide())
    built.store.draw(3)
    run(built, batch(4))
    names = [call[0] for call in built.strategy.calls]
    assert names[0] == "begin"
    assert names[-1] == "finish"
    assert names.index("tell") < len(names) - 1 - names[::-1].index("ready")


def test_where_it_is_can_be_read_from_outside_while_it_is_there(build, batch):
    """The number rises over steps too: two looks tell whether anything has moved."""
    built, seen = build(wide()), []

    def look(*_) -> None:
        seen.append((built.executor.place, built.executor.instruction()))

    built.store.draw(3)
    built.strategy.tell = look
    for _ in range(2):
        run(built, batch(4))
    assert [words for _, words in seen] == ["Loss", "Loss"]
    assert seen[0][0] < seen[1][0]


def test_evaluation_gives_the_same_scores_for_any_batch(build, batch):
    training = build(wide(dropout=0.0))
    training.store.draw(3)
    samples = batch(4)
    evaluation = build(wide(), mode="eval", store=training.store)
    evaluation.executor.run(samples, [(4, 4)], 1)
    scores = evaluation.executor.results[0][:4].copy()
    half = samples._replace(x=samples.x[2:], labels=samples.labels[2:], ids=samples.ids[2:], rows=2)
    evaluation.executor.run(half, [(2, 2)], 1)
    assert np.allclose(evaluation.executor.results[0][:2], scores[2:], rtol=1e-12)


def test_the_first_layer_that_is_not_finite_is_named(build, batch):
    built = build(wide())
    built.store.draw(3)
    built.store.param("wide.branch2.conv1.weight")[...] = np.inf
    with np.errstate(all="ignore"):
        run(built, batch(4))
        assert built.executor.not_finite() == "wide.branch2.conv1"


def test_a_training_plan_without_a_strategy_is_refused(build):
    from dpnn.plan import Arena, Executor

    built = build(wide())
    arena = Arena()
    arena.reserve(built.layout.nbytes)
    with pytest.raises(TypeError, match="needs a strategy"):
        Executor(built.layout, built.store, arena, 0)
    assert isinstance(built.strategy, Recorder)
