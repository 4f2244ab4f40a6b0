"""What isn't a number is passed on, so that a run that diverges ends, and the layer where it began is named."""

from typing import Any

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.reference import Reference
from dpnn.data import Batch

from ..conftest import ONEDNN, Bench
from .conftest import Side, force

SHORTCUT = nn.Branches(nn.Chain(nn.Conv(8, 3, padding=1)), nn.Chain(), join=nn.Add())
NETWORKS = {
    "conv-relu": (nn.Chain(nn.Conv(8, 3, name="it"), nn.ReLU()), "it"),
    "conv-norm-relu": (nn.Chain(nn.Conv(8, 3, name="it", bias=False), nn.BatchNorm(), nn.ReLU()), "it"),
    "norm-relu": (nn.Chain(nn.Conv(4, 3), nn.BatchNorm(name="it"), nn.ReLU()), "it"),
    "conv-relu-add-relu": (nn.Chain(nn.Conv(8, 3, name="it"), nn.ReLU(), SHORTCUT, nn.ReLU()), "it"),
    "conv-relu-pool": (nn.Chain(nn.Conv(8, 3, name="it"), nn.ReLU(), nn.MaxPool(2)), "it"),
}


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (nn.ReLU(), [(9, 4, 4)]),
        (nn.Add(), [(9, 4, 4), (9, 4, 4)]),
        (nn.MaxPool(2), [(9, 4, 4)]),
        (nn.LocalResponseNorm(), [(9, 4, 4)]),
        (nn.GlobalAvgPool(), [(9, 4, 4)]),
        (nn.BatchNorm(), [(9, 4, 4)]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Layer) else "",
)
@pytest.mark.parametrize("channel", [0, 8])
def test_a_layer_passes_it_on(layer: nn.Layer, shapes: list[nn.Shape], channel: int):
    it = Bench(ONEDNN, layer, *shapes, capacity=2)
    inputs, dys = it.samples(2)
    inputs[0][1, channel, 1, 2] = np.nan
    assert np.isnan(it.put(inputs, dys).forward()[1, channel]).any()


@pytest.mark.parametrize("algorithm", ["direct", "unfold", "winograd"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_ends_in_it_and_the_layer_is_named(algorithm: str, name: str, value: float):
    part, culprit = NETWORKS[name]
    with pytest.MonkeyPatch.context() as patch:
        force(patch, forward=algorithm, backward_data=algorithm, backward_weights=algorithm)
        network = nn.Chain(part, nn.Flatten(), nn.Dense(6), nn.ReLU(), nn.Dense(3))
        graph = nn.Graph(network, (3, 8, 8), nn.SoftmaxCrossEntropy())
        side = Side(graph, [ONEDNN, Reference(np.float32)], 2, 1, "train")
    store = side.store
    store.draw(0)
    (weight,) = (p.name for p in graph.params() if p.role == "weight" and f"{culprit}." in p.name)
    store.param(weight)[0] = value
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    labels, ids = np.zeros(2, np.int32), np.arange(2, dtype=np.uint64)
    side.executor.run(Batch(x, labels, ids, 2, 0, 0, None), [(2, 2)], 2)
    assert not np.isfinite(side.executor.loss)
    found: Any = side.executor.not_finite()
    assert found is not None
    assert culprit in found
