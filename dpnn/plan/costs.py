"""What nodes cost: seconds for a sample forward and backward, parameters, bytes that cross between parts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Node
from dpnn.nn.join import Fork
from dpnn.nn.layer import Input
from dpnn.nn.pointwise import Flatten

ITEMSIZE = 4
"""Bytes of a number: costs are those of float32."""


@dataclass(frozen=True)
class Costs:
    """Rates of a rank, and of a message between two: what a plan assumes, or what was measured.

    `multiply_adds`: a second. `bandwidth`: bytes a second that a pass over memory takes. `latency`: seconds of a
    message; `crossing_bandwidth`: its bytes a second. `measured`: seconds of a node's forward and backward for a
    sample, by `question`.
    """

    multiply_adds: float = 30e9
    bandwidth: float = 8e9
    latency: float = 20e-6
    crossing_bandwidth: float = 4e9
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def phases(self, node: Node) -> tuple[float, float]:
        """Seconds for a sample, forward and backward."""
        if isinstance(node.layer, Input | Fork):
            return 0.0, 0.0
        known = self.measured.get(question(node))
        if known is not None:
            return known
        nbytes = ITEMSIZE * (math.prod(node.shape) + sum(map(math.prod, node.input_shapes)))
        if isinstance(node.layer, Flatten):
            nbytes = 0
        forward = multiply_adds(node) / self.multiply_adds + nbytes / self.bandwidth
        # Backward once by the inputs, once by the parameters.
        times = 2 if any(shape for shape in node.input_shapes) and node.needs_grad else 0
        return forward, times * forward

    def seconds(self, node: Node) -> float:
        """Seconds for a sample, forward and backward."""
        return sum(self.phases(node))

    def params(self, node: Node) -> int:
        """Numbers that the node holds."""
        return sum(math.prod(param.spec.shape) for param in node.params)

    def crossing(self, node: Node) -> float:
        """Seconds that a sample's output takes to another part, and its gradient back."""
        nbytes = ITEMSIZE * math.prod(node.shape) * (1 + node.needs_grad)
        return nbytes / self.crossing_bandwidth


def multiply_adds(node: Node) -> int:
    """Of a sample, forward."""
    if isinstance(node.layer, Conv | Dense):
        weight = node.params[0].spec.shape
        pixels = math.prod(node.shape[1:]) if isinstance(node.layer, Conv) else 1
        return math.prod(weight) * pixels
    return 0


def question(node: Node) -> str:
    """What decides how long a node takes: its layer's kind and options, and the shapes that it reads."""
    layer = node.layer
    options = {key: value for key, value in vars(layer).items() if key not in ("name", "readers")}
    return f"{type(layer).__name__} {options} {node.input_shapes}"
