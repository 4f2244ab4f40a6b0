"""ParallelSGD as a user runs it."""

import numpy as np

CHOSEN = ("train.epochs=0", "train.steps=20", "optimizer.name=sgd", "backend.precision=float64")


def test_plain_sgd_averaged_after_every_step_is_synchronous_sgd(trained, last, request):
    """The mean of p - lr g, weighted by samples, is p - lr times the mean gradient: also in an epoch's short batch."""
    chosen = (*CHOSEN, f"model.name={request.path.parent}/networks.py:plain")
    one = last(trained(1, *chosen))
    for ranks in (2, 3):
        many = last(trained(ranks, *chosen, "parallel.strategy=average", "parallel.every=1"))
        worst = max(np.abs(one.params[name] - many.params[name]).max() for name in one.params)
        assert worst < 1e-9
