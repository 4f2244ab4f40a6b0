"""The networks are the published ones, and a job's [model] table is checked."""

import pytest

from dpnn.errors import JobError
from dpnn.models import MODELS, build
from dpnn.nn import SoftmaxCrossEntropy
from dpnn.nn.graph import Graph

IMAGENET = (3, 224, 224)


def graph(name, classes, shape, **options):
    return Graph(build(name, classes, shape, options), shape, SoftmaxCrossEntropy())


def shapes(network):
    return {node.name: node.shape for node in network.nodes}


@pytest.mark.parametrize(
    ("name", "options", "shape", "count"),
    [
        ("alexnet", {}, (3, 227, 227), 60_965_224),
        ("vgg", {"depth": 11}, IMAGENET, 132_863_336),
        ("vgg", {"depth": 13}, IMAGENET, 133_047_848),
        ("vgg", {"depth": 16}, IMAGENET, 138_357_544),
        ("vgg", {"depth": 19}, IMAGENET, 143_667_240),
        ("googlenet", {}, IMAGENET, 6_998_552),
        ("googlenet", {"heads": True}, IMAGENET, 13_378_280),
        ("resnet", {"depth": 18}, IMAGENET, 11_689_512),
        ("resnet", {"depth": 34}, IMAGENET, 21_797_672),
        ("resnet", {"depth": 50}, IMAGENET, 25_557_032),
        ("resnet", {"depth": 101}, IMAGENET, 44_549_160),
        ("resnet", {"depth": 152}, IMAGENET, 60_192_808),
        ("resnet", {"depth": 50, "sync": True}, IMAGENET, 25_557_032),
    ],
)
def test_the_published_networks_have_their_numbers_of_parameters(name, options, shape, count):
    network = graph(name, 1000, shape, **options)
    assert network.n_params == count
    assert network.nodes[network.output].shape == (1000,)


def test_lenet_is_caffes():
    network = graph("lenet", 10, (1, 28, 28))
    assert network.n_params == 431_080
    assert [p.name for p in network.params()] == [
        f"{layer}.{role}" for layer in ("conv1", "conv2", "dense1", "dense2") for role in ("weight", "bias")
    ]


def test_lenet_takes_other_sizes_and_parts():
    network = graph(
        "lenet", 10, (1, 8, 8), filters=[16, 32], kernel=3, padding=1, dense=64, dropout=0.5, batchnorm=True, sync=True
    )
    assert shapes(network)["maxpool2"] == (32, 2, 2)
    assert "batchnorm1.sums" in shapes(network)
    assert "dropout1" in shapes(network)
    assert network.nodes[network.output].shape == (10,)


def test_vggs_norms_take_the_place_of_its_biases():
    names = {p.name for p in graph("vgg", 10, (3, 32, 32), depth=11, batchnorm=True).params()}
    assert "batchnorm8.bias" in names
    assert "conv8.weight" in names
    assert "conv8.bias" not in names


