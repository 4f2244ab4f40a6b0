"""Joins: how the outputs of branches become one, and the fork that gives each branch its input."""

from dataclasses import dataclass

from dpnn.nn.layer import Layer, Shape


@dataclass(frozen=True, kw_only=True)
class Concat(Layer):
    """Outputs one after the other along the channels (GoogLeNet, Szegedy et al. 2014)."""

    def infer(self, *shapes: Shape) -> Shape:
        if any(len(s) != len(shapes[0]) or s[1:] != shapes[0][1:] for s in shapes):
            raise self._misfit(shapes, "branches of one height and width")
        return (sum(s[0] for s in shapes), *shapes[0][1:])


@dataclass(frozen=True, kw_only=True)
class Add(Layer):
    """The sum of the outputs (ResNet, He et al. 2015)."""

    def infer(self, *shapes: Shape) -> Shape:
        if any(s != shapes[0] for s in shapes):
            raise self._misfit(shapes, "branches of one shape")
        return shapes[0]


@dataclass(frozen=True, init=False)
class Heads:
    """Each branch gets a loss of its own, with a weight; the first is the output, the others exist in training only.

    Not a layer: it leaves no node in the graph, only losses (GoogLeNet's auxiliary classifiers).
    """

    weights: tuple[float, ...]
    name: str = ""

    def __init__(self, *weights: float) -> None:
        object.__setattr__(self, "weights", weights)


@dataclass(frozen=True, kw_only=True)
class Fork(Layer):
    """One read-only output with several readers; backward adds their gradients. Put in by the graph."""

    readers: int

    def infer(self, *shapes: Shape) -> Shape:
        return shapes[0]
