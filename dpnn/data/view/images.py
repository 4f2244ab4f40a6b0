"""Views of pictures, encoded or raw, in the network's size: a box of each, resized, perhaps mirrored and coloured."""

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dpnn import philox
from dpnn.data.decode import SHRINKS, BadImage, Picture, Room, opencv, resize
from dpnn.data.view.base import BadSample, Normalisation
from dpnn.data.view.colour import Colour

Array = NDArray[Any]

_FIRST = np.zeros(1, np.int64)


class Box(NamedTuple):
    """A rectangle of a picture, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    def shrunk(self, shrink: int) -> "Box":
        """In a picture that was made smaller; its edges where the nearest pixels begin."""
        ends = (self.top, self.left, self.top + self.height, self.left + self.width)
        top, left, bottom, right = ((end + shrink // 2) // shrink for end in ends)
        return Box(top, left, bottom - top, right - left, self.mirrored)


class Boxes(Protocol):
    """Which box of a picture the network sees."""

    coloured: int
    """From where on a choice holds what is done to colours; 0: nothing is."""

    def draw(self, ids: Array, epoch: int) -> Array:
        """What to know of each sample beside its picture's size, (N, any number)."""
        ...

    def box(self, choice: Sequence[float], height: int, width: int) -> Box:
        """Of a picture of so many rows and columns."""
        ...


def _side(height: int, width: int) -> int:
    """The network sees 224 of 256 pixels of the shorter side."""
    return max(round(min(height, width) * 224 / 256), 1)


class CentreBox:
    """The square in the middle whose side is 224/256 of the picture's shorter side."""

    coloured = 0

    def draw(self, ids: Array, epoch: int) -> Array:
        """Nothing."""
        return np.empty((len(ids), 0), np.float32)

    def box(self, choice: Sequence[float], height: int, width: int) -> Box:
        """In the middle."""
        side = _side(height, width)
        return Box((height - side) // 2, (width - side) // 2, side, side, False)


class RandomBox:
    """A square of that size anywhere, and every other picture mirrored."""

    coloured = 0

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def draw(self, ids: Array, epoch: int) -> Array:
        """Where, of 0 to 1 from top and left, and whether to mirror (0.5 or more): float32 (N, 3)."""
        return _uniform(philox.by_sample(self._seed, epoch, "augment", ids, 3))

    def box(self, choice: Sequence[float], height: int, width: int) -> Box:
        """Where it was drawn."""
        top, left, mirrored = choice
        side = _side(height, width)
        return Box(int(top * (height - side + 1)), int(left * (width - side + 1)), side, side, mirrored >= 0.5)


class ResizedBox:
    """A rectangle of 8 % to 100 % of the picture's area and a ratio of sides from 3/4 to 4/3; mirrored; coloured.

    Szegedy et al., "Going deeper with convolutions", 2015, section 6. Ten rectangles are drawn, and the first that fits
    is taken; where none does, the largest in the middle whose ratio is allowed.
    """

    AREA = (0.08, 1.0)
    RATIO = (3 / 4, 4 / 3)
    TRIES = 10
    coloured = 2 * TRIES + 3

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def draw(self, ids: Array, epoch: int) -> Array:
        """Ten times width, then height, of the root of the picture's area; where; whether to mirror; colours."""
        words = philox.by_sample(self._seed, epoch, "augment", ids, 2 * self.TRIES + 3 + Colour.WORDS)
        uniform = _uniform(words[:, : self.coloured])
        (least, most), (low, high) = self.AREA, np.log(self.RATIO)
        area = least + (most - least) * uniform[:, : self.TRIES]
        ratio = np.exp(low + (high - low) * uniform[:, self.TRIES : 2 * self.TRIES])
        sides = np.sqrt(area * ratio), np.sqrt(area / ratio)
        colours = Colour.draw(words[:, self.coloured :])
        return np.concatenate((*sides, uniform[:, 2 * self.TRIES :], colours), axis=1, dtype=np.float32)

    def box(self, choice: Sequence[float], height: int, width: int) -> Box:
        """The first that fits."""
        root = math.sqrt(height * width)
        for i in range(self.TRIES):
            w, h = round(choice[i] * root), round(choice[self.TRIES + i] * root)
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w = min(width, max(round(height * self.RATIO[1]), 1))
            h = min(height, max(round(width / self.RATIO[0]), 1))
            return Box((height - h) // 2, (width - w) // 2, h, w, choice[self.coloured - 1] >= 0.5)
        top, left, mirrored = choice[2 * self.TRIES : self.coloured]
        return Box(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w, mirrored >= 0.5)


class _Scratch(threading.local):
    """A thread's own memory for the picture that it works on."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.room = Room()
        self.resized, self.mirrored = np.empty((2, *shape), np.uint8)


class Images:
    """Pictures in the network's size. The bytes of a record are decoded first."""

    def __init__(self, shape: tuple[int, ...], normalise: Normalisation, boxes: Boxes) -> None:
        self.shape, self._normalise, self._boxes = shape, normalise, boxes
        self._colour = Colour(normalise)
        self._scratch = _Scratch(shape)
        self._flip = opencv().flip

    def draw(self, ids: Array, epoch: int) -> Array:
        """As the boxes say."""
        return self._boxes.draw(ids, epoch)

    def put(self, source: Any, slots: Array, choices: Array, out: Array) -> None:
        """Decode, cut, resize, mirror, colour and normalise, one by one."""
        height, width, _ = self.shape
        coloured, scratch = self._boxes.coloured, self._scratch
        choices = np.ascontiguousarray(choices)
        self._normalise.checked(scratch.resized[None], _FIRST, out)
        for i, slot in enumerate(slots.tolist()):
            try:
                image, box = self._cut(source[slot], choices[i].tolist())
            except BadImage as error:
                raise BadSample(i, str(error)) from error
            resize(image, height, width, scratch.resized)
            image = scratch.resized
            if box.mirrored:
                image = scratch.mirrored
                self._flip(scratch.resized, 1, image)
            if coloured:
                self._colour(image, choices[i, coloured:], out[i])
            else:
                self._normalise.take(image[None], _FIRST, out[i : i + 1])

    def _cut(self, sample: Any, choice: Sequence[float]) -> tuple[Array, Box]:
        """The box of a picture."""
        if isinstance(sample, np.ndarray):
            box = self._boxes.box(choice, *sample.shape[:2])
            image = sample
        else:
            picture = Picture(sample)
            box = self._boxes.box(choice, picture.height, picture.width)
            most = min(box.height // self.shape[0], box.width // self.shape[1])
            shrink = next((shrink for shrink in SHRINKS if shrink <= most), 1)
            image = picture.decode(shrink, self._scratch.room)
            if image.shape[0] < picture.height:
                box = box.shrunk(shrink)
        return image[box.top : box.top + box.height, box.left : box.left + box.width], box


def _uniform(words: Array) -> Array:
    """0 to 1, exclusive: of each word the upper 24 bits, which float32 holds."""
    return (words >> 8).astype(np.float32) * np.float32(2**-24)
