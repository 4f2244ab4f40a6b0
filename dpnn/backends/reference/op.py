"""What all ops of this backend are made of: one node, bound to the buffers of one slot."""

from typing import Generic, TypeVar, cast

from dpnn.backends.base import Array, Mode, Slot
from dpnn.nn.graph import Node
from dpnn.nn.layer import Layer

L = TypeVar("L", bound=Layer)


class LayerOp(Generic[L]):
    """A node that reads `x` and writes `y`; backward reads `dy` and writes `dx`.

    All are whole buffers: an op works on their first `self.step.rows` rows.
    """

    dy: Array
    """Bound only where the op has a backward and a reader gives it a gradient."""
    dx: Array | None = None
    """None where nobody wants the gradient."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        self.layer = cast(L, node.layer)
        self.step = slot.step
        self.trains = mode == "train" and node.needs_grad
        self.x = slot.input(node)
        self.y = slot.output(node)
        if self.trains:
            self.bind_gradients(node, slot)

    def bind_gradients(self, node: Node, slot: Slot) -> None:
        """Bind what backward reads and writes; called only where there will be a backward."""
        self.dy = slot.d_output(node)
        self.dx = slot.d_input(node)
