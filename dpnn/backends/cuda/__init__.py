"""GPU ranks: our own CUDA kernels (kernels/*.cu), images channels-last; float32.

Every layer is computed here, since no other backend reads a device's memory. Ops are written against `Device`, which
has two forms: a GPU by CuPy (`gpu.py`), and the tests' stand-in, which runs the same kernels on NumPy arrays.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpnn.backends.base import Group, Mode, Op, Room, Slot
from dpnn.backends.cuda import conv, dense, pointwise
from dpnn.backends.cuda.device import Device
from dpnn.backends.cuda.groups import groups_of
from dpnn.backends.cuda.op import KernelOp
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Node
from dpnn.nn.layer import Layer
from dpnn.nn.pointwise import ReLU

_OPS: dict[type[Layer], type[KernelOp[Any]]] = {
    Conv: conv.ConvOp,
    Dense: dense.DenseOp,
    ReLU: pointwise.ReLUOp,
}


class Cuda:
    """Computes in float32 on a device."""

    name = "cuda"
    dtype = np.dtype(np.float32)
    channels_last = True

    def __init__(self, device: Device) -> None:
        self.device = device
        self.about = device.about
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
