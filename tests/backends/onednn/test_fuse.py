"""Which nodes become one op, and which are left to the next backend."""

from dataclasses import dataclass

import numpy as np
import pytest

from dpnn.backends.reference import Reference
from dpnn.nn import (
    Add,
    BatchNorm,
    Branches,
    Chain,
    Conv,
    Dense,
    Flatten,
    Graph,
    Layer,
    MaxPool,
    Network,
    Node,
    ReLU,
    SoftmaxCrossEntropy,
)
from dpnn.plan.schedule import choose_groups

from ..conftest import ONEDNN, Bench
from .conftest import Pair


def grouped(network: Network, mode: str = "train", only: str = "") -> list[list[str]]:
    """The names of the nodes of each of oneDNN's groups; `only`: of these nodes."""
    graph = Graph(network, (3, 12, 12), SoftmaxCrossEntropy())
    nodes = [node for node in graph.nodes if not only or node.name in only.split()]
    return [[node.name for node in group.nodes] for group in ONEDNN.groups(nodes, mode)]


@dataclass(frozen=True, kw_only=True)
class Mean(Add):
    """A kind of sum that no backend knows."""


@dataclass(frozen=True)
class Leaky(ReLU):
    """A kind of ReLU that no backend knows."""


@pytest.mark.parametrize("layer", [Mean(name="it"), Leaky(name="it")], ids=["sum", "relu"])
def test_what_is_derived_from_a_layer_is_another_layer(layer: Layer):
    positions = 2 if isinstance(layer, Add) else 1
    node = Node(2, "it", layer, (0, 1)[:positions], ((3, 4, 4),) * positions, (3, 4, 4), (), True, False)
    assert ONEDNN.groups([node], "train") == []


def test_what_is_derived_from_a_relu_is_not_fused():
    assert grouped(Chain(Conv(4, 3), Leaky(), Flatten(), Dense(3))) == [["conv1"], ["flatten1"], ["dense1"]]


def test_a_node_of_another_rank_is_not_fused():
    network = Chain(Conv(4, 3), ReLU(), Flatten(), Dense(3), ReLU(), Dense(3))
    assert grouped(network, only="conv1 flatten1 dense1 relu2") == [["conv1"], ["flatten1"], ["dense1", "relu2"]]


def test_a_normalisation_whose_output_is_forked_is_not_part_of_the_sum():
    network = Chain(
        Conv(4, 3), BatchNorm(), Branches(Chain(Conv(4, 1), BatchNorm()), Chain(), join=Add()), Flatten(), Dense(3)
    )
    assert [sorted({name.rpartition(".")[2] for name in names}) for names in grouped(network)][1:4] == [
        ["batchnorm1", "fork"],
        ["conv1"],
        ["batchnorm1", "join"],
    ]


@pytest.mark.parametrize(("size", "mine"), [((16, 16), True), ((17, 16), False), (20, False)])
def test_a_window_whose_places_do_not_fit_a_byte_is_left_to_the_reference(size, mine):
    shape = (2, 24, 23)
    pool = MaxPool(size, 3, padding=2)
    ours = Bench(ONEDNN, pool, shape, capacity=2)
    assert (ours.group.backend is ONEDNN) == mine
    exact = Bench(Reference(np.float32), pool, shape, capacity=2)
    inputs, dys = ours.samples(2)
    for it in (ours, exact):
        it.put(inputs, dys).forward()
    for a, b in zip(ours.backward(), exact.backward(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_each_group_comes_after_those_that_it_reads(mode):
    body = Chain(Conv(4, 3, padding=1, bias=False), BatchNorm(sync=True), ReLU(), Conv(4, 1), BatchNorm())
    side = Chain(Conv(4, 1, bias=False), BatchNorm())
    network = Chain(
        Conv(4, 3), ReLU(), Branches(side, body, Chain(), join=Add()), ReLU(), MaxPool(2), Flatten(), Dense(3)
    )
    graph = Graph(network, (3, 12, 12), SoftmaxCrossEntropy())
    nodes = [node for node in graph.nodes[3:] if mode == "train" or not node.training_only]
    groups = choose_groups(nodes, [ONEDNN, Reference(np.float32)], mode)
    assert sorted(node.index for group in groups for node in group.nodes) == [node.index for node in nodes]
    written = {0, 1, 2}
    for group in groups:
        missing = {graph.nodes[node.inputs[i]].name for node, i in group.inputs if node.inputs[i] not in written}
        assert all("sums" in name for name in missing if mode == "eval")
        assert mode == "eval" or not missing
        written.add(group.nodes[-1].index)


@pytest.mark.parametrize("sync", [False, True])
def test_a_micro_batch_without_rows_adds_nothing(sync):
    network = Chain(Conv(8, 3, bias=False), BatchNorm(sync=sync), ReLU(), MaxPool(2), Flatten(), Dense(3))
    pair = Pair(network, (3, 8, 8), rows=3, microbatches=2)
    pair.step(6)
    pair.step(1)  # the first micro-batch has none
    pair.step(0)
    assert not pair.ours.store.grads.any()
