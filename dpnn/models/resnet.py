"""ResNet (He et al. 2015): ResNet-50 has 25,557,032 parameters, ResNet-152 has 60,192,808.

A bottleneck that halves the image does so in its 3 x 3 convolution, as PyTorch's does; the paper's does in its first.
"""

from typing import Literal

from dpnn.nn import Add, BatchNorm, Branches, Chain, Conv, Dense, GlobalAvgPool, Layer, MaxPool, ReLU
from dpnn.nn.layer import Shape

# Table 1: how many blocks conv2_x, conv3_x, conv4_x and conv5_x have. From 50 layers on the blocks are bottlenecks.
_TABLE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet(classes: int, shape: Shape, *, depth: Literal[18, 34, 50, 101, 152] = 50, sync: bool = False) -> Chain:
    """The columns of table 1; 224 x 224 as published. `sync` makes every BatchNorm see the whole global batch."""
    layers: list[Layer | Branches] = [
        *_conv(64, 7, stride=2, sync=sync),
        ReLU(),
        MaxPool(3, stride=2, padding=1),
    ]
    bottleneck = depth >= 50
    channels = 64
    for stage, count in enumerate(_TABLE[depth], start=2):
        filters = 64 * 2 ** (stage - 2)
        for block in range(1, count + 1):
            stride = 2 if stage > 2 and block == 1 else 1
            body = _bottleneck(filters, stride, sync) if bottleneck else _basic(filters, stride, sync)
            out = 4 * filters if bottleneck else filters
            # Option B: the shortcut is the identity wherever the shapes agree, else a projection.
            projection = _conv(out, 1, stride, sync) if stride > 1 or channels != out else []
            shortcut = Chain(*projection, name="shortcut")
            layers += [Branches(body, shortcut, join=Add(), name=f"conv{stage}_{block}"), ReLU()]
            channels = out
    return Chain(*layers, GlobalAvgPool(), Dense(classes))


def _basic(filters: int, stride: int, sync: bool) -> Chain:
    """Figure 5, left."""
    return Chain(*_conv(filters, 3, stride, sync), ReLU(), *_conv(filters, 3, 1, sync), name="body")


def _bottleneck(filters: int, stride: int, sync: bool) -> Chain:
    """Figure 5, right."""
    return Chain(
        *_conv(filters, 1, 1, sync),
        ReLU(),
        *_conv(filters, 3, stride, sync),
        ReLU(),
        *_conv(4 * filters, 1, 1, sync),
        name="body",
    )


def _conv(filters: int, size: int, stride: int, sync: bool) -> list[Layer]:
    """A convolution and its normalisation, which has the bias."""
    return [Conv(filters, size, stride, padding=size // 2, bias=False), BatchNorm(sync=sync)]
