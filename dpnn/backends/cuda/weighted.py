"""What convolutions and dense layers share: parameters, scratch, backward. A dense layer's images have one pixel."""

from abc import abstractmethod
from typing import TypeVar

from dpnn.backends.base import Array, Group, Mode, Room, Slot
from dpnn.backends.cuda.bias import BiasGradient
from dpnn.backends.cuda.device import Device
from dpnn.backends.cuda.geometry import Shape, backward_walks, quads
from dpnn.backends.cuda.narrow import NarrowGradient, patch_of
from dpnn.backends.cuda.op import KernelOp
from dpnn.backends.cuda.operands import Operands, backward_order
from dpnn.backends.cuda.product import FilterGradient, Gather, Matrix
from dpnn.backends.cuda.scratch import carve, scratch_bytes
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense

W = TypeVar("W", Conv, Dense)


class WeightedOp(KernelOp[W]):
    """Backward: dy behind the ReLU with d_bias, then dw, then dx by a product for each residue of a stride."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.shape = Shape.of(self.node)
        self.patch = patch_of(self.shape)
        roles = {param.role for param in self.node.params}
        self.w = slot.param(self.node, "weight")
        self.bias = slot.param(self.node, "bias") if "bias" in roles else None
        self.operands = Operands(device)
        forward = slot.room(group)[1]
        self.scratch = carve(forward, self.forward_sizes(self.shape, len(self.x), device.processors))

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        super().bind_gradients(group, slot)
        shape, device = Shape.of(self.node), self.device
        patch = patch_of(shape)
        backward = slot.room(group)[2]
        self.backward_scratch = carve(backward, backward_sizes(shape, len(self.x), device.processors))
        self.bias_gradient = BiasGradient(device, shape.groups * shape.k)
        self.narrow_gradient = NarrowGradient(device, patch) if patch else None
        self.filter_gradient = FilterGradient(device, shape)
        self.gathers = [(Gather(device, walk), target, first) for walk, target, first in backward_walks(shape)]

    @classmethod
    def room(cls, group: Group, rows: int, mode: Mode, device: Device) -> Room:
        shape = Shape.of(group.nodes[0])
        forward = scratch_bytes(cls.forward_sizes(shape, rows, device.processors))
        if mode == "eval" or not group.nodes[-1].needs_grad:
            return Room(forward=forward)
        return Room(forward=forward, backward=scratch_bytes(backward_sizes(shape, rows, device.processors)))

    @staticmethod
    @abstractmethod
    def forward_sizes(shape: Shape, rows: int, processors: int) -> dict[str, int]:
        """Numbers of scratch of forward, by name."""

    def run_backward(self, rows: int) -> None:
        shape, scratch, dy = self.shape, self.backward_scratch, self.dy
        outputs = rows * shape.p * shape.q
        if self.relu or self.bias is not None:
            y = self.y if self.relu else None
            self.bias_gradient(outputs, y, dy, scratch["sums"], self.d_params.get("bias"), self.add)
        dy = self.operands.padded(dy, outputs * shape.groups, shape.k, scratch["dy"])
        self.weight_gradient(rows, dy)
        if self.dx is not None:
            for gather, target, first in self.gathers:
                matrix = self._turned(gather.walk.taps, first)
                gather(rows, dy, matrix, scratch["partial"], self.dx, target)

    def weight_gradient(self, rows: int, dy: Array) -> None:
        """Of the filters, or weights. `dy`: with its channels rounded up to quads."""
        shape, scratch, dw = self.shape, self.backward_scratch, self.d_params["weight"]
        if self.narrow_gradient:
            self.narrow_gradient(rows, self.x, dy, scratch["partial"], dw, self.add)
            return
        x = self.operands.padded(self.x, rows * shape.h * shape.w * shape.groups, shape.c, scratch["x"])
        self.filter_gradient(rows, x, dy, scratch["partial"], dw, self.add)

    def _turned(self, taps: tuple[int, int], first: tuple[int, int]) -> Matrix:
        """The filters as (taps, K) x C: a filter of one tap lies like that in memory."""
        if _turns(self.shape):
            return self.operands.matrix(
                self.w, backward_order(self.shape, taps, first), self.backward_scratch["filters"]
            )
        return Matrix(self.w, self.shape.c, self.shape.k, self.shape.c)


def backward_sizes(shape: Shape, rows: int, processors: int) -> dict[str, int]:
    """Numbers of scratch of backward, by name."""
    patch = patch_of(shape)
    narrow = NarrowGradient.scratch(patch, rows, processors) if patch else 0
    partial = [narrow or FilterGradient.scratch(shape, rows, processors)]
    filters = [0]
    for walk, _, first in backward_walks(shape):
        partial.append(Gather.scratch(walk, shape.c, rows, processors))
        filters.append(backward_order(shape, walk.taps, first).size)
    return {
        "x": 0 if patch else padded_size(rows * shape.h * shape.w * shape.groups, shape.c),
        "dy": padded_size(rows * shape.p * shape.q * shape.groups, shape.k),
        "filters": max(filters) if _turns(shape) else 0,
        "partial": max(partial),
        "sums": BiasGradient.scratch(shape.groups * shape.k, processors),
    }


def _turns(shape: Shape) -> bool:
    """Whether filters must be copied for dx."""
    return shape.taps > 1 or shape.c % 4 != 0


def padded_size(pixels: int, c: int) -> int:
    """Numbers of a copy whose channels are rounded up to quads; 0 where none is needed."""
    return pixels * quads(c) if c % 4 else 0
