"""What nodes cost: seconds forward and backward, parameters, bytes that cross between parts."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np

from dpnn.backends.base import Group
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Node
from dpnn.nn.join import Fork
from dpnn.nn.layer import Input
from dpnn.nn.pointwise import Flatten

ITEMSIZE = 4
"""Bytes of a number: costs are those of float32."""
_UPDATE_PASSES = 5
"""Over the parameters' memory in an update with momentum."""


class Phases(NamedTuple):
    """Seconds forward, backward, and for gradients of weights that are made by themselves."""

    forward: float
    backward: float
    weights: float = 0.0


@dataclass(frozen=True)
class Time:
    """Seconds of a group, measured for some numbers of samples, in rising order; `weights`: where it splits."""

    rows: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weights: tuple[float, ...]

    def of(self, rows: int) -> Phases:
        """Of so many samples: between two that were measured, or in proportion to the most."""
        measured = self.forward, self.backward, self.weights
        if rows > self.rows[-1]:
            return Phases(*(times[-1] * rows / self.rows[-1] for times in measured))
        return Phases(*(float(np.interp(rows, self.rows, times)) for times in measured))


@dataclass(frozen=True)
class Costs:
    """Rates of a rank, and of a message between two: what a plan assumes, or what was measured.

    `multiply_adds`: a second. `bandwidth`: bytes a second that a pass over memory takes. `call`: seconds of a group
    beside its samples and a pass over its parameters. `latency`: seconds of a message; `crossing`: its bytes a second.
    `groups`: measured, by `question`.
    """

    multiply_adds: float = 40e9
    bandwidth: float = 8e9
    call: float = 10e-6
    latency: float = 20e-6
    crossing: float = 4e9
    groups: Mapping[str, Time] = field(default_factory=dict)

    def phases(self, node: Node) -> Phases:
        """Assumed seconds of a sample; of a node whose group splits."""
        if isinstance(node.layer, Input | Fork | Flatten):
            return Phases(0.0, 0.0)
        nbytes = ITEMSIZE * (math.prod(node.shape) + sum(map(math.prod, node.input_shapes)))
        forward = multiply_adds(node) / self.multiply_adds + nbytes / self.bandwidth
        backward = forward if node.needs_grad else 0.0
        return Phases(forward, backward, backward if node.params else 0.0)

    def group(self, group: Group, rows: int, microbatches: int = 1) -> Phases:
        """Seconds of a group over a micro-batch of so many samples: measured, else assumed."""
        known = self.groups.get(question(group))
        if known is not None and group.gathers:
            return known.of(rows)._replace(weights=known.of(rows * microbatches).weights / microbatches)
        if known is not None:
            return known.of(rows)
        forward, backward, weights = (rows * sum(times) for times in zip(*map(self.phases, group.nodes), strict=True))
        once = self.call + sum(map(n_params, group.nodes)) * ITEMSIZE / self.bandwidth
        forward, backward = forward + once, backward + once
        weights += once / microbatches if group.gathers else once
        return Phases(forward, backward, weights) if group.splits else Phases(forward, backward + weights)

    def __str__(self) -> str:
        return (
            f"{self.multiply_adds / 1e9:.3g} G multiply-adds/s, {self.bandwidth / 1e9:.3g} GB/s of memory, "
            f"messages {self.latency * 1e6:.3g} us + {self.crossing / 1e9:.3g} GB/s"
        )

    def dump(self) -> str:
        """All of it as text, for `Costs.load`."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Costs":
        """The costs of a text."""
        values = json.loads(text)
        groups = {}
        for asked, times in values.pop("groups").items():
            whole = {"weights": (0.0,) * len(times["rows"])}  # earlier runs measured backward as a whole
            groups[asked] = Time(**whole | {key: tuple(found) for key, found in times.items()})
        return cls(**values, groups=groups)

    def message(self, nbytes: int) -> float:
        """Seconds of a message."""
        return self.latency + nbytes / self.crossing

    def update(self, n: int) -> float:
        """Seconds that an update of n parameters takes."""
        return n * ITEMSIZE * _UPDATE_PASSES / self.bandwidth


def multiply_adds(node: Node) -> int:
    """Of a sample, forward."""
    if isinstance(node.layer, Conv | Dense):
        pixels = math.prod(node.shape[1:]) if isinstance(node.layer, Conv) else 1
        return math.prod(node.params[0].spec.shape) * pixels
    return 0


def n_params(node: Node) -> int:
    """Numbers that the node holds."""
    return sum(math.prod(param.spec.shape) for param in node.params)


def question(group: Group) -> str:
    """What decides how long a group takes: its layers' kinds and options, and the shapes that they read."""
    return " + ".join(
        f"{type(node.layer).__name__} "
        f"{ {key: value for key, value in vars(node.layer).items() if key not in ('name', 'readers')} } "
        f"{node.input_shapes}"
        for node in group.nodes
    )
