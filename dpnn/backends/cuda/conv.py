"""Convolution, with its bias and the ReLU behind it."""

from dpnn.backends.base import Group, Mode, Slot
from dpnn.backends.cuda.device import Device
from dpnn.backends.cuda.geometry import Shape, Target, forward_walk
from dpnn.backends.cuda.narrow import NarrowForward, patch_of
from dpnn.backends.cuda.operands import forward_order
from dpnn.backends.cuda.product import Gather
from dpnn.backends.cuda.weighted import WeightedOp, padded_size
from dpnn.nn.conv import Conv


class ConvOp(WeightedOp[Conv]):
    """Forward: the filters are brought into the order (R, S, C, K), and images gathered while they are multiplied.

    With few channels it has a kernel of its own.
    """

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.narrow = NarrowForward(device, self.patch) if self.patch else None
        self.gather = Gather(device, forward_walk(self.shape))
        self.target = Target(self.shape.groups * self.shape.k, self.shape.k)
        self.order = forward_order(self.shape)

    @staticmethod
    def forward_sizes(shape: Shape, rows: int, processors: int) -> dict[str, int]:
        if patch_of(shape):
            return {}
        return {
            "x": padded_size(rows * shape.h * shape.w * shape.groups, shape.c),
            "filters": forward_order(shape).size,
            "partial": Gather.scratch(forward_walk(shape), shape.k, rows, processors),
        }

    def run_forward(self, rows: int) -> None:
        if self.narrow:
            self.narrow(rows, self.x, self.w, self.bias, self.relu, self.y)
            return
        shape, scratch = self.shape, self.scratch
        x = self.operands.padded(self.x, rows * shape.h * shape.w * shape.groups, shape.c, scratch["x"])
        filters = self.operands.matrix(self.w, self.order, scratch["filters"])
        self.gather(rows, x, filters, scratch["partial"], self.y, self.target, self.bias, self.relu)
