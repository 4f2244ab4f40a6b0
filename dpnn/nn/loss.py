"""Losses: inputs (scores, labels), output one number, this rank's part of the mean over the whole step's samples.

The sum over the micro-batch's rows is divided by the samples of the step on all ranks and in all micro-batches
(`Step.total`), so that losses and gradients are put together by plain sums.
"""

from dataclasses import dataclass
from typing import ClassVar

from dpnn.nn.layer import Layer, Shape


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Layer):
    """weight * -log softmax(scores)[label]: one class a sample. Scores (K,), labels int32 ().

    With `smoothing` = s the label's share is 1 - s, and s is spread evenly over all K classes (Szegedy et al. 2015,
    section 7; PyTorch's label_smoothing).
    """

    weight: float = 1.0
    smoothing: float = 0.0

    batched: ClassVar[bool] = False
    dtype: ClassVar[str] = "float64"

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 2 or len(shapes[0]) != 1 or shapes[1] != ():
            raise self._misfit(shapes, "scores (K,) and one label a sample; for several labels use loss = sigmoid")
        if not 0 <= self.smoothing < 1:
            raise self._error(f"smoothing = {self.smoothing}; use 0 or more, less than 1")
        return ()


@dataclass(frozen=True)
class SigmoidCrossEntropy(Layer):
    """weight * the sum over classes of -log p where the label is 1, -log(1 - p) where it is 0, with p = sigmoid(score).

    K independent classes: scores (K,), labels uint8 (K,).
    """

    weight: float = 1.0

    batched: ClassVar[bool] = False
    dtype: ClassVar[str] = "float64"

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 2 or len(shapes[0]) != 1 or shapes[0] != shapes[1]:
            raise self._misfit(shapes, "scores (K,) and labels (K,); for one label a sample use loss = softmax")
        return ()
