"""GPU ranks: our own CUDA kernels (kernels/*.cu), images channels-last; float32.

Every layer is computed here, since no other backend reads a device's memory. Ops are written against `Device`, which
has two forms: a GPU by CuPy (`gpu.py`), and the tests' stand-in, which runs the same kernels on NumPy arrays.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpnn.backends.base import Group, Mode, Op, Room, Slot
from dpnn.backends.cuda import conv, dense, join, loss, lrn, norm, pointwise, pool
from dpnn.backends.cuda.device import Device
from dpnn.backends.cuda.flat import Flat
from dpnn.backends.cuda.groups import groups_of
from dpnn.backends.cuda.memory import DeviceMemory, Wait, without_limit
from dpnn.backends.cuda.op import KernelOp
from dpnn.memory import Memory
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

_OPS: dict[type[Layer], type[KernelOp[Any]]] = {
    Add: join.AddOp,
    AvgPool: pool.AvgPoolOp,
    BatchNorm: norm.BatchNormOp,
    BatchNormalize: norm.BatchNormalizeOp,
    BatchSums: norm.BatchSumsOp,
    Concat: join.ConcatOp,
    Dropout: pointwise.DropoutOp,
    Flatten: join.FlattenOp,
    Fork: join.ForkOp,
    GlobalAvgPool: pool.GlobalAvgPoolOp,
    LocalResponseNorm: lrn.LocalResponseNormOp,
    MaxPool: pool.MaxPoolOp,
    Conv: conv.ConvOp,
    Dense: dense.DenseOp,
    ReLU: pointwise.ReLUOp,
    SigmoidCrossEntropy: loss.SigmoidCrossEntropyOp,
    SoftmaxCrossEntropy: loss.SoftmaxCrossEntropyOp,
}


def device_of_rank(local_rank: int) -> Device:
    """The GPU of a rank, by its number on the node: ranks take those that they see in turn.

    Unavailable, with the reason, where there is none.
    """
    from dpnn.backends.cuda.gpu import opened, visible

    return opened(local_rank % visible())


class Cuda:
    """Computes in float32 on a device."""

    name = "cuda"
    dtype = np.dtype(np.float32)
    channels_last = True

    def __init__(self, device: Device, kernels: Kernels | None = None, wait: Wait = without_limit) -> None:
        """`kernels`: our CPU kernels, for sums over the host's memory. `wait`: for the device, until a test is true."""
        self.device, self.kernels = device, kernels
        self.memory: Memory = DeviceMemory(device, wait)
        self.arithmetic = Flat(device, self.memory)
        self.about, self.unkept = device.about, device.unkept
        self.choices: dict[str, str] = {}

    def groups(self, nodes: Sequence[Node], mode: Mode) -> list[Group]:
        """A layer, and the ReLU behind it."""
        return groups_of(nodes, _OPS, self)

    def room(self, group: Group, rows: int, mode: Mode) -> Room:
        """What the group's op asks for."""
        return _OPS[type(group.nodes[0].layer)].room(group, rows, mode, self.device)

    def build(self, group: Group, slot: Slot, mode: Mode) -> Op:
        """The op of a group: its first layer says which."""
        return _OPS[type(group.nodes[0].layer)](group, slot, mode, self.device)
