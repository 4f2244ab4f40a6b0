"""The peer of our loader: PyTorch's DataLoader over a folder of images for each class, with torchvision's transforms.

They are written here as torchvision does them, which needn't be installed, once with Pillow, and once with simplejpeg
and OpenCV for what is done to the images.
"""

import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset

Pixels = NDArray[Any]
Box = tuple[int, int, int, int]
"""Left, top, width, height."""

SIZE = 224
STRENGTH = 0.4
"""Of colour jitter."""
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LIGHTING = 0.1
EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)  # fmt: skip


class Folder(Dataset):
    """Images as the network sees them in training, float32 (3, 224, 224), and their classes.

    `colour`: with colour jitter and PCA lighting as well. Transforms follow torchvision's, operation by operation.
    """

    def __init__(self, folder: str, library: Literal["pillow", "simplejpeg"], colour: bool) -> None:
        classes = sorted(path.name for path in Path(folder).iterdir())
        self._files = [
            (str(path), i) for i, name in enumerate(classes) for path in sorted(Path(folder, name).iterdir())
        ]
        self._read = {"pillow": _pillow, "simplejpeg": _opencv}[library]
        self._colour = colour
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        path, label = self._files[number]
        pixels = self._read(path, self._colour)
        x = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        if self._colour:
            shift = EIGENVECTORS @ (torch.randn(3) * LIGHTING * EIGENVALUES)
            x.add_(shift[:, None, None])
        return x.sub_(self._mean).div_(self._std), label


class Peer:
    """A DataLoader with `workers` processes, which live on from epoch to epoch."""

    def __init__(self, folder: str, library: Literal["pillow", "simplejpeg"], colour: bool) -> None:
        torch.set_num_threads(1)
        self._dataset = Folder(folder, library, colour)
        self._loader: DataLoader | None = None

    def open(self, batch: int, workers: int) -> None:
        """Start the processes."""
        self._loader = DataLoader(
            self._dataset, batch, shuffle=True, num_workers=workers, persistent_workers=True, worker_init_fn=_alone
        )
        self.epoch()

    def epoch(self) -> float:
        """The seconds that all batches of an epoch take."""
        begin = perf_counter()
        for _ in self._loader:
            pass
        return perf_counter() - begin


def _alone(worker: int) -> None:
    """Processes share the cores: none has threads of its own (torch sees to its own)."""
    cv2.setNumThreads(0)


def _pillow(path: str, colour: bool) -> Pixels:
    with Image.open(path) as file:
        image = file.convert("RGB")
    left, top, width, height = _box(*image.size)
    image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if _heads():
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if colour:
        enhancers: list[Callable[..., Any]] = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        for which in torch.randperm(3).tolist():
            image = enhancers[which](image).enhance(_uniform(1 - STRENGTH, 1 + STRENGTH))
    return np.array(image)


def _opencv(path: str, colour: bool) -> Pixels:
    image = simplejpeg.decode_jpeg(Path(path).read_bytes())
    left, top, width, height = _box(image.shape[1], image.shape[0])
    image = cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    if _heads():
        image = cv2.flip(image, 1)
    if colour:
        for which in torch.randperm(3).tolist():
            factor = _uniform(1 - STRENGTH, 1 + STRENGTH)
            if which == 0:
                image = _linear(image, factor, 0)
            elif which == 1:
                image = _linear(image, factor, cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] * (1 - factor))
            else:
                grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
                image = cv2.addWeighted(image, factor, grey, 1 - factor, 0)
    return image


def _linear(image: Pixels, factor: float, shift: float) -> Pixels:
    return cv2.LUT(image, np.clip(np.arange(256) * factor + shift, 0, 255).astype(np.uint8))


def _box(width: int, height: int) -> Box:
    """RandomResizedCrop's: 0.08 to 1 of the area, sides from 3:4 to 4:3."""
    for _ in range(10):
        area = width * height * _uniform(0.08, 1)
        ratio = math.exp(_uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(torch.randint(0, most + 1, (1,))) for most in (width - w, height - h))
            return left, top, w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def _heads() -> bool:
    return bool(torch.rand(1) < 0.5)


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(1).uniform_(low, high))
