"""Views: how a stored sample becomes what the network sees. `base.py` says what a view is."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dpnn.data.manifest import Content
from dpnn.data.view.base import BadSample, Normalisation, Records, View
from dpnn.data.view.frames import Frames
from dpnn.data.view.images import CentreBox, Images, RandomBox, ResizedBox
from dpnn.data.view.raw import CropFlip, Stored
from dpnn.errors import DataError, JobError

__all__ = ["AUGMENTATIONS", "BadSample", "Records", "View", "network_shape", "view_of"]

Augmentation = Literal["none", "crop-flip", "imagenet"]
AUGMENTATIONS: tuple[Augmentation, ...] = ("none", "crop-flip", "imagenet")

_SIZE, _FRAMES = 224, 128


def network_shape(content: Content, size: int = 0, frames: int = 0) -> tuple[int, ...]:
    """Of one sample as the loader gives it: (C, H, W) for images, (C, T, 1) for frames, any other shape as stored.

    `size`: of the network's images (0: 224, or as stored where they are raw); `frames`: of a sample (0: 128). JobError
    where these can't be.
    """
    shape = memory_shape(content, size, frames)
    return (shape[2], *shape[:2]) if len(shape) == 3 else shape


def memory_shape(content: Content, size: int = 0, frames: int = 0) -> tuple[int, ...]:
    """Of one sample as it lies in memory: (H, W, C) for images, (T, 1, C) for frames, any other shape as stored."""
    what = content.codec or ("image" if len(content.shape) == 3 else "array")
    if size and what != "image":
        raise JobError(f"data.size = {size} is for images, and the samples are {_described(content)}; leave it out")
    if frames and what != "frames":
        raise JobError(f"data.frames = {frames} is for frames, and the samples are {_described(content)}; leave it out")
    if content.codec == "image":
        return (size or _SIZE, size or _SIZE, 3)
    if content.codec == "frames":
        if len(content.shape) != 1:
            raise DataError(f"frames of shape {content.shape} can't be read, only (C,); pack them flat")
        return (frames or _FRAMES, 1, *content.shape)
    if content.codec:
        raise DataError(f"samples encoded as {content.codec!r} are unknown to this dpnn; pack the data again")
    if not size or content.shape[:2] == (size, size):
        return content.shape
    if size > min(content.shape[:2]):
        raise JobError(f"data.size = {size} is more than the samples have, {_described(content)}; use a smaller one")
    if content.dtype != "uint8" or content.shape[2] > 4:
        raise JobError(
            f"data.size = {size} is for images of uint8 and up to 4 channels, and the samples are "
            f"{_described(content)}; leave it out"
        )
    return (size, size, content.shape[2])


def view_of(
    content: Content,
    *,
    augment: str = "none",
    size: int = 0,
    frames: int = 0,
    seed: int = 0,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: Any = np.float32,
    training: bool = True,
) -> View:
    """The view of a folder's samples: what training sees, or evaluation (`training=False`: nothing is drawn).

    `mean` and `std`: one number for each channel, the last dimension. `dtype`: of the result, float32 or float64.
    JobError for what a job can't ask of such samples, DataError where mean and std don't fit them.
    """
    shape = memory_shape(content, size, frames)
    if augment not in AUGMENTATIONS:
        raise JobError(f"data.augment = {augment!r} is none of {', '.join(AUGMENTATIONS)}")
    if augment != "none" and (content.codec == "frames" or len(shape) != 3):
        raise JobError(
            f'data.augment = "{augment}" needs images (H, W, C), and the samples are {_described(content)}; use "none"'
        )
    if augment == "imagenet" and not (shape[2] == 3 and content.dtype == "uint8"):
        raise JobError(
            f'data.augment = "imagenet" needs images of uint8 in red, green and blue, and the samples are '
            f'{_described(content)}; use "crop-flip" or "none"'
        )
    normalise = Normalisation(mean, std, shape, dtype)
    if content.codec == "frames":
        return Frames(shape, normalise, seed, training)
    if augment == "imagenet" and training:
        return Images(shape, normalise, ResizedBox(seed))
    if shape != content.shape:
        return Images(shape, normalise, RandomBox(seed) if augment == "crop-flip" and training else CentreBox())
    return CropFlip(shape, normalise, seed) if augment == "crop-flip" and training else Stored(shape, normalise)


def _described(content: Content) -> str:
    if content.codec:
        return f"encoded as {content.codec!r}"
    return f"{content.dtype} of shape {content.shape}"
