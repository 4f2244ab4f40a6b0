"""One group of layers on a device, in buffers of its own that are full of random numbers."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpnn.backends.base import Array, Group, Op, Step
from dpnn.backends.cuda import Cuda
from dpnn.nn import Layer, Node, ReLU, Shape, SigmoidCrossEntropy, SoftmaxCrossEntropy
from dpnn.nn.graph import make_node
from dpnn.nn.layer import Input

PATTERN = np.random.default_rng(0).standard_normal(999_983, np.float32)
"""What float buffers are filled with, again and again: as many numbers as a prime, so that no two rows are alike."""


class Lone:
    """A layer, and a ReLU behind it where `relu`; it is the slot, too.

    `shapes`: of the layer's inputs, without ids. `data`: whether gradients by the inputs are wanted of an op that is
    built from now on.
    """

    def __init__(self, backend: Cuda, layer: Layer, shapes: Sequence[Shape], rows: int, relu: bool = False) -> None:
        self._backend, self._device, self.rows, self.data = backend, backend.device, rows, True
        self.step = Step(rows=rows, batch=rows, total=rows)
        nodes = _nodes(layer, shapes, relu)
        (self.group,) = (group for group in backend.groups(nodes, "train") if nodes[-1] in group.nodes)
        self.node, self.sources = self.group.nodes[0], nodes[: -1 - relu]
        self._inputs = [self._filled(source) for source in self.sources]
        self._output = self._empty(nodes[-1])
        self._d_output = self._filled(nodes[-1])
        self._d_inputs = [None if source.layer.holds != "float" else self._empty(source) for source in self.sources]
        if self.group.in_place is not None:
            self._d_inputs[self.group.in_place[1]] = self._d_output
        self._params = {param.role: self._draw(param.spec.shape) for param in self.node.params}
        self._d_params = {role: self._device.empty(array.nbytes).view(np.float32).reshape(array.shape)
                          for role, array in self._params.items()}  # fmt: skip
        room = backend.room(self.group, rows, "train")
        self._room = tuple(self._device.empty(nbytes) for nbytes in room.sizes(rows))

    def build(self) -> Op:
        """An op of the group."""
        return self._backend.build(self.group, self, "train")

    @property
    def n_inputs(self) -> int:
        """Numbers in the inputs that have a gradient."""
        return self.rows * sum(math.prod(source.shape) for source in self.sources if source.layer.holds == "float")

    @property
    def n_outputs(self) -> int:
        """Numbers in the output."""
        return math.prod(self._output.shape)

    @property
    def n_weights(self) -> int:
        """Numbers in the weights."""
        return math.prod(self._params["weight"].shape)

    def input(self, node: Node, position: int = 0) -> Array:
        return self._inputs[position]

    def output(self, node: Node) -> Array:
        return self._output

    def d_output(self, node: Node) -> Array:
        return self._d_output

    def d_outputs(self, fork: Node) -> list[Array]:
        return [self._d_output]

    def d_input(self, node: Node, position: int = 0) -> Array | None:
        return self._d_inputs[position] if self.data else None

    def room(self, group: Group) -> tuple[Array, ...]:
        return self._room

    def param(self, node: Node, role: str) -> Array:
        return self._params[role]

    def d_param(self, node: Node, role: str) -> Array:
        return self._d_params[role]

    def _empty(self, node: Node) -> Array:
        """A buffer for a node's output: (rows, *shape), images channels-last."""
        kind = node.layer.holds if isinstance(node.layer, Input) else node.layer.dtype
        dtype = np.dtype(np.float32 if kind == "float" else kind)
        shape = (self.rows, *node.shape) if node.layer.batched else node.shape
        array = self._device.empty(dtype.itemsize * math.prod(shape)).view(dtype)
        return _images(array, shape) if len(shape) == 4 else array.reshape(shape)

    def _filled(self, node: Node) -> Array:
        array = self._empty(node)
        n = math.prod(array.shape)
        if array.dtype.kind == "f":
            values = np.resize(PATTERN, n).astype(array.dtype)
        else:
            values = np.random.default_rng(0).integers(0, 2, n).astype(array.dtype)
        self._device.push(_images(values, array.shape) if array.ndim == 4 else values.reshape(array.shape), array)
        return array

    def _draw(self, shape: Shape) -> Array:
        array = self._device.empty(4 * math.prod(shape)).view(np.float32).reshape(shape)
        self._device.push(np.resize(PATTERN, shape), array)
        return array


def _nodes(layer: Layer, shapes: Sequence[Shape], relu: bool) -> list[Node]:
    """The layer's inputs, the layer, the ReLU; all in training."""
    labels = {SoftmaxCrossEntropy: "int32", SigmoidCrossEntropy: "uint8"}.get(type(layer))
    holds = ["float"] * len(shapes)
    if labels:
        holds[1] = labels
    if layer.reads_ids:
        shapes, holds = [*shapes, ()], [*holds, "uint64"]
    nodes: list[Node] = []
    for i, (shape, kind) in enumerate(zip(shapes, holds, strict=True)):
        nodes.append(make_node(nodes, Input(shape=shape, holds=kind), f"input{i}", ()))
    nodes.append(replace(make_node(nodes, layer, "it", tuple(range(len(nodes)))), needs_grad=True))
    if relu:
        nodes.append(make_node(nodes, ReLU(), "relu", (len(nodes) - 1,)))
    return nodes


def _images(flat: Array, shape: Shape) -> Array:
    """A flat array as (N, C, H, W) that lies in memory as (N, H, W, C)."""
    n, c, h, w = shape
    return flat.reshape(n, h, w, c).transpose(0, 3, 1, 2)
