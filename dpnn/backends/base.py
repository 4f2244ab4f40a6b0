"""The contract between the plan, which knows who computes what and when, and a backend, which knows how.

Shape letters, in every comment of every backend:
    N images · C channels in · H W rows and columns in · K channels out · R S rows and columns of the filter
    P Q rows and columns out · G groups
Canonical arrays: activations NCHW, filters KCRS (C counts one group's channels), dense weights (K, C).

The rule of accumulation, once for all backends: an op *assigns* what it writes (outputs, gradients of its inputs).
Only gradients of parameters are assigned by the first micro-batch of a step and added to by the later ones, because
all micro-batches share them: `put` is that rule. A tensor with several readers passes through a Fork, whose backward
adds.

A group of nodes becomes an op once for each slot and mode, while the plan is built; `forward` and `backward` take no
arguments. What changes from step to step stands in `Step`. Buffers have room for the largest micro-batch: an op
reads and writes the first `step.rows` rows. With 0 rows it writes zero gradients of parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from dpnn.memory import Array, Memory
from dpnn.native import Kernels
from dpnn.nn.graph import Node

__all__ = ["Array", "Backend", "Edge", "Group", "Mode", "Op", "Room", "Slot", "Step", "put"]

Mode = Literal["train", "eval"]


@dataclass
class Step:
    """What ops read that changes from step to step."""

    seed: int = 0
    epoch: int = 0
    rows: int = 0
    """Samples of this rank's micro-batch."""
    batch: int = 0
    """Samples of this micro-batch on all replicas together."""
    total: int = 0
    """Samples of the whole step: all micro-batches, all replicas. Losses divide by it."""
    first: bool = True
    """Whether this is the step's first micro-batch: parameter gradients are assigned, not added to."""
    last: bool = True
    """Whether it is the last one that adds to them."""
    before: int = 0
    """Samples of those that have been added to them before."""


Edge = tuple[int, int]
"""(index of the reading node, position of the input)."""


@dataclass(frozen=True)
class Group:
    """Nodes that a backend computes in one op, in topological order.

    Only the last node is read from outside the group; what passes between its nodes has no buffer in the plan.

    `forward_view`: the output is the first input's buffer, seen with the output's shape; nothing is computed.
    `backward_view`: the gradient of the first input is the gradient of the output, likewise.
    `in_place`: the gradient of this input is written over the gradient of the output (of a Fork, its first reader's).
    `splits`: the gradients of weights are made by a call of their own (`SplitOp`), which may come later. `gathers`:
    that is made in the last micro-batch, of the rows of all.
    """

    nodes: tuple[Node, ...]
    backend: "Backend"
    forward_view: bool = False
    backward_view: bool = False
    in_place: Edge | None = None
    splits: bool = False
    gathers: bool = False

    @property
    def inputs(self) -> list[tuple[Node, int]]:
        """The edges that enter the group."""
        inside = {node.index for node in self.nodes}
        return [(node, i) for node in self.nodes for i, source in enumerate(node.inputs) if source not in inside]


@dataclass(frozen=True)
class Room:
    """Bytes that an op wants beside its activations and gradients.

    `kept` lasts from forward to backward; `forward`, `backward` and `weights` are scratch of one call each. `row` is
    wanted for each sample of the step, in all slots the same bytes, from the first micro-batch to the last.
    """

    kept: int = 0
    forward: int = 0
    backward: int = 0
    weights: int = 0
    row: int = 0

    def sizes(self, rows: int) -> tuple[int, ...]:
        """Bytes in this order, where a step has at most so many samples."""
        return self.kept, self.forward, self.backward, self.weights, self.row * rows


class Slot(Protocol):
    """The buffers of one micro-batch in flight, by node. Batched arrays have their rows in the first dimension."""

    step: Step

    def input(self, node: Node, position: int = 0) -> Array:
        """What `node` reads: the output of its input number `position`, (rows, *shape). Read only."""
        ...

    def output(self, node: Node) -> Array:
        """What `node` writes in forward, (rows, *shape); () or (2, C) and so on where it isn't batched."""
        ...

    def d_output(self, node: Node) -> Array:
        """The gradient of the loss by the node's output, as its one reader wrote it."""
        ...

    def d_outputs(self, fork: Node) -> list[Array]:
        """The gradients that each reader of a Fork wrote."""
        ...

    def d_input(self, node: Node, position: int = 0) -> Array | None:
        """Where `node` writes the gradient by its input number `position`; None where nobody wants it."""
        ...

    def room(self, group: Group) -> tuple[Array, ...]:
        """The bytes that the backend asked for, in the order of `Room` (uint8, aligned to a cache line)."""
        ...

    def param(self, node: Node, role: str) -> Array:
        """The parameter `role` ("weight", ...) of `node`: a view of the flat array, in its canonical shape."""
        ...

    def d_param(self, node: Node, role: str) -> Array:
        """The gradient of that parameter: a view of the flat gradient array. Written by `put`."""
        ...


class Op(Protocol):
    """A group, bound to the buffers of one slot."""

    def forward(self) -> None:
        """Compute the outputs from the inputs."""
        ...

    def backward(self) -> None:
        """Compute the gradients of the inputs and of the parameters from the gradient of the output."""
        ...


class SplitOp(Op, Protocol):
    """An op of a group that splits."""

    def weights(self) -> None:
        """Compute the gradients that `backward` left out: those of weights. What that has read and written is still
        there: the inputs, and the gradient of the output (of a Fork, its first reader's).
        """
        ...


class Backend(Protocol):
    """A way to compute layers."""

    name: str
    dtype: np.dtype[Any]
    """The type it computes in, and that parameters and gradients have."""
    channels_last: bool
    """Whether it wants images to lie as NHWC in memory. Arrays have the shape (N, C, H, W) either way: the order in
    memory is a matter of their strides. A plan follows the first of its backends; all others take what comes."""
    about: str
    """Which library it computes with, and where that was found; empty where there is none to tell."""
    memory: Memory
    """Where the arrays lie that it computes with. A plan's backends have one memory."""
    kernels: Kernels | None
    """Our compiled CPU kernels, for what is done on the host; None where there are none."""
    arithmetic: Any
    """What updates flat arrays in its memory; None: NumPy does."""
    choices: dict[str, str]
    """What it chose by timing, by a name for the question; what stands here before `room` is asked isn't timed."""

    @property
    def unkept(self) -> str:
        """Why what it timed or compiled can't be kept for other runs; empty where it can."""
        ...

    def groups(self, nodes: Sequence[Node], mode: Mode) -> list[Group]:
        """The groups of those of `nodes` that this backend computes, in topological order; it leaves out the others."""
        ...

    def room(self, group: Group, rows: int, mode: Mode) -> Room:
        """What the op of one of this backend's groups wants, for at most `rows` rows."""
        ...

    def build(self, group: Group, slot: Slot, mode: Mode) -> Op:
        """The op of one of this backend's groups in a slot. In mode "eval" `backward` is never called.

        The forward of a group with `forward_view`, and the backward of one with `backward_view`, is never called. What
        backward needs (`d_output`, `d_input`) may be asked of the slot only in mode "train" for nodes that need a
        gradient, and inputs of a layer that exist in training only (BatchSums) only in mode "train".
        """
        ...


def put(d_param: Array, value: Array, step: Step) -> None:
    """Write a parameter's gradient: assigned by the first micro-batch, added by the others."""
    if step.first:
        d_param[...] = value
    else:
        d_param += value
