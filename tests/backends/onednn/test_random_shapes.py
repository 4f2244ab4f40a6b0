"""Every fusion, and stacks of them, on shapes drawn at random: as the reference in float64, forward and backward."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

from dpnn.backends.onednn import dense, op, pool, unfold, winograd
from dpnn.errors import JobError
from dpnn.nn import (
    Add,
    AvgPool,
    BatchNorm,
    Branches,
    Chain,
    Concat,
    Conv,
    Dense,
    Dropout,
    Flatten,
    Fork,
    GlobalAvgPool,
    Heads,
    LocalResponseNorm,
    MaxPool,
    Network,
    ReLU,
)
from dpnn.nn.norm import BatchNormalize, BatchSums

from .conftest import CLASSES, Pair, force

Draw = Callable[[st.SearchStrategy[Any]], Any]

CHANNELS = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 16, 17])
SAME = st.sampled_from([(1, 0), (3, 1), (5, 2)])
"""(size, padding) that keep an image's size."""
ALGORITHMS = st.sampled_from(["direct", "unfold", "winograd"])


def conv(draw: Draw, filters: int, **how: Any) -> Conv:
    size, padding = draw(SAME)
    return Conv(filters, size, padding=padding, **how)


def any_conv(draw: Draw) -> Conv:
    """Of any size, stride and padding, also rectangular, also more padding than it needs."""
    sizes = st.integers(1, 5)
    size = draw(sizes | st.tuples(sizes, sizes))
    stride, padding = draw(st.integers(1, 3) | st.tuples(st.integers(1, 2), st.integers(1, 3))), draw(st.integers(0, 3))
    return Conv(draw(CHANNELS), size, stride, padding, bias=draw(st.booleans()))


def grouped(draw: Draw) -> Chain:
    groups, per_group = draw(st.sampled_from([2, 3])), draw(st.sampled_from([1, 2, 4, 8, 9]))
    return Chain(Conv(groups * per_group, 1), ReLU(), conv(draw, groups * draw(CHANNELS), groups=groups))


def normed(draw: Draw, filters: int, sync: bool = False) -> Chain:
    """A BatchNorm has the bias. Filters of one number would have no gradient but rounding: none is drawn."""
    size, padding = draw(st.sampled_from([(3, 1), (5, 2)]))
    return Chain(Conv(filters, size, padding=padding, bias=False), BatchNorm(sync=sync))


def synced(draw: Draw, filters: int) -> Chain:
    return normed(draw, filters, sync=True)


def wide(draw: Draw) -> Branches:
    return Branches(Conv(draw(CHANNELS), 1), conv(draw, draw(CHANNELS)), join=Concat())


def residual(draw: Draw, branches: Callable[[Draw, int], tuple[Network, ...]]) -> Chain:
    """A sum behind a fork."""
    filters = draw(CHANNELS)
    return Chain(Conv(filters, 1), ReLU(), Branches(*branches(draw, filters), join=Add()))


