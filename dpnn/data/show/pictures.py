"""A picture of any sample as the network sees it."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LEAST = 96
"""Pixels of a picture's longer side: smaller images are enlarged by whole numbers, so that pixels stay squares."""
_MOST_HEAT = 256
_PLOT = (96, 192)
_DIM = 64
"""Pixels of 0 to at most this are shown as if from black to white: they aren't of 256 levels."""
_HEAT = np.array([[33, 59, 142], [245, 245, 245], [160, 22, 40]], np.float64)


def levels(samples: Array, dtype: str) -> tuple[float, float]:
    """Which numbers are shown as black and as white. `samples`: as stored, any number of them."""
    low, high = float(samples.min()), float(samples.max())
    if dtype == "uint8" and high > _DIM:
        return 0.0, 255.0
    return (low, high) if high > low else (low, low + 1)


def picture(sample: Array, low: float, high: float) -> Array:
    """uint8 (height, width, 3) of a sample (H, W, C), (T, 1, C), (n,) or any other shape, by `levels`.

    Colours and grey images as they are; planes as grey tiles; vectors as a plot; all else as a map of heat, by rows of
    the first dimension.
    """
    x = np.clip((sample - low) / (high - low), 0, 1)
    if x.ndim == 1:
        return _plot(x)
    if x.ndim != 3 or x.shape[1] == 1:
        return _fitted(_heat(x.reshape(len(x), -1)))
    if x.shape[2] in (1, 3):
        return _fitted(np.repeat(_bytes(x), 3 // x.shape[2], axis=2))
    return _fitted(np.repeat(_tiles(_bytes(x))[..., None], 3, axis=2))


def _bytes(x: Array) -> Array:
    return np.round(255 * x).astype(np.uint8)


def _tiles(planes: Array) -> Array:
    """(H, W, C) side by side in rows, with a line between."""
    height, width, n = planes.shape
    columns = math.ceil(math.sqrt(n))
    out = np.full((math.ceil(n / columns) * (height + 1) - 1, columns * (width + 1) - 1), 128, np.uint8)
    for i in range(n):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        out[top : top + height, left : left + width] = planes[..., i]
    return out


def _heat(x: Array) -> Array:
    """Of numbers from 0 to 1 (rows, columns): blue, white, red. At most _MOST_HEAT of each, averaged."""
    for axis in (0, 1):
        cuts = np.linspace(0, x.shape[axis], min(x.shape[axis], _MOST_HEAT) + 1).astype(int)
        counts = np.diff(cuts)
        x = np.add.reduceat(x, cuts[:-1], axis) / (counts[:, None] if axis == 0 else counts)
    return np.stack([np.interp(x, [0, 0.5, 1], _HEAT[:, colour]) for colour in range(3)], axis=-1).astype(np.uint8)


def _plot(x: Array) -> Array:
    """A curve: from the least to the most of the numbers in each column."""
    height, width = _PLOT
    out = np.full((height, width, 3), 255, np.uint8)
    cuts = np.linspace(0, len(x), width + 1).astype(int)
    row = np.round((1 - x) * (height - 1)).astype(int)
    for column in range(width):
        some = row[cuts[column] : max(cuts[column + 1], cuts[column] + 1)]
        out[some.min() : some.max() + 1, column] = (33, 59, 142)
    return out


def _fitted(image: Array) -> Array:
    """Enlarged by a whole number, where it is small."""
    times = -(-_LEAST // max(image.shape[:2]))
    return image.repeat(times, axis=0).repeat(times, axis=1)