def test_the_layers_have_the_published_shapes():
    alexnet = shapes(graph("alexnet", 1000, (3, 227, 227)))
    assert [alexnet[f"conv{i}"] for i in range(1, 6)] == [
        (96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13),
    ]  # fmt: skip
    assert shapes(graph("vgg", 1000, IMAGENET))["maxpool5"] == (512, 7, 7)
    googlenet = shapes(graph("googlenet", 1000, IMAGENET))
    assert googlenet["pool1"] == (64, 56, 56)
    assert googlenet["inception3b.join"] == (480, 28, 28)
    assert googlenet["inception4e.join"] == (832, 14, 14)
    assert googlenet["inception5b.join"] == (1024, 7, 7)
    resnet = shapes(graph("resnet", 1000, IMAGENET))
    assert resnet["maxpool1"] == (64, 56, 56)
    assert resnet["conv3_1.body.conv1"] == (128, 56, 56)  # the stride is in the 3 x 3
    assert [resnet[f"conv{stage}_3.join"] for stage in (2, 3, 4, 5)] == [
        (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7),
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_networks_fit_other_sizes_and_numbers_of_classes(name):
    network = graph(name, 7, (1, 96, 80))
    assert network.nodes[network.output].shape == (7,)


@pytest.mark.parametrize("name", ["alexnet", "vgg"])
def test_an_image_that_is_too_small_is_refused_by_the_layer(name):
    with pytest.raises(JobError, match=r"^(conv|maxpool)\d"):
        graph(name, 10, (3, 10, 10))


def test_auxiliary_heads_train_only_and_leave_the_other_names_as_they_are():
    plain = graph("googlenet", 10, IMAGENET)
    heads = graph("googlenet", 10, IMAGENET, heads=True)
    assert [node.layer.weight for node in heads.nodes if node.index in heads.losses] == [1, 0.3, 0.3]
    kept = [p.name for node in heads.nodes if not node.training_only for p in node.params]
    assert kept == [p.name for p in plain.params()]
    assert "inception4a.branch2.conv1.weight" in kept
    assert "inception4b.branch2.conv1.weight" in kept
    aside = [p.name for node in heads.nodes if node.training_only for p in node.params]
    assert "head1.aux.dense1.weight" in aside
    assert "head2.aux.dense2.bias" in aside


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenett", {}, "model.name = 'lenett' .* did you mean lenet.* known are lenet, alexnet"),
        (
            "lenet",
            {"filter": 3},
            "model.filter is not an option of lenet; did you mean filters.* known are filters, kernel",
        ),
        ("lenet", {"kernel": "5"}, "model.kernel = '5' doesn't fit lenet: Expected `int`, got `str`"),
        ("lenet", {"batchnorm": 1}, "model.batchnorm = 1 .* Expected `bool`"),
        ("lenet", {"shape": 3}, "model.shape is not an option of lenet"),
        ("vgg", {"depth": 12}, "model.depth = 12 doesn't fit vgg"),
        ("missing.py:net", {}, "no file missing.py"),
        ("missing.py", {}, "write missing.py:function"),
    ],
)
def test_a_wrong_model_table_is_refused(name, options, message):
    with pytest.raises(JobError, match=message):
        build(name, 10, (1, 28, 28), options)


USERS_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from dpnn.nn import Chain, Dense, Flatten

@dataclass(frozen=True)
class Table:
    units: int

def net(classes, shape, *, units: int, scale: float = 1.0):
    return Chain(Flatten(), Dense(Table(units).units, name="hidden"), Dense(classes))

def text(classes, shape):
    return "conv"

def bare():
    return Chain()
"""


@pytest.fixture
def users_file(tmp_path):
    file = tmp_path / "my_net.py"
    file.write_text(USERS_FILE)
    return str(file)


def test_a_users_function_makes_a_network(users_file):
    network = graph(f"{users_file}:net", 4, (2, 3, 3), units=5, scale=2)
    assert [p.name for p in network.params()] == ["hidden.weight", "hidden.bias", "dense2.weight", "dense2.bias"]
    assert network.n_params == 18 * 5 + 5 + 5 * 4 + 4


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("nett", {}, "no function nett; did you mean net.* known are net, text, bare"),
        ("Chain", {}, "no function Chain"),
        ("net", {}, "model.units is missing"),
        ("net", {"units": 1.5}, "model.units = 1.5 doesn't fit"),
        ("net", {"width": 1}, "model.width is not an option"),
        ("text", {}, "returned a str"),
        ("text", {"units": 1}, "model.units is not an option of .*it has none"),
        ("bare", {}, r"must be \(classes, shape\)"),
    ],
)
def test_a_users_function_is_checked(users_file, function, options, message):
    with pytest.raises(JobError, match=message):
        build(f"{users_file}:{function}", 4, (2, 3, 3), options)


def test_a_users_file_that_fails_is_named(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module")
    with pytest.raises(JobError, match=r"broken\.py can't be loaded: ModuleNotFoundError: .*no_such_module"):
        build(f"{file}:net", 4, (1, 8, 8), {})
