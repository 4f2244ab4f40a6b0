"""Losses, in float64: the mean over the step's samples, of which each micro-batch gives its rows' part."""

from abc import ABC, abstractmethod
from typing import TypeVar

import numpy as np

from dpnn.backends.base import Array, Mode, Slot
from dpnn.backends.reference.op import LayerOp
from dpnn.nn.graph import Node
from dpnn.nn.loss import SigmoidCrossEntropy, SoftmaxCrossEntropy

S = TypeVar("S", SoftmaxCrossEntropy, SigmoidCrossEntropy)


class LossOp(LayerOp[S], ABC):
    """Scores x (N, K) and labels -> y (); backward starts here, so there is no dy."""

    def __init__(self, node: Node, slot: Slot, mode: Mode) -> None:
        super().__init__(node, slot, mode)
        self.labels = slot.input(node, 1)

    def bind_gradients(self, node: Node, slot: Slot) -> None:
        self.dx = slot.d_input(node)

    def forward(self) -> None:
        self.y[...] = self.losses(*self._read()).sum() * self._scale()

    def backward(self) -> None:
        if self.dx is not None:
            self.dx[: self.step.rows] = self.gradient(*self._read()) * self._scale()

    @abstractmethod
    def losses(self, scores: Array, labels: Array) -> Array:
        """Numbers whose sum is the loss."""

    @abstractmethod
    def gradient(self, scores: Array, labels: Array) -> Array:
        """The derivative of that sum by the scores, (rows, K)."""

    def _read(self) -> tuple[Array, Array]:
        return self.x[: self.step.rows].astype(np.float64), self.labels[: self.step.rows]

    def _scale(self) -> float:
        return self.layer.weight / max(self.step.total, 1)


class SoftmaxCrossEntropyOp(LossOp[SoftmaxCrossEntropy]):
    """-sum over k of target[k] log softmax(x)[k]; its derivative is softmax(x) - target."""

    def losses(self, scores: Array, labels: Array) -> Array:
        return -self._target(scores, labels) * _log_softmax(scores)

    def gradient(self, scores: Array, labels: Array) -> Array:
        return np.exp(_log_softmax(scores)) - self._target(scores, labels)

    def _target(self, scores: Array, labels: Array) -> Array:
        """1 - smoothing for the label, and smoothing spread over all classes: (rows, K)."""
        smoothing = self.layer.smoothing
        target = np.full_like(scores, smoothing / scores.shape[1])
        target[np.arange(len(labels)), labels] += 1 - smoothing
        return target


class SigmoidCrossEntropyOp(LossOp[SigmoidCrossEntropy]):
    """With labels t: max(x, 0) - x t + log(1 + exp(-|x|)), which is -log sigmoid(x) for t = 1 and never overflows."""

    def losses(self, scores: Array, labels: Array) -> Array:
        losses: Array = np.maximum(scores, 0) - scores * labels + np.log1p(np.exp(-np.abs(scores)))
        return losses

    def gradient(self, scores: Array, labels: Array) -> Array:
        small = np.exp(-np.abs(scores))
        sigmoid: Array = np.where(scores >= 0, 1, small) / (1 + small)
        return sigmoid - labels


def _log_softmax(scores: Array) -> Array:
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
