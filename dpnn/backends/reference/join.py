"""Forks and joins, and what only sees a buffer in another shape."""

from dpnn.backends.base import Mode, Slot
from dpnn.nn.graph import Node


class ViewOp:
    """Flatten: input and output are one buffer, and so are their gradients; there is nothing to do."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        pass

    def forward(self) -> None:
        """Nothing: the group is a view."""

    def backward(self) -> None:
        """Nothing: the group is a view."""


class ForkOp(ViewOp):
    """y is x's buffer; dx = the sum of what the readers give back."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        self.step = slot.step
        if mode == "train" and node.needs_grad:
            self.dys = slot.d_outputs(node)
            self.dx = slot.d_input(node)

    def backward(self) -> None:
        if self.dx is not None:
            dx = self.dx[: self.step.rows]
            dx[...] = self.dys[0][: self.step.rows]
            for dy in self.dys[1:]:
                dx += dy[: self.step.rows]


class JoinOp:
    """What reads several inputs, all of them activations."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        positions = range(len(node.inputs))
        self.step = slot.step
        self.xs = [slot.input(node, i) for i in positions]
        self.y = slot.output(node)
        if mode == "train" and node.needs_grad:
            self.dy = slot.d_output(node)
            self.dxs = [slot.d_input(node, i) for i in positions]


class ConcatOp(JoinOp):
    """y = the inputs one after the other along the channels; each dx is its slice of dy."""

    def forward(self) -> None:
        rows, lo = self.step.rows, 0
        for x in self.xs:
            hi = lo + x.shape[1]
            self.y[:rows, lo:hi] = x[:rows]
            lo = hi

    def backward(self) -> None:
        rows, lo = self.step.rows, 0
        for x, dx in zip(self.xs, self.dxs, strict=True):
            hi = lo + x.shape[1]
            if dx is not None:
                dx[:rows] = self.dy[:rows, lo:hi]
            lo = hi


class AddOp(JoinOp):
    """y = the sum of the inputs; each dx = dy."""

    def forward(self) -> None:
        y = self.y[: self.step.rows]
        y[...] = self.xs[0][: self.step.rows]
        for x in self.xs[1:]:
            y += x[: self.step.rows]

    def backward(self) -> None:
        for dx in self.dxs:
            if dx is not None:
                dx[: self.step.rows] = self.dy[: self.step.rows]
