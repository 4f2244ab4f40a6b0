"""Images like photos, to pack and to decode: ../shared/data/photos where they lie there, else noise that is as large
as they are when it is compressed."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Image = NDArray[np.uint8]

HEIGHT, WIDTH = 375, 500
"""ImageNet's most frequent size."""
QUALITY = 90
CLASSES = 10
PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos" / "train"

_NOISE, _CONTRAST = 1024, 45.0


def photos(n: int) -> Iterator[Image]:
    """`n` images of (375, 500, 3), RGB; smaller photos are continued by their mirror images, and none is enlarged."""
    files = sorted(PHOTOS.glob("*/*.jpg"))
    for i in range(n):
        image = simplejpeg.decode_jpeg(files[i % len(files)].read_bytes()) if files else _noise(i)
        rows, columns = (max(most - had, 0) for most, had in zip((HEIGHT, WIDTH), image.shape, strict=False))
        yield np.pad(image, ((0, rows), (0, columns), (0, 0)), "symmetric")[:HEIGHT, :WIDTH]


def write_jpegs(folder: Path, n: int) -> list[bytes]:
    """A folder for each class with JPEGs in it; what all files hold."""
    for number in range(CLASSES):
        (folder / f"class{number}").mkdir(parents=True)
    records = []
    for i, image in enumerate(photos(n)):
        image = np.ascontiguousarray(image)
        records.append(simplejpeg.encode_jpeg(image, QUALITY, colorsubsampling="420"))
        (folder / f"class{i % CLASSES}" / f"{i:06d}.jpg").write_bytes(records[-1])
    return records


def _noise(number: int) -> Image:
    """A piece of one large texture, another one for each number."""
    row, column = np.random.default_rng(number).integers(0, (_NOISE - HEIGHT, _NOISE - WIDTH))
    return _texture()[row : row + HEIGHT, column : column + WIDTH]


@lru_cache(maxsize=1)
def _texture() -> Image:
    """Three colours much alike, whose amplitudes fall with the frequency so that a JPEG has 50 kB, as of photos."""
    rng = np.random.default_rng(0)
    rows, columns = np.meshgrid(np.fft.fftfreq(_NOISE), np.fft.rfftfreq(_NOISE), indexing="ij")
    frequency = np.maximum(np.hypot(rows, columns), 1 / _NOISE)
    layers = []
    for _ in range(4):
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        layer = np.fft.irfft2(phase / frequency**1.4, (_NOISE, _NOISE))
        layers.append(layer / layer.std())
    colours = [layers[0] + 0.3 * layer for layer in layers[1:]]
    return np.clip(np.stack(colours, -1) * _CONTRAST + 128, 0, 255).astype(np.uint8)
