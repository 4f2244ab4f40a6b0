"""LeNet, as Caffe has it: the digit reader of LeCun et al. 1998 with max pooling and one ReLU; 431,080 parameters."""

from dpnn.nn import BatchNorm, Chain, Conv, Dense, Dropout, Flatten, Layer, MaxPool, ReLU
from dpnn.nn.layer import Shape


def lenet(
    classes: int,
    shape: Shape,
    *,
    filters: tuple[int, ...] = (20, 50),
    kernel: int = 5,
    padding: int = 0,
    dense: int = 500,
    dropout: float = 0.0,
    batchnorm: bool = False,
    sync: bool = False,
) -> Chain:
    """A convolution and a pooling for each of `filters`, a dense layer, the scores; 28 x 28 as published."""
    layers: list[Layer] = []
    for k in filters:
        layers.append(Conv(k, kernel, padding=padding, bias=not batchnorm))
        if batchnorm:
            layers.append(BatchNorm(sync=sync))
        layers.append(MaxPool(2))
    layers += [Flatten(), Dense(dense), ReLU()]
    if dropout > 0:
        layers.append(Dropout(dropout))
    return Chain(*layers, Dense(classes))