def max_pool(draw: Draw) -> MaxPool:
    size = draw(st.integers(1, 4) | st.tuples(st.integers(1, 3), st.integers(1, 4)))
    least = size if isinstance(size, int) else min(size)
    padding = draw(st.integers(0, least // 2))
    return MaxPool(size, draw(st.none() | st.integers(1, 3)), padding, draw(st.booleans()))


def mean(draw: Draw) -> AvgPool:
    return AvgPool(draw(st.integers(1, 3)), draw(st.integers(1, 2)), 0, draw(st.booleans()))


def lrn(draw: Draw) -> LocalResponseNorm:
    beta = draw(st.sampled_from([0.75, 0.5, 1.0]))
    return LocalResponseNorm(draw(st.integers(1, 7)), alpha=0.3, beta=beta, k=draw(st.sampled_from([1.0, 2.0])))


# In training: what stands between the first convolution and the last layers, and the group that it has to become.
FUSIONS: dict[str, tuple[Callable[[Draw], Network], tuple[type, ...]]] = {
    "conv": (any_conv, (Conv,)),
    "conv-groups": (grouped, (Conv,)),
    "conv-relu": (lambda draw: Chain(any_conv(draw), ReLU()), (Conv, ReLU)),
    "conv-fork": (lambda draw: Chain(any_conv(draw), wide(draw)), (Conv, Fork)),
    "conv-relu-fork": (lambda draw: Chain(any_conv(draw), ReLU(), wide(draw)), (Conv, ReLU, Fork)),
    "norm": (lambda draw: Chain(normed(draw, draw(CHANNELS)), conv(draw, 4)), (BatchNorm,)),
    "norm-relu": (lambda draw: Chain(normed(draw, draw(CHANNELS)), ReLU()), (BatchNorm, ReLU)),
    "norm-fork": (lambda draw: Chain(normed(draw, draw(CHANNELS)), wide(draw)), (BatchNorm, Fork)),
    "norm-relu-fork": (lambda draw: Chain(normed(draw, 9), ReLU(), wide(draw)), (BatchNorm, ReLU, Fork)),
    "add": (lambda draw: residual(draw, lambda d, k: (conv(d, k), Chain())), (Add,)),
    "add-of-three": (lambda draw: residual(draw, lambda d, k: (Chain(), conv(d, k), normed(d, k))), (BatchNorm, Add)),
    "add-relu": (lambda draw: Chain(residual(draw, lambda d, k: (conv(d, k), conv(d, k))), ReLU()), (Add, ReLU)),
    "add-relu-fork": (
        lambda draw: Chain(residual(draw, lambda d, k: (conv(d, k), Chain())), ReLU(), wide(draw)),
        (Add, ReLU, Fork),
    ),
    "add-twice-the-same": (lambda draw: residual(draw, lambda d, k: (Chain(), Chain())), (Add,)),
    "norm-add": (lambda draw: residual(draw, lambda d, k: (normed(d, k), conv(d, k))), (BatchNorm, Add)),
    "norm-add-relu": (
        lambda draw: Chain(residual(draw, lambda d, k: (normed(d, k), Chain())), ReLU()),
        (BatchNorm, Add, ReLU),
    ),
    "norm-norm-add-relu-fork": (
        lambda draw: Chain(residual(draw, lambda d, k: (normed(d, k), normed(d, k))), ReLU(), wide(draw)),
        (BatchNorm, BatchNorm, Add, ReLU, Fork),
    ),
    "relu": (lambda draw: Chain(MaxPool(2, 1), ReLU(), conv(draw, 3)), (ReLU,)),
    "relu-fork": (lambda draw: Chain(MaxPool(2, 1), ReLU(), wide(draw)), (ReLU, Fork)),
    "fork-of-a-declined-layer": (lambda draw: Chain(AvgPool(2), wide(draw)), (Fork,)),
    "lrn": (lambda draw: Chain(conv(draw, draw(CHANNELS)), ReLU(), lrn(draw)), (LocalResponseNorm,)),
    "lrn-fork": (lambda draw: Chain(lrn(draw), wide(draw)), (LocalResponseNorm, Fork)),
    "maxpool": (max_pool, (MaxPool,)),
    "maxpool-fork": (lambda draw: Chain(max_pool(draw), wide(draw)), (MaxPool, Fork)),
    "concat": (wide, (Concat,)),
    "concat-fork": (lambda draw: Chain(wide(draw), wide(draw)), (Concat, Fork)),
    "concat-relu": (lambda draw: Chain(wide(draw), ReLU()), (ReLU,)),
    "avgpool-declined": (lambda draw: Chain(mean(draw), conv(draw, 3)), (AvgPool,)),
    "dropout-declined": (lambda draw: Chain(Dropout(0.3), conv(draw, 3)), (Dropout,)),
    "sums": (lambda draw: Chain(synced(draw, draw(CHANNELS)), conv(draw, 4)), (BatchSums,)),
    "sync-norm": (lambda draw: Chain(synced(draw, draw(CHANNELS)), conv(draw, 4)), (BatchNormalize,)),
    "sync-norm-relu-fork": (
        lambda draw: Chain(synced(draw, 9), ReLU(), wide(draw)), (BatchNormalize, ReLU, Fork),
    ),
    "sync-norm-sync-norm-add-relu": (
        lambda draw: Chain(residual(draw, lambda d, k: (synced(d, k), synced(d, k))), ReLU()),
        (BatchNormalize, BatchNormalize, Add, ReLU),
    ),
    "both-norms-add": (
        lambda draw: residual(draw, lambda d, k: (synced(d, k), normed(d, k), Chain())),
        (BatchNormalize, BatchNorm, Add),
    ),
}  # fmt: skip

# The last layers: vectors.
ENDS: dict[str, tuple[Network, tuple[type, ...]]] = {
    "flatten-dense": (Chain(Flatten(), Dense(CLASSES)), (Flatten,)),
    "dense-relu": (Chain(Flatten(), Dense(9), ReLU(), Dropout(0.3), Dense(CLASSES, bias=False)), (Dense, ReLU)),
    "dense-relu-fork": (
        Chain(Flatten(), Dense(7), ReLU(), Branches(Dense(5), Dense(2), join=Concat()), Dense(CLASSES)),
        (Dense, ReLU, Fork),
    ),
    "dense-norm-add": (
        Chain(Flatten(), Dense(8, bias=False), BatchNorm(), ReLU(), Branches(Dense(8), Chain(), join=Add()), Dense(3)),
        (BatchNorm, ReLU, Fork),
    ),
    "flatten-fork": (Chain(Flatten(), Branches(Dense(4), Dense(1), join=Concat()), Dense(CLASSES)), (Flatten, Fork)),
    "global-mean": (Chain(GlobalAvgPool(), Dense(CLASSES)), (GlobalAvgPool,)),
    "global-mean-fork": (
        Chain(GlobalAvgPool(), Branches(Dense(4), Dense(2), join=Concat()), Dense(CLASSES)),
        (GlobalAvgPool, Fork),
    ),
    "heads": (
        Branches(Chain(GlobalAvgPool(), Dense(3)), Chain(Flatten(), Dense(3)), join=Heads(1, 0.3)),
        (Conv, ReLU, Fork),
    ),
}
NUMBERS = st.tuples(st.integers(5, 13), st.integers(5, 12), st.integers(0, 99))
"""Height, width, seed."""


def make(network: Network, shape: tuple[int, int, int], **how: Any) -> Pair:
    """Both plans; another case is drawn where the layers don't fit the image."""
    try:
        return Pair(network, shape, **how)
    except JobError:
        assume(False)
        raise


@pytest.mark.parametrize("name", FUSIONS)
@settings(max_examples=3, derandomize=True, deadline=None)
@given(data=st.data(), numbers=NUMBERS)
def test_fusions_between_images(name: str, data: st.DataObject, numbers: tuple[int, int, int]):
    fusion, wanted = FUSIONS[name]
    *size, seed = numbers
    network = Chain(Conv(8, 3, padding=1), fusion(data.draw), Flatten(), Dense(CLASSES))
    pair = make(network, (3, *size), rows=4, seed=seed)
    assert wanted in pair.ours.kinds
    for rows in (4, 3, 1):  # an epoch's last batch is smaller
        pair.step(rows)


@pytest.mark.parametrize("name", ENDS)
@settings(max_examples=4, derandomize=True, deadline=None)
@given(numbers=NUMBERS, channels=CHANNELS)
def test_fusions_of_vectors(name: str, numbers: tuple[int, int, int], channels: int):
    end, wanted = ENDS[name]
    *size, seed = numbers
    pair = Pair(Chain(Conv(channels, 3), ReLU(), end), (3, *size), rows=9, seed=seed)
    assert wanted in pair.ours.kinds
    for rows in (9, 8):
        pair.step(rows)
    if BatchNorm not in wanted:
        pair.step(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@settings(max_examples=4, derandomize=True, deadline=None)
@given(data=st.data(), numbers=NUMBERS, algorithm=ALGORITHMS)
def test_normalisation_is_folded_into_a_convolution_in_evaluation(
    bias: bool, relu: bool, data: st.DataObject, numbers: tuple[int, int, int], algorithm: str
):
    *size, seed = numbers
    folded = Chain(conv(data.draw, data.draw(CHANNELS), bias=bias), BatchNorm(eps=1e-3), *[ReLU()] * relu)
    network = Chain(Conv(8, 3), folded, wide(data.draw), Flatten(), Dense(CLASSES))
    with pytest.MonkeyPatch.context() as patch:
        force(patch, forward=algorithm)
        pair = make(network, (3, *size), rows=4, mode="eval", seed=seed)
        assert (Conv, BatchNorm, *[ReLU] * relu, Fork) in pair.ours.kinds
        for rows in (4, 1):
            pair.step(rows)


@pytest.mark.parametrize("name", FUSIONS)
@settings(max_examples=1, derandomize=True, deadline=None)
@given(data=st.data(), numbers=NUMBERS)
def test_fusions_in_evaluation(name: str, data: st.DataObject, numbers: tuple[int, int, int]):
    *size, seed = numbers
    network = Chain(Conv(8, 3, padding=1), FUSIONS[name][0](data.draw), Flatten(), Dense(CLASSES))
    pair = make(network, (3, *size), rows=3, mode="eval", seed=seed)
    for rows in (3, 1):
        pair.step(rows)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(data=st.data(), numbers=NUMBERS, algorithms=st.tuples(ALGORITHMS, ALGORITHMS, ALGORITHMS))
def test_stacks_of_fusions(data: st.DataObject, numbers: tuple[int, int, int], algorithms: tuple[str, str, str]):
    """In micro-batches, each convolution by the algorithms that are drawn, work cut among threads however small.

    What several normalisations leave of a gradient may be little: measured by a hundredth of the network's largest.
    """
    *size, seed = numbers
    names = data.draw(st.lists(st.sampled_from(sorted(FUSIONS)), min_size=2, max_size=4))
    parts = [FUSIONS[name][0](data.draw) for name in names]
    end = ENDS[data.draw(st.sampled_from(["flatten-dense", "dense-relu", "global-mean", "heads"]))][0]
    microbatches = data.draw(st.integers(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        force(patch, **dict(zip(("forward", "backward_data", "backward_weights"), algorithms, strict=True)))
        for module, name, value in (
            (op, "BLOCK", 8),
            (pool, "BLOCK", 8),
            (dense, "_LEAST", 1),
            (unfold, "_NUMBERS", 500),
            (unfold, "_PIXELS", 50),
            (winograd, "_NBYTES", 1),
            (winograd, "_LEAST", 12),
            (winograd, "_LEAST_OF_GRADIENT", 12),
        ):
            patch.setattr(module, name, value)
        network = Chain(any_conv(data.draw), *parts, end)
        pair = make(network, (3, *size), rows=6, microbatches=microbatches, seed=seed)
        for rows in (6 * microbatches, 5 * microbatches - 1):
            pair.step(rows, share=0.01)


SAME17 = Chain(Conv(17, 3, padding=1, bias=False), BatchNorm())
FORKED = Branches(Conv(3, 1), Conv(5, 1), join=Concat())
LARGE: dict[str, Network] = {
    "norm-norm-add-relu-fork": Chain(Branches(SAME17, SAME17, join=Add()), ReLU(), FORKED),
    "norm-add": Branches(SAME17, Chain(), join=Add()),
    "sync-norm-relu": Chain(Conv(17, 1, bias=False), BatchNorm(sync=True), ReLU()),
    "add-relu": Chain(Branches(Conv(17, 1), Chain(), join=Add()), ReLU()),
    "lrn-fork": Chain(LocalResponseNorm(5, alpha=0.3), FORKED),
    "maxpool-fork": Chain(MaxPool(3, 2, padding=1), FORKED),
    "maxpool-of-stride-1": MaxPool(3, 1, padding=1),
}


@pytest.mark.parametrize("name", LARGE)
def test_images_large_enough_for_all_threads(name: str):
    """Our kernels share work among threads from 16,384 numbers on: two images stay below, three don't."""
    network = Chain(Conv(17, 3, padding=1), ReLU(), LARGE[name], GlobalAvgPool(), Dense(CLASSES))
    pair = Pair(network, (3, 21, 22), rows=4)
    for rows in (4, 3, 2):
        pair.step(rows)
