"""The reference: plain NumPy, readable, the definition of correct for every layer. Never tuned."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike

from dpnn.backends.base import Group, Mode, Op, Room, Slot
from dpnn.backends.reference.conv import ConvOp
from dpnn.backends.reference.dense import DenseOp
from dpnn.backends.reference.join import AddOp, ConcatOp, ForkOp, ViewOp
from dpnn.backends.reference.loss import SigmoidCrossEntropyOp, SoftmaxCrossEntropyOp
from dpnn.backends.reference.norm import BatchNormalizeOp, BatchNormOp, BatchSumsOp, LocalResponseNormOp
from dpnn.backends.reference.pointwise import DropoutOp, ReLUOp
from dpnn.backends.reference.pool import AvgPoolOp, GlobalAvgPoolOp, MaxPoolOp
from dpnn.memory import HOST, Memory
from dpnn.native import Kernels
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Node
from dpnn.nn.join import Add, Concat, Fork
from dpnn.nn.layer import Layer
from dpnn.nn.loss import SigmoidCrossEntropy, SoftmaxCrossEntropy
from dpnn.nn.norm import BatchNorm, BatchNormalize, BatchSums, LocalResponseNorm
from dpnn.nn.pointwise import Dropout, Flatten, ReLU
from dpnn.nn.pool import AvgPool, GlobalAvgPool, MaxPool

_OPS: dict[type[Layer], Callable[[Node, Slot, Mode], Op]] = {
    Add: AddOp,
    AvgPool: AvgPoolOp,
    BatchNorm: BatchNormOp,
    BatchNormalize: BatchNormalizeOp,
    BatchSums: BatchSumsOp,
    Concat: ConcatOp,
    Conv: ConvOp,
    Dense: DenseOp,
    Dropout: DropoutOp,
    Flatten: ViewOp,
    Fork: ForkOp,
    GlobalAvgPool: GlobalAvgPoolOp,
    LocalResponseNorm: LocalResponseNormOp,
    MaxPool: MaxPoolOp,
    ReLU: ReLUOp,
    SigmoidCrossEntropy: SigmoidCrossEntropyOp,
    SoftmaxCrossEntropy: SoftmaxCrossEntropyOp,
}


class Reference:
    """Each node is a group of its own; computes in float32 or float64."""

    name = "reference"
    channels_last = False
    about = ""
    memory: Memory = HOST
    kernels: Kernels | None = None
    arithmetic = None
    unkept = ""

    def __init__(self, dtype: DTypeLike = np.float32) -> None:
        self.dtype = np.dtype(dtype)
        self.choices: dict[str, str] = {}

    def groups(self, nodes: Sequence[Node], mode: Mode) -> list[Group]:
        """One group for each node whose layer is in the table; Fork and Flatten are views."""
        return [
            Group(
                (node,),
                self,
                forward_view=isinstance(node.layer, Fork | Flatten),
                backward_view=isinstance(node.layer, Flatten),
                splits=isinstance(node.layer, Conv | Dense),
            )
            for node in nodes
            if type(node.layer) in _OPS
        ]

    def room(self, group: Group, rows: int, mode: Mode) -> Room:
        """None: NumPy reserves what it needs when it needs it."""
        return Room()

    def build(self, group: Group, slot: Slot, mode: Mode) -> Op:
        """The op of one of the groups that `groups` made."""
        (node,) = group.nodes
        return _OPS[type(node.layer)](node, slot, mode)
