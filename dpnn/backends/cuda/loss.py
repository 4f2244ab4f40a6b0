"""Losses: kernels/loss.cu. The mean over the step's samples, of which each micro-batch gives its rows' part."""

from typing import ClassVar, TypeVar

import numpy as np

from dpnn.backends.base import Group, Mode, Room, Slot
from dpnn.backends.cuda.device import Device
from dpnn.backends.cuda.op import KernelOp
from dpnn.nn.loss import SigmoidCrossEntropy, SoftmaxCrossEntropy

S = TypeVar("S", SoftmaxCrossEntropy, SigmoidCrossEntropy)
MANY_CLASSES = 128
"""From here on a row is worth a large block."""


class LossOp(KernelOp[S]):
    """Scores x (N, K) and labels -> y () float64; backward starts here, so there is no dy."""

    kernel: ClassVar[str]
    """The first part of its kernels' names."""
    options: tuple[object, ...] = ()
    """What its kernels take beside scores, labels and the number of classes."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.labels = slot.input(self.node, 1)
        (self.classes,) = self.node.input_shapes[0]
        self.losses = slot.room(group)[1]
        """The rows' losses, float64."""
        self.threads = 32 if self.classes < MANY_CLASSES else 256
        self._rows = device.kernel("loss.cu", f"{self.kernel}_{self.threads}")
        self._sum = device.kernel("loss.cu", "sum_losses")
        self._backward = device.kernel("loss.cu", f"{self.kernel}_gradient_{self.threads}")

    @classmethod
    def room(cls, group: Group, rows: int, mode: Mode, device: Device) -> Room:
        return Room(forward=8 * rows)

    def bind_gradients(self, group: Group, slot: Slot) -> None:
        self.dx = slot.d_input(self.node)

    def run_forward(self, rows: int) -> None:
        self._rows((rows,), (self.threads,), self.x, self.labels, self.classes, *self.options, self.losses)
        self._sum((1,), (256,), self.losses, rows, np.float64(self._scale()), self.y)

    def run_backward(self, rows: int) -> None:
        if self.dx is not None:
            grid = (rows, -(-self.classes // (4 * self.threads)))
            arguments = (self.x, self.labels, self.classes, *self.options, self._scale(), self.dx)
            self._backward(grid, (self.threads,), *arguments)

    def nothing_forward(self) -> None:
        self.device.zero(self.y)

    def _scale(self) -> float:
        return float(self.layer.weight / max(self.step.total, 1))


class SoftmaxCrossEntropyOp(LossOp[SoftmaxCrossEntropy]):
    """Each row's largest score and the sum of its exponentials are kept for backward: two float32."""

    kernel = "softmax"

    def __init__(self, group: Group, slot: Slot, mode: Mode, device: Device) -> None:
        super().__init__(group, slot, mode, device)
        self.options = (np.float64(self.layer.smoothing), slot.room(group)[0] if self.trains else None)

    @classmethod
    def room(cls, group: Group, rows: int, mode: Mode, device: Device) -> Room:
        trains = mode == "train" and group.nodes[-1].needs_grad
        return Room(kept=8 * rows if trains else 0, forward=8 * rows)


class SigmoidCrossEntropyOp(LossOp[SigmoidCrossEntropy]):
    """Nothing is kept."""

    kernel = "sigmoid"
