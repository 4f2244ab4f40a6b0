"""The flattened network: names, forks, heads, and one gradient for each output."""

import random

import pytest

from dpnn.errors import JobError
from dpnn.nn import (
    Add,
    BatchNorm,
    Branches,
    Chain,
    Concat,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Heads,
    ReLU,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
)
from dpnn.nn.graph import Graph
from dpnn.nn.join import Fork

SHAPE = (4, 6, 6)


def graph(network, shape=SHAPE, loss=None, labels=()):
    return Graph(network, shape, loss or SoftmaxCrossEntropy(), labels)


def scores(*parts, name=""):
    """A network that ends in scores for 3 classes."""
    return Chain(*parts, GlobalAvgPool(), Dense(3), name=name)


def names(network):
    """The nodes between the three inputs and the losses."""
    return [node.name for node in network.nodes[3 : network.losses[0]]]


def inputs(network):
    """By name, what each node reads."""
    return {node.name: [network.nodes[i].name for i in node.inputs] for node in network.nodes}


def test_layers_are_named_by_kind_and_counter_or_by_their_own_name():
    body = Chain(Conv(4, 1), ReLU(), Conv(4, 1))
    network = graph(scores(Conv(4, 3, padding=1), ReLU(name="act"), ReLU(), Chain(*body.parts, name="body"), body))
    assert names(network) == [
        *("conv1", "act", "relu2", "body.conv1", "body.relu1", "body.conv2"),
        *("chain2.conv1", "chain2.relu1", "chain2.conv2", "globalavgpool1", "dense1"),
    ]
    assert [p.name for p in network.params()][:3] == ["conv1.weight", "conv1.bias", "body.conv1.weight"]


def test_a_single_layer_and_an_unnamed_branches_are_networks():
    assert names(graph(Dense(3), shape=(5,))) == ["dense"]
    assert names(graph(Branches(Dense(2), Dense(1, name="last")), shape=(5,))) == [
        *("branches.branch1", "branches.last", "branches.join"),
    ]


def test_branches_are_named_by_their_place():
    inception = Branches(Conv(2, 1), Chain(Conv(1, 1), Conv(3, 3, padding=1), name="three"), name="inception1")
    assert names(graph(scores(inception)))[:4] == [
        *("inception1.branch1", "inception1.three.conv1", "inception1.three.conv2", "inception1.join"),
    ]


def test_inputs_come_first_and_labels_follow_the_loss():
    network = graph(scores())
    assert [network.nodes[i].name for i in (network.images, network.labels, network.ids)] == ["images", "labels", "ids"]
    assert network.nodes[network.labels].layer.holds == "int32"
    several = graph(scores(), loss=SigmoidCrossEntropy(), labels=(3,))
    assert several.nodes[several.labels].layer.holds == "uint8"
    assert several.nodes[several.labels].shape == (3,)


def test_a_layer_that_draws_by_sample_reads_the_ids():
    assert inputs(graph(scores(Dropout(0.5))))["dropout1"] == ["images", "ids"]


def test_only_gradients_fork():
    block = Branches(Conv(4, 1), Chain(), join=Add(), name="block")
    without = graph(scores(block))
    assert "block.fork" not in names(without)
    assert inputs(without)["block.join"] == ["block.branch1", "images"]
    within = graph(scores(Conv(4, 1), block))
    assert inputs(within)["block.join"] == ["block.branch1", "block.fork"]
    assert inputs(within)["block.branch1"] == ["block.fork"]
    assert "one.fork" not in names(graph(scores(Conv(4, 1), Branches(ReLU(), name="one"))))


def test_needs_grad_follows_what_is_trained():
    network = graph(scores(ReLU(), Conv(4, 1), ReLU()))
    wanted = {node.name for node in network.nodes if node.needs_grad}
    assert wanted == {"conv1", "relu2", "globalavgpool1", "dense1", "dense1.loss"}


def test_running_statistics_are_not_counted():
    network = graph(scores(BatchNorm()))
    assert [p.role for p in network.params()][:4] == ["weight", "bias", "running_mean", "running_var"]
    assert network.n_params == 8 + 4 * 3 + 3


@pytest.mark.parametrize("before", [[], [Conv(4, 1)]])
def test_synchronous_batchnorm_is_split(before):
    network = graph(scores(*before, BatchNorm(0.2, 1e-3, sync=True)))
    source = "batchnorm1.fork" if before else "images"
    assert inputs(network)["batchnorm1.sums"] == [source]
    assert inputs(network)["batchnorm1"] == [source, "batchnorm1.sums"]
    nodes = {node.name: node for node in network.nodes}
    assert nodes["batchnorm1.sums"].training_only
    assert nodes["batchnorm1.sums"].layer.collected
    assert nodes["batchnorm1.sums"].shape == (2, 4)
    assert (nodes["batchnorm1"].layer.momentum, nodes["batchnorm1"].layer.eps) == (0.2, 1e-3)
    plain = graph(scores(*before, BatchNorm()))
    assert [p.name for p in network.params()] == [p.name for p in plain.params()]


