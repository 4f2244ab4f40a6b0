"""Pooling: one number for each window of each channel."""

from dataclasses import dataclass

from dpnn.nn.layer import Layer, Shape, pair
from dpnn.nn.window import Size, slide


@dataclass(frozen=True)
class Pool(Layer):
    """The base of pooling over windows: (C, H, W) -> (C, P, Q).

    `stride` None is `size`. `padding` is at most half the window. `ceil` as PyTorch's ceil_mode: a last window may hang
    over the end if it starts inside the image or the padding before it.
    """

    size: Size
    stride: Size | None = None
    padding: Size = 0
    ceil: bool = False

    @property
    def step(self) -> tuple[int, int]:
        """(rows, columns) from one window to the next."""
        return pair(self.size if self.stride is None else self.stride)

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 1 or len(shapes[0]) != 3:
            raise self._misfit(shapes, "an image (C, H, W)")
        if any(2 * pad > size for pad, size in zip(pair(self.padding), pair(self.size), strict=True)):
            raise self._error(f"padding = {self.padding} is more than half of size = {self.size}; use less")
        return (shapes[0][0], *slide(self._who, shapes[0], self.size, self.step, self.padding, self.ceil))


@dataclass(frozen=True)
class MaxPool(Pool):
    """The largest number of each window; the gradient goes to the first one where several are equal."""


@dataclass(frozen=True)
class AvgPool(Pool):
    """The mean of each window, padding counted as zeros, what hangs over beyond it not counted."""


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """The mean of each channel: (C, H, W) -> (C,) (Lin et al. 2013)."""

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 1 or len(shapes[0]) != 3:
            raise self._misfit(shapes, "an image (C, H, W)")
        return shapes[0][:1]
