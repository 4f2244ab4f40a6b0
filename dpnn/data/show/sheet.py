"""A contact sheet: samples as the network sees them, each several times where training changes it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.errors import JobError

Array = NDArray[Any]

_GAP, _LINE, _WIDTH = 6, 18, 1500
_DARK, _LIGHT = (30, 30, 30), (255, 255, 255)


def sheet(title: str, strips: Sequence[tuple[Sequence[Array], str]]) -> Any:
    """An image by Pillow, of strips: pictures uint8 (h, w, 3) side by side, and a caption. JobError without Pillow."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise JobError("a sheet of samples needs Pillow; install it with `pip install dpnn[data]`") from error
    font: Any = ImageFont.load_default(13)
    width = max(sum(picture.shape[1] + 2 for picture in pictures) for pictures, _ in strips) + _GAP
    height = max(picture.shape[0] for pictures, _ in strips for picture in pictures) + _LINE + _GAP
    columns = min(max(_WIDTH // width, 1), len(strips))
    rows = -(-len(strips) // columns)
    total = max(columns * width + _GAP, int(font.getlength(title)) + 2 * _GAP)
    image = Image.new("RGB", (total, _LINE + 2 * _GAP + rows * height), _LIGHT)
    draw = ImageDraw.Draw(image)
    draw.text((_GAP, _GAP), title, _DARK, font)
    for number, (pictures, caption) in enumerate(strips):
        top = _LINE + 2 * _GAP + number // columns * height
        left = start = _GAP + number % columns * width
        for picture in pictures:
            image.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, top))
            left += picture.shape[1] + 2
        while caption and font.getlength(caption) > width - _GAP:
            caption = caption[:-2] + "…" if len(caption) > 2 else ""
        draw.text((start, top + height - _LINE - _GAP), caption, _DARK, font)
    return image
