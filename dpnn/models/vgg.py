"""VGG (Simonyan and Zisserman 2014): small filters, many layers; VGG-16 has 138,357,544 parameters."""

from typing import Literal

from dpnn.nn import BatchNorm, Chain, Conv, Dense, Dropout, Flatten, Layer, MaxPool, ReLU
from dpnn.nn.layer import Shape

# Table 1: how many convolutions of 64, 128, 256, 512 and 512 filters, with a pooling after each run.
_TABLE = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_FILTERS = (64, 128, 256, 512, 512)


def vgg(
    classes: int,
    shape: Shape,
    *,
    depth: Literal[11, 13, 16, 19] = 16,
    batchnorm: bool = False,
    sync: bool = False,
    dropout: float = 0.5,
) -> Chain:
    """The columns A, B, D and E of table 1; 224 x 224 as published. `batchnorm` puts norms in the place of biases."""
    layers: list[Layer] = []
    for filters, count in zip(_FILTERS, _TABLE[depth], strict=True):
        for _ in range(count):
            layers.append(Conv(filters, 3, padding=1, bias=not batchnorm))
            if batchnorm:
                layers.append(BatchNorm(sync=sync))
            layers.append(ReLU())
        layers.append(MaxPool(2))
    return Chain(
        *layers,
        Flatten(),
        Dense(4096),
        ReLU(),
        Dropout(dropout),
        Dense(4096),
        ReLU(),
        Dropout(dropout),
        Dense(classes),
    )
