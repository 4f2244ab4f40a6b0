"""What nodes cost: seconds forward and backward, parameters, bytes that cross between parts."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

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


@dataclass(frozen=True)
class Time:
    """Seconds of a group's forward and backward, measured for some numbers of samples, in rising order."""

    rows: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]

    def of(self, rows: int) -> tuple[float, float]:
        """Forward and backward of so many samples: between two that were measured, or in proportion to the most."""
        if rows > self.rows[-1]:
            return self.forward[-1] * rows / self.rows[-1], self.backward[-1] * rows / self.rows[-1]
        forward, backward = (float(np.interp(rows, self.rows, times)) for times in (self.forward, self.backward))
        return forward, backward


@dataclass(frozen=True)
class Costs:
    """Rates of a rank, and of a message between two: what a plan assumes, or what was measured.

    `multiply_adds`: a second. `bandwidth`: bytes a second that a pass over memory takes. `call`: seconds of a group
    beside its samples. `latency`: seconds of a message; `crossing`: its bytes a second. `groups`: measured, by
    `question`.
    """

    multiply_adds: float = 40e9
    bandwidth: float = 8e9
    call: float = 10e-6
    latency: float = 20e-6
    crossing: float = 4e9
    groups: Mapping[str, Time] = field(default_factory=dict)

    def phases(self, node: Node) -> tuple[float, float]:
        """Assumed seconds of a sample, forward and backward."""
        if isinstance(node.layer, Input | Fork | Flatten):
            return 0.0, 0.0
        nbytes = ITEMSIZE * (math.prod(node.shape) + sum(map(math.prod, node.input_shapes)))
        forward = multiply_adds(node) / self.multiply_adds + nbytes / self.bandwidth
        # Backward goes to the inputs and to the parameters.
        return forward, (1 + bool(node.params)) * forward if node.needs_grad else 0.0

    def group(self, group: Group, rows: int) -> tuple[float, float]:
        """Seconds of a group's forward and backward over so many samples: measured, else assumed."""
        known = self.groups.get(question(group))
        if known is not None:
            return known.of(rows)
        forward, backward = (sum(times) for times in zip(*map(self.phases, group.nodes), strict=True))
        return self.call + rows * forward, self.call + rows * backward

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
        groups = {
            asked: Time(*(tuple(time[key]) for key in ("rows", "forward", "backward")))
            for asked, time in values.pop("groups").items()
        }
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
