"""Dense layers with so many weights that their gradient is made once a step, of the rows of all micro-batches."""

import numpy as np
import pytest

from dpnn import nn

from ..conftest import MICROBATCHES, ONEDNN, Bench

ROWS, INPUTS, UNITS = 4, 520, 600


@pytest.mark.parametrize("counts", [(3,), (4, 4, 4), (2, 4), (4, 0, 2), (4, 3, 0), (0, 2, 1), (0, 0, 0)])
def test_the_gradient_is_that_of_all_micro_batches(counts):
    assert len(counts) <= MICROBATCHES
    it = Bench(ONEDNN, nn.Dense(UNITS), (INPUTS,), capacity=ROWS)
    assert it.group.splits
    assert it.group.gathers
    rng = np.random.default_rng(0)
    for _ in range(2):  # steps
        wanted = np.zeros((UNITS, INPUTS))
        for i, rows in enumerate(counts):
            x, dy = (rng.standard_normal((rows, n)).astype(np.float32) for n in (INPUTS, UNITS))
            it.put([x], [dy], first=i == 0, last=i == len(counts) - 1, before=sum(counts[:i]))
            it.forward()
            it.backward()
            wanted += dy.T.astype(np.float64) @ x
        np.testing.assert_allclose(it.d_params["weight"], wanted, rtol=1e-4, atol=1e-5)


def test_few_weights_are_added_to_in_every_micro_batch():
    it = Bench(ONEDNN, nn.Dense(10), (INPUTS,), capacity=ROWS)
    assert it.group.splits
    assert not it.group.gathers
