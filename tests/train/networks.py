"""Networks as a user would write them; job files name them as "networks.py:function"."""

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
    GlobalAvgPool,
    Heads,
    LocalResponseNorm,
    MaxPool,
    ReLU,
)


def mixed(classes, shape, *, width=8):
    """A bit of everything: groups, a residual block, parallel branches, synchronous BatchNorm, dropout."""
    body = Chain(
        Conv(width, 3, padding=1, bias=False),
        BatchNorm(sync=True),
        ReLU(),
        Conv(width, 3, padding=1, groups=2),
    )
    wide = Branches(
        Chain(Conv(width, 1), ReLU()),
        Chain(AvgPool(3, 1, padding=1), Conv(width, 3, padding=1), Dropout(0.25)),
        join=Concat(),
    )
    return Chain(
        Conv(width, 3), ReLU(), Branches(body, Chain(), join=Add()), MaxPool(2), wide, BatchNorm(sync=True),
        Flatten(), Dense(24), ReLU(), Dropout(0.25), Dense(classes),
    )  # fmt: skip


def heads(classes, shape):
    """Two losses and no BatchNorm, so that micro-batches don't change the result."""
    return Chain(
        Conv(6, 3), ReLU(), MaxPool(2),
        Branches(
            Chain(Conv(8, 3), LocalResponseNorm(3, alpha=0.1), Flatten(), Dropout(0.25), Dense(classes)),
            Chain(GlobalAvgPool(), Dense(classes)),
            join=Heads(1, 0.3),
        ),
    )  # fmt: skip


def smooth(classes, shape):
    """No ReLU and no maximum: rounding errors grow steadily, and can't flip a decision."""
    return Chain(
        Conv(16, 3), BatchNorm(sync=True), AvgPool(2), Conv(32, 3), LocalResponseNorm(alpha=1.0),
        Flatten(), Dense(64), BatchNorm(sync=True), Dropout(0.25), Dense(classes),
    )  # fmt: skip


def plain(classes, shape, *, width=4):
    """Quick to train."""
    return Chain(Conv(width, 3), ReLU(), MaxPool(2), Flatten(), Dense(classes))


def vectors(classes, shape):
    """For samples that are vectors."""
    return Chain(Dense(16), BatchNorm(sync=True), ReLU(), Dense(classes))


def sixty_four(classes, shape):
    """Tiny, and as wide as there may be ranks."""
    branches = (Chain(Conv(2, 1), ReLU()) for _ in range(64))
    return Chain(Conv(4, 3), ReLU(), Branches(*branches, join=Concat()), GlobalAvgPool(), Dense(classes))


def large(classes, shape):
    """A dense layer with nearly all parameters: 400,000 of them, 5 MB with gradients and momentum in float32."""
    return Chain(Conv(8, 3), ReLU(), MaxPool(2), Flatten(), Dense(2000), ReLU(), Dense(classes))


def huge(classes, shape):
    """33 million parameters of images of 12 x 12 x 3, 400 MB with gradients and momentum in float32."""
    return Chain(AvgPool(4), Flatten(), Dense(1_000_000), Dense(classes))