def test_heads_weigh_their_losses_and_the_first_is_the_output():
    inner = Branches(scores(ReLU()), scores(name="aux"), join=Heads(1, 0.5), name="head2")
    network = graph(Chain(Conv(4, 1), Branches(Chain(Conv(4, 1), inner), scores(name="aux"), join=Heads(2, 0.3))))
    assert network.nodes[network.output].name == "dense1"
    assert {network.nodes[i].name: network.nodes[i].layer.weight for i in network.losses} == {
        "dense1.loss": 2.0,
        "head2.aux.dense1.loss": 1.0,
        "branches1.aux.dense1.loss": 0.3,
    }
    assert [network.nodes[i].training_only for i in network.losses] == [False, True, True]


def test_heads_leave_the_names_of_the_network_as_they_were():
    plain = graph(scores(Conv(4, 1), ReLU(), Conv(4, 1)))
    headed = graph(Chain(Conv(4, 1), Branches(scores(ReLU(), Conv(4, 1)), scores(), join=Heads(1, 0.3))))
    kept = [node.name for node in headed.nodes if not node.training_only and not isinstance(node.layer, Fork)]
    assert kept == [node.name for node in plain.nodes]
    assert [node.name for node in headed.nodes if node.training_only] == [
        *("branches1.branch2.globalavgpool1", "branches1.branch2.dense1", "branches1.branch2.dense1.loss"),
    ]


def test_a_head_may_be_a_single_layer_or_have_its_own_name():
    network = graph(Chain(Flatten(), Branches(Dense(3), Dense(3, name="aux"), join=Heads(1, 1))))
    assert names(network) == ["flatten1", "dense1", "branches1.aux"]
    named = graph(Chain(Branches(scores(name="main"), scores(), join=Heads(1, 1)), name="net"))
    assert named.nodes[named.output].name == "main.dense1"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (scores(ReLU(name="a"), ReLU(name="a")), "two layers of the network have the name 'a'"),
        (Chain(Branches(scores(), scores(), join=Heads(1, 1)), ReLU()), "the network: relu1 stands after Heads"),
        (
            Chain(Chain(Branches(scores(), join=Heads(1)), name="body"), ReLU()),
            "the network: relu1 stands after Heads",
        ),
        (Chain(Chain(Branches(name="empty"), name="body")), "body.empty: Branches need at least one branch"),
        (Branches(scores(), scores(), join=Heads(1), name="h"), "h: 2 branches, but Heads gives 1 weights"),
        (
            Branches(scores(), Branches(scores(), join=Heads(1)), join=Add(), name="sum"),
            "sum: branch branch2 ends in Heads, but the branches are joined",
        ),
        (Branches(Conv(2, 1), Conv(3, 1), join=Add(), name="sum"), "sum.join: can't take"),
        (Branches(Conv(2, 1), Conv(2, 3), join=Concat(), name="cat"), "cat.join: can't take"),
        (Chain(Flatten(), Chain(Conv(2, 3), name="late")), "late.conv1"),
    ],
)
def test_a_network_that_makes_no_sense_is_refused(network, message):
    with pytest.raises(JobError, match=message):
        graph(network)


def random_network(draw, depth=0):
    """Parts that keep SHAPE, then scores or heads."""
    end = scores()
    if depth < 2 and draw.random() < 0.4:
        heads = [random_network(draw, depth + 1) for _ in range(draw.randint(1, 3))]
        end = Branches(*heads, join=Heads(*[1.0] * len(heads)))
    return Chain(*random_parts(draw), end)


def random_parts(draw, depth=0):
    return [random_part(draw, depth) for _ in range(draw.randint(0, 3))]


def random_part(draw, depth):
    layers = [Conv(4, 3, padding=1), ReLU(), Dropout(0.5), BatchNorm(), BatchNorm(sync=True)]
    kind = draw.randrange(3) if depth < 3 else 0
    if kind == 0:
        return draw.choice(layers)
    branches = [Chain(*random_parts(draw, depth + 1)) for _ in range(draw.randint(1, 3))]
    if kind == 1:
        return Branches(*branches, join=Add())
    return Chain(Branches(*branches, join=Concat()), Conv(4, 1))


@pytest.mark.parametrize("seed", range(10))
def test_every_output_with_a_gradient_has_one_reader_that_sends_it(seed):
    draw = random.Random(seed)
    for _ in range(20):
        network = graph(random_network(draw))
        for node in network.nodes:
            assert all(i < node.index for i in node.inputs)
            assert network.nodes[node.index] is node
            expected = node.layer.readers if isinstance(node.layer, Fork) else 0 if node.index in network.losses else 1
            assert not node.needs_grad or len(network.readers(node)) == expected
            assert all(reader.inputs[position] == node.index for reader, position in network.readers(node))
        assert len({node.name for node in network.nodes}) == len(network.nodes)
        assert not network.nodes[network.output].training_only


@pytest.mark.parametrize("name", ["a/b", "a.b"])
def test_a_name_that_would_be_a_path_is_refused(name):
    for network in (Chain(ReLU(name=name)), Branches(Chain(ReLU(), name=name), Chain(), join=Add())):
        with pytest.raises(JobError, match=f"'{name}' is not a name for a layer"):
            Graph(network, (3, 4, 4), SoftmaxCrossEntropy())
