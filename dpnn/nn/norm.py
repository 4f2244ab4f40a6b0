"""Normalisation: over the batch, and over neighbouring channels."""

from dataclasses import dataclass
from typing import ClassVar

from dpnn.nn.layer import Layer, ParamSpec, Shape


@dataclass(frozen=True)
class BatchNorm(Layer):
    """Each channel normalised by its mean and variance over the micro-batch, scaled and shifted (Ioffe, Szegedy 2015).

    (C, H, W) or (C,) -> the same. Parameters, each (C,): weight, bias, and the statistics running_mean and
    running_var, which evaluation uses and which move by `momentum` towards each step's values (PyTorch's sense of the
    word; the variance is the unbiased one). With `sync` the mean and variance are those over all replicas: the graph
    then splits the layer into BatchSums and BatchNormalize.
    """

    momentum: float = 0.1
    eps: float = 1e-5
    sync: bool = False

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 1 or len(shapes[0]) not in (1, 3):
            raise self._misfit(shapes, "an image (C, H, W) or a vector (C,)")
        _check(self, self.momentum, self.eps)
        return shapes[0]

    def params(self, *shapes: Shape) -> dict[str, ParamSpec]:
        return _params(shapes[0], self.momentum)


@dataclass(frozen=True)
class BatchSums(Layer):
    """The first half of a synchronous BatchNorm: the sums of x and of x² of each channel over the micro-batch, (2, C).

    The output is summed over the replicas, and so is its gradient. That is handed over in centred coordinates, since
    the derivatives by the sums themselves would cancel where the mean is large: row 0 is the derivative by the mean,
    row 1 that by the variance, of each rank's own rows. With M numbers a channel on all replicas,

        dx = (d_mean + 2 (x - mean) d_var) / M.
    """

    batched: ClassVar[bool] = False
    dtype: ClassVar[str] = "float64"
    in_training_only: ClassVar[bool] = True
    collected: ClassVar[bool] = True

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 1 or len(shapes[0]) not in (1, 3):
            raise self._misfit(shapes, "an image (C, H, W) or a vector (C,)")
        return (2, shapes[0][0])


@dataclass(frozen=True)
class BatchNormalize(Layer):
    """The second half: BatchNorm of x by the sums over all replicas; inputs (x, sums), BatchNorm's parameters.

    The gradient that it gives x is the direct one, dy weight / sqrt(var + eps); the rest comes through the sums.
    """

    momentum: float = 0.1
    eps: float = 1e-5

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 2 or shapes[1] != (2, shapes[0][0]):
            raise self._misfit(shapes, "an image or a vector, and its BatchSums (2, C)")
        _check(self, self.momentum, self.eps)
        return shapes[0]

    def params(self, *shapes: Shape) -> dict[str, ParamSpec]:
        return _params(shapes[0], self.momentum)


@dataclass(frozen=True)
class LocalResponseNorm(Layer):
    """y = x / (k + alpha / size * sum of x² over `size` neighbouring channels)^beta (Krizhevsky et al. 2012, 3.3).

    As in PyTorch alpha is divided by `size`, and of an even `size` the larger half lies before the channel.
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 1 or len(shapes[0]) != 3:
            raise self._misfit(shapes, "an image (C, H, W)")
        if self.size < 1 or self.alpha < 0 or self.k <= 0:
            given = f"size = {self.size}, alpha = {self.alpha}, k = {self.k}"
            raise self._error(f"{given}; use a size above 0, an alpha from 0 on, a k above 0")
        return shapes[0]


def _check(layer: Layer, momentum: float, eps: float) -> None:
    if not (0 < momentum <= 1 and eps > 0):
        raise layer._error(f"momentum = {momentum}, eps = {eps}; use a momentum above 0, at most 1, and an eps above 0")


def _params(shape: Shape, momentum: float) -> dict[str, ParamSpec]:
    channels = shape[:1]
    return {
        "weight": ParamSpec(channels, "ones"),
        "bias": ParamSpec(channels, "zeros"),
        "running_mean": ParamSpec(channels, "zeros", statistic=momentum),
        "running_var": ParamSpec(channels, "ones", statistic=momentum),
    }
