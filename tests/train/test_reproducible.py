"""`train.reproducible`: the same bits on any number of ranks, after 100 steps."""

import pytest

CHOSEN = (
    "model.name=lenet", "model.kernel=3", "model.batchnorm=true", "model.dropout=0.3",
    "train.epochs=0", "train.steps=100", "train.eval_every=0", "train.reproducible=true", "backend.threads=1",
)  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.soak)])
def test_ranks_that_divide_the_grains_end_with_the_same_bits(trained, identical, ranks):
    assert identical(trained(1, *CHOSEN), trained(ranks, *CHOSEN)) > 10_000


@pytest.mark.parametrize("ranks", [pytest.param(3, marks=pytest.mark.soak), 6])
def test_so_do_three_and_six_with_clipping(trained, identical, ranks):
    more = ("train.global_batch=48", "train.grains=24", "optimizer.clip=0.5", "optimizer.lr=0.2")
    assert identical(trained(1, *CHOSEN, *more), trained(ranks, *CHOSEN, *more)) > 10_000


def test_without_it_they_do_not(trained, last):
    plain = [setting for setting in CHOSEN if setting != "train.reproducible=true"]
    one, two = last(trained(1, *plain)), last(trained(2, *plain))
    assert any(one.params[name].tobytes() != two.params[name].tobytes() for name in one.params)
