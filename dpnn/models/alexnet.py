"""AlexNet as published, with the two groups of its two GPUs (Krizhevsky et al. 2012); 60,965,224 parameters."""

from dpnn.nn import Chain, Conv, Dense, Dropout, Flatten, LocalResponseNorm, MaxPool, ReLU
from dpnn.nn.layer import Shape


def alexnet(classes: int, shape: Shape, *, groups: int = 2, dropout: float = 0.5) -> Chain:
    """Five convolutions and three dense layers; 227 x 227 as published (the paper's 224 is a slip)."""
    return Chain(
        Conv(96, 11, stride=4),
        ReLU(),
        _norm(),
        MaxPool(3, stride=2),
        Conv(256, 5, padding=2, groups=groups),
        ReLU(),
        _norm(),
        MaxPool(3, stride=2),
        Conv(384, 3, padding=1),
        ReLU(),
        Conv(384, 3, padding=1, groups=groups),
        ReLU(),
        Conv(256, 3, padding=1, groups=groups),
        ReLU(),
        MaxPool(3, stride=2),
        Flatten(),
        Dense(4096),
        ReLU(),
        Dropout(dropout),
        Dense(4096),
        ReLU(),
        Dropout(dropout),
        Dense(classes),
    )


def _norm() -> LocalResponseNorm:
    """Section 3.3: k = 2, n = 5, alpha = 1e-4, beta = 0.75; the paper doesn't divide alpha by n."""
    return LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)
