"""The fully connected layer, with its bias and the ReLU behind it."""

from dpnn.backends.base import Group, Mode, Slot
from dpnn.backends.cuda.device import Device
from dpnn.backends.cuda.geometry import Shape, forward_walk, quads
from dpnn.backends.cuda.operands import Order
from dpnn.backends.cuda.product import Gather
from dpnn.backends.cuda.weighted import WeightedOp, padded_size
from dpnn.nn.dense import Dense


class DenseOp(WeightedOp[Dense]):
    """Forward is y^T = weight x^T: the weights, of which there are most, are read once, as they lie.

    Units take the place of images, and samples that of filters.
    """

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.gather = Gather(device, forward_walk(self.shape))
        self._add = device.kernel("conv_layout.cu", "add_parts_turned")

    @staticmethod
    def forward_sizes(shape: Shape, rows: int, processors: int) -> dict[str, int]:
        return {
            "weight": padded_size(shape.k, shape.c),
            "x": _turned(shape, rows).size,
            "partial": Gather.scratch(forward_walk(shape), rows, shape.k, processors, whole=True),
        }

    def run_forward(self, rows: int) -> None:
        shape, scratch = self.shape, self.scratch
        weight = self.operands.padded(self.w, shape.k, shape.c, scratch["weight"])
        x = self.operands.matrix(self.x, _turned(shape, rows), scratch["x"])
        parts = self.gather.multiply(shape.k, weight, x, scratch["partial"], None)
        grid = (-(-shape.k // 32), -(-rows // 32))
        self._add(grid, (256,), scratch["partial"], parts, shape.k, rows, self.bias, int(self.relu), self.y)


def _turned(shape: Shape, rows: int) -> Order:
    """x (rows, C) as (C, rows)."""
    return Order(1, rows, shape.c, quads(shape.c), 0, shape.c, 1)
