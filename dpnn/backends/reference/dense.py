"""The fully connected layer: y = x weight^T + bias, with x (N, C), weight (K, C), y (N, K)."""

import numpy as np

from dpnn.backends.base import Mode, Slot, put
from dpnn.backends.reference.op import LayerOp
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Node


class DenseOp(LayerOp[Dense]):
    """One matrix product forward, two backward."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        super().__init__(node, slot, mode)
        self.w = slot.param(node, "weight")
        if self.layer.bias:
            self.bias = slot.param(node, "bias")

    def bind_gradients(self, node: Node, slot: Slot) -> None:
        super().bind_gradients(node, slot)
        self.dw = slot.d_param(node, "weight")
        if self.layer.bias:
            self.d_bias = slot.d_param(node, "bias")

    def forward(self) -> None:
        y = self.y[: self.step.rows]
        np.matmul(self.x[: self.step.rows], self.w.T, out=y)
        if self.layer.bias:
            y += self.bias

    def backward(self) -> None:
        dy = self.dy[: self.step.rows]
        if self.layer.bias:
            put(self.d_bias, dy.sum(axis=0), self.step)
        if self.dx is not None:
            np.matmul(dy, self.w, out=self.dx[: self.step.rows])

    def weights(self) -> None:
        """The gradient of the weights."""
        put(self.dw, self.dy[: self.step.rows].T @ self.x[: self.step.rows], self.step)
