"""What all ops here are made of: a group of nodes in one line, bound to the buffers of one slot, and kernels."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar, cast

from dpnn.backends.base import Array, Group, Mode, Room, Slot
from dpnn.backends.cuda.device import Device
from dpnn.nn.layer import Layer
from dpnn.nn.pointwise import ReLU

L = TypeVar("L", bound=Layer)


class KernelOp(ABC, Generic[L]):
    """The first node's layer, and a ReLU behind it where the group has two nodes.

    `x` is read, `y` written; backward reads `dy` and writes `dx`. All are whole buffers: an op works on their first
    rows, and isn't asked to where there are none.
    """

    dy: Array
    """Bound only where the op has a backward and a reader gives it a gradient; backward may write over it."""
    dx: Array | None = None
    """None where nobody wants the gradient."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        self.node, last = group.nodes[0], group.nodes[-1]
        self.layer = cast(L, self.node.layer)
        self.relu = isinstance(last.layer, ReLU) and last is not self.node
        self.device, self.step = device, slot.step
        self.trains = mode == "train" and last.needs_grad
        self.x, self.y = slot.input(self.node), slot.output(last)
        self.d_params: dict[str, Array] = {}
        if self.trains:
            self.d_params = {param.role: slot.d_param(self.node, param.role) for param in self.node.params}
            self.bind_gradients(group, slot)

    @classmethod
    def room(cls, group: Group, rows: int, mode: Mode, device: Device) -> Room:
        """What the op wants beside its arrays."""
        return Room()

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        """Bind what backward reads and writes; called only where there will be a backward."""
        self.dy = slot.d_output(group.nodes[-1])
        self.dx = slot.d_input(self.node)

    def forward(self) -> None:
        if self.step.rows:
            self.run_forward(self.step.rows)
        else:
            self.nothing_forward()

    def backward(self) -> None:
        if self.step.rows:
            self.run_backward(self.step.rows)
        else:
            self.nothing_backward()

    @abstractmethod
    def run_forward(self, rows: int) -> None:
        """y from x, for `rows` rows, at least one."""

    @abstractmethod
    def run_backward(self, rows: int) -> None:
        """dx and the gradients of parameters from dy, likewise."""

    def nothing_forward(self) -> None:
        """What forward writes without rows: gradients of statistics."""
        self._zero(statistics=True)

    def nothing_backward(self) -> None:
        """What backward writes without rows: gradients of parameters."""
        self._zero(statistics=False)

    def _zero(self, statistics: bool) -> None:
        for param in self.node.params if self.trains and self.step.first else ():
            if (param.spec.statistic != 0) == statistics:
                self.device.zero(self.d_params[param.role])

    @property
    def add(self) -> int:
        """Whether kernels add to gradients of parameters (1), or assign them (0)."""
        return int(not self.step.first)
