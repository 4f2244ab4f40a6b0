"""What a layer is: hyper-parameters, the shape it makes of its inputs' shapes, the parameters it needs.

A layer keeps no arrays and knows no backend. Shapes are those of one sample, without the batch:
(C, H, W) for images, (C,) for vectors, () for one number.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dpnn.errors import JobError

Shape = tuple[int, ...]
Draw = Literal["he", "zeros", "ones"]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of a layer.

    `fan_in` scales the draw "he". `decay` says whether weight decay applies. Where
    `statistic` isn't 0 (a running mean or variance) the parameter is not trained: its "gradient" is the row-weighted
    value of the batch, and once a step it becomes (1 - statistic) * itself + statistic * gradient.
    """

    shape: Shape
    draw: Draw
    fan_in: int = 1
    decay: bool = False
    statistic: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The base of all layers. `name` is the layer's own name inside its chain; empty: chosen by the graph."""

    name: str = ""

    batched: ClassVar[bool] = True
    """Whether the output has a row for each sample (else one value for the whole micro-batch)."""
    dtype: ClassVar[str] = "float"
    """The output's type: "float" is the type that the backend computes in."""
    in_training_only: ClassVar[bool] = False
    """Whether evaluation leaves the node out."""
    collected: ClassVar[bool] = False
    """Whether the output is summed over all replicas before it is read, and its gradient likewise."""
    reads_ids: ClassVar[bool] = False
    """Whether the layer draws random numbers by sample: the graph appends the sample ids to its inputs."""

    def infer(self, *shapes: Shape) -> Shape:
        """The shape of the output for one sample, from the shapes of the inputs; JobError where they don't fit."""
        raise TypeError(f"{type(self).__name__} doesn't say what shape it makes")

    def params(self, *shapes: Shape) -> dict[str, ParamSpec]:
        """The parameters, by role ("weight", "bias", ...), from the shapes of the inputs."""
        return {}

    @property
    def _who(self) -> str:
        return self.name or type(self).__name__

    def _error(self, text: str) -> JobError:
        return JobError(f"{self._who}: {text}")

    def _misfit(self, shapes: tuple[Shape, ...], wants: str) -> JobError:
        return self._error(f"can't take an input of shape {', '.join(map(str, shapes))}; it wants {wants}")


@dataclass(frozen=True, kw_only=True)
class Input(Layer):
    """What the loader fills: `images` float, `labels` int32 (one a sample) or uint8 (0 or 1 a class), `ids` uint64."""

    shape: Shape
    holds: str = "float"

    def infer(self, *shapes: Shape) -> Shape:
        return self.shape


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a size that may be given as one number."""
    return value if isinstance(value, tuple) else (value, value)
