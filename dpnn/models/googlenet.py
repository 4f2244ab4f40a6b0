"""GoogLeNet (Szegedy et al. 2014): 6,998,552 parameters, 13,378,280 with both auxiliary heads."""

from dpnn.nn import (
    AvgPool,
    Branches,
    Chain,
    Concat,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Heads,
    LocalResponseNorm,
    MaxPool,
    ReLU,
)
from dpnn.nn.layer import Shape


def googlenet(classes: int, shape: Shape, *, heads: bool = False, dropout: float = 0.4) -> Chain:
    """Table 1 of the paper; 224 x 224 as published. `heads` adds the two auxiliary classifiers, with the weight 0.3.

    The normalisation and the rounding up of poolings, which the paper leaves open, are those of its Caffe version.
    """
    beginning = (
        Conv(64, 7, stride=2, padding=3),
        ReLU(),
        _pool("pool1"),
        LocalResponseNorm(5, alpha=1e-4, beta=0.75),
        Conv(64, 1),
        ReLU(),
        Conv(192, 3, padding=1),
        ReLU(),
        LocalResponseNorm(5, alpha=1e-4, beta=0.75),
        _pool("pool2"),
        #                1x1  3x3       5x5      pool
        _inception("3a", 64, (96, 128), (16, 32), 32),
        _inception("3b", 128, (128, 192), (32, 96), 64),
        _pool("pool3"),
        _inception("4a", 192, (96, 208), (16, 48), 64),
    )
    middle = (
        _inception("4b", 160, (112, 224), (24, 64), 64),
        _inception("4c", 128, (128, 256), (24, 64), 64),
        _inception("4d", 112, (144, 288), (32, 64), 64),
    )
    end = (
        _inception("4e", 256, (160, 320), (32, 128), 128),
        _pool("pool4"),
        _inception("5a", 256, (160, 320), (32, 128), 128),
        _inception("5b", 384, (192, 384), (48, 128), 128),
        GlobalAvgPool(),
        Dropout(dropout),
        Dense(classes),
    )
    if not heads:
        return Chain(*beginning, *middle, *end)
    with_second = Branches(Chain(*end), _head(classes), join=Heads(1, 0.3), name="head2")
    with_first = Branches(Chain(*middle, with_second), _head(classes), join=Heads(1, 0.3), name="head1")
    return Chain(*beginning, with_first)


def _pool(name: str) -> MaxPool:
    return MaxPool(3, stride=2, ceil=True, name=name)


def _inception(name: str, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> Branches:
    """Figure 2b: filters of four branches; of (reduce, filters) the first go through 1 x 1 before the larger ones."""
    return Branches(
        Chain(Conv(one, 1), ReLU()),
        Chain(Conv(three[0], 1), ReLU(), Conv(three[1], 3, padding=1), ReLU()),
        Chain(Conv(five[0], 1), ReLU(), Conv(five[1], 5, padding=2), ReLU()),
        Chain(MaxPool(3, stride=1, padding=1), Conv(pool, 1), ReLU()),
        join=Concat(),
        name=f"inception{name}",
    )


def _head(classes: int) -> Chain:
    """Section 5: an auxiliary classifier."""
    return Chain(
        AvgPool(5, stride=3, ceil=True),
        Conv(128, 1),
        ReLU(),
        Flatten(),
        Dense(1024),
        ReLU(),
        Dropout(0.7),
        Dense(classes),
        name="aux",
    )
