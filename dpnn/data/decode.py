"""Pictures from their bytes, and back: JPEG by simplejpeg, all other formats by Pillow.

A picture becomes (H, W, 3) uint8, red first, whatever it was: grey is repeated, CMYK converted, 16 bits are cut to
their upper 8, of an animation the first picture is taken, transparency is dropped. How a camera was held (EXIF) is
ignored. What can't be decoded to its end is refused, even where most of it could be shown.
"""

import io
import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.errors import JobError

Array = NDArray[Any]

MOST_PIXELS = 1 << 26
"""A header that claims more is refused before anything is decoded: 200 MB once it is."""
SHRINKS = (8, 4, 2)
"""What a JPEG can be made smaller by while it is decoded."""
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP")
_WAY_OUT = "install it with `pip install dpnn[data]`"
_KEPT_NBYTES = 1 << 25


class BadImage(Exception):
    """Why a record is no picture that can be used."""


class Room(threading.local):
    """A thread's memory for a decoded picture, used again for the next: fresh memory would cost a third of the time."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Array:
        """That many bytes, valid until the next call."""
        if nbytes <= len(self._room):
            return self._room
        room = np.empty(nbytes, np.uint8)
        if nbytes <= _KEPT_NBYTES:
            self._room = room
        return room


class Picture:
    """A record (bytes or a memoryview of them) whose header was read; BadImage where that can't be."""

    def __init__(self, record: bytes | memoryview) -> None:
        self._record = record
        jpeg = _jpeg_header(record)
        if jpeg is not None:
            self.format = "JPEG"
            self.height, self.width, self._colours = jpeg
        else:
            self._colours = ""
            with _opened(record) as picture:
                self.format, self.height, self.width = str(picture.format), picture.height, picture.width
        if self.height * self.width > MOST_PIXELS:
            raise BadImage(f"it has {self.height} x {self.width} pixels; the limit is {MOST_PIXELS}")

    def decode(self, shrink: int = 1, room: Room | None = None) -> Array:
        """Its pixels, uint8 (H, W, 3); BadImage.

        `shrink`: one of SHRINKS: a JPEG is made smaller by it while it is decoded, each side rounded up; that is
        quicker, and the pixels differ slightly from those of a picture made smaller later. `room`: where to put them.
        """
        if not self._colours:
            return _by_pillow(self._record, shrink)
        height, width = -(-self.height // shrink), -(-self.width // shrink)
        inks = self._colours in ("CMYK", "YCCK")
        buffer = None if room is None else room.take(height * width * (4 if inks else 3))
        try:
            image: Array = _simplejpeg().decode_jpeg(
                self._record, "CMYK" if inks else "RGB", min_height=height, min_width=width, buffer=buffer
            )
        except Exception as error:
            raise BadImage(f"its JPEG data are damaged ({error})") from error
        if inks:  # as Adobe stores them, and everybody since: 255 is no ink
            image = ((image[..., :3].astype(np.uint16) * image[..., 3:] + 127) // 255).astype(np.uint8)
        return image


def header(record: bytes | memoryview) -> tuple[str, int, int]:
    """Format ("JPEG", "PNG", ...), height and width of a record; BadImage."""
    picture = Picture(record)
    return picture.format, picture.height, picture.width


def decode(record: bytes | memoryview, room: Room | None = None) -> Array:
    """The picture, uint8 (H, W, 3), in fresh memory or in `room`; BadImage."""
    return Picture(record).decode(room=room)


def encode(image: Array, quality: int = 95) -> bytes:
    """A JPEG of a picture, uint8 (H, W, 3)."""
    simplejpeg = _simplejpeg()
    image = np.ascontiguousarray(image)
    if simplejpeg is not None:
        return bytes(simplejpeg.encode_jpeg(image, quality, colorsubsampling="420"))
    file = io.BytesIO()
    _pillow().fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


def resize(image: Array, height: int, width: int, out: Array | None = None) -> Array:
    """The picture, uint8 (H, W, C), stretched to another size.

    Bilinear, after it was halved as often as both sides stay as large as they shall become: then no pixel is skipped.
    So the result is nearly that of averages over areas, which take five times as long.
    """
    if image.shape[:2] == (height, width) and out is None:
        return image
    cv2 = opencv()
    while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:
        half = image.shape[1] // 2, image.shape[0] // 2
        image = cv2.resize(image[: 2 * half[1], : 2 * half[0]], half, interpolation=cv2.INTER_AREA)
    resized: Array = cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
    return resized.reshape(height, width, -1)  # OpenCV drops a lone channel


def resize_shorter(image: Array, side: int) -> Array:
    """The picture with its shorter side made so long, and the other in proportion."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    return resize(image, max(round(height * side / shorter), side), max(round(width * side / shorter), side))


def centre_crop(image: Array, size: int) -> Array:
    """The square in the middle; a view. ValueError where the picture is smaller."""
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(f"a picture of {height} x {width} pixels holds no square of {size}")
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


@cache
def opencv() -> Any:
    """OpenCV, which stays on the calling thread; JobError where it is missing."""
    try:
        import cv2
    except ImportError as error:
        raise JobError(f"resizing pictures needs OpenCV; {_WAY_OUT}") from error
    cv2.setNumThreads(0)
    return cv2


@cache
def _simplejpeg() -> Any:
    """None where it is missing: Pillow takes three times as long, and doesn't find all damage."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


@cache
def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise JobError(f"pictures that aren't JPEG need Pillow; {_WAY_OUT}") from error
    Image.MAX_IMAGE_PIXELS = None  # MOST_PIXELS is checked instead, without a warning
    return Image


def _jpeg_header(record: bytes | memoryview) -> tuple[int, int, str] | None:
    """Height, width, and what its colours are; None where simplejpeg doesn't decode it."""
    simplejpeg = _simplejpeg()
    if record[:2] != b"\xff\xd8" or simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(record)
    except Exception as error:
        if "subsampling" in str(error):  # rare ones are Pillow's
            return None
        raise BadImage(f"its JPEG header is damaged ({error})") from error
    return height, width, colours


def _opened(record: bytes | memoryview) -> Any:
    """The header alone is read."""
    if not len(record):
        raise BadImage("it is empty")
    pillow = _pillow()
    try:
        return pillow.open(io.BytesIO(record), formats=_FORMATS)
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them into
        raise BadImage(f"it is none of {', '.join(_FORMATS)}, or its header is damaged") from error


def _by_pillow(record: bytes | memoryview, shrink: int) -> Array:
    with _opened(record) as picture:
        try:
            if shrink > 1:
                picture.draft(None, (picture.width // shrink, picture.height // shrink))  # JPEG alone does it
            picture.load()
            if picture.mode.startswith("I"):  # 16 bits
                grey = (np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            # Palettes by way of their transparency: Pillow warns of one that it drops.
            opaque = picture.convert("RGBA") if picture.mode in ("P", "PA") else picture
            return np.array(opaque.convert("RGB"))
        except Exception as error:
            raise BadImage(f"its {picture.format} data are damaged ({error})") from error
