"""Pictures are decoded as they are, or refused."""

import io
import sys
import zlib

import numpy as np
import pytest

from dpnn.data import decode as decoding
from dpnn.data.decode import (
    MOST_PIXELS,
    SHRINKS,
    BadImage,
    Picture,
    Room,
    centre_crop,
    decode,
    encode,
    header,
    opencv,
    resize,
    resize_shorter,
)
from dpnn.errors import JobError

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("simplejpeg")
pytest.importorskip("cv2")


def picture(height=48, width=64):
    """Smooth, so that a JPEG of it is nearly the same."""
    y, x = np.mgrid[:height, :width]
    return np.stack((3 * x, 2 * y + x, 255 - 2 * x - y), axis=-1).clip(0, 255).astype(np.uint8)


def saved(image, kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    (image if mode is None else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def grey(image):
    return np.repeat((image @ [0.299, 0.587, 0.114])[..., None], 3, axis=2)


SIXTEEN = picture()[..., 0].astype(np.uint16) * 256 + 255
KINDS = {
    "jpeg": (saved(picture(), "JPEG", quality=98), picture(), 2),
    "progressive": (saved(picture(), "JPEG", quality=98, progressive=True), picture(), 2),
    "grey jpeg": (saved(picture(), "JPEG", "L", quality=98), grey(picture()), 2),
    "cmyk jpeg": (saved(picture(), "JPEG", "CMYK", quality=98), picture(), 4),
    "png": (saved(picture()), picture(), 0),
    "grey png": (saved(picture(), mode="L"), grey(picture()), 1),
    "16 bits": (saved(Image.fromarray(SIXTEEN), mode=None), np.repeat(picture()[..., :1], 3, 2), 0),
    "16 bits ppm": (b"P5 64 48 65535\n" + SIXTEEN.astype(">u2").tobytes(), np.repeat(picture()[..., :1], 3, 2), 0),
    "transparent": (saved(np.dstack((picture(), picture()[..., :1])), mode="RGBA"), picture(), 0),
    "grey and transparent": (saved(picture(), mode="LA"), grey(picture()), 1),
    "palette": (saved(picture() // 128 * 128, mode="P", transparency=bytes(range(256))), picture() // 128 * 128, 60),
    "bmp": (saved(picture(), "BMP"), picture(), 0),
    "webp": (saved(picture(), "WEBP", lossless=True), picture(), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_red_green_and_blue(kind):
    record, wanted, error = KINDS[kind]
    for given in (record, memoryview(record)):
        image = decode(given)
        assert header(given)[1:] == (48, 64)
        assert (image.shape, image.dtype) == ((48, 64, 3), np.uint8)
        assert np.abs(image - wanted.astype(float)).mean() <= error


def test_an_animation_is_its_first_picture():
    first, second = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255))
    assert not decode(saved(first, "GIF", save_all=True, append_images=[second])).any()


def test_the_orientation_that_a_camera_noted_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(saved(picture(), "JPEG", exif=exif)).shape == (48, 64, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_was_cut_is_refused_unless_no_pixel_was_lost(kind):
    record, *_ = KINDS[kind]
    whole, accepted = decode(record), 0
    for n in range(0, len(record), 10):
        try:
            image = decode(record[:n])
        except BadImage:
            continue
        accepted += 1
        assert np.array_equal(image, whole)
    assert accepted < 4  # of a PNG the last 12 bytes only say that it ends


def test_a_jpeg_is_refused_wherever_it_was_cut():
    record = encode(picture())
    for n in range(len(record) - 1):
        with pytest.raises(BadImage):
            decode(record[:n])


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_refused_or_decoded_and_never_more(kind):
    record, *_ = KINDS[kind]
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(record)
        damaged[rng.integers(len(record))] ^= 1 << rng.integers(8)
        try:
            image = decode(bytes(damaged))
        except BadImage:
            refused += 1
            continue
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
    assert refused > 0 or kind in ("bmp", "16 bits ppm", "webp")  # which have no checksums


def rarely_sampled():
    """A grey JPEG of 8 x 24 pixels, of which three in a row share one colour: valid, and seldom seen."""
    record = saved(np.full((8, 8, 3), 128, np.uint8), "JPEG", subsampling=0)
    frame, scan = record.index(b"\xff\xc0"), record.index(b"\xff\xda")
    begin = scan + 2 + int.from_bytes(record[scan + 2 : scan + 4], "big")
    # Three blocks of brightness and two of colour: nothing changes, and nothing follows.
    bits = "001010" * 3 + "0000" * 2
    bits += "1" * (-len(bits) % 8)
    record = bytearray(record[:begin] + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9")
    record[frame + 7 : frame + 9] = (24).to_bytes(2, "big")
    record[frame + 11] = 0x31
    return bytes(record)


def test_a_jpeg_of_rare_sampling_is_decoded_by_pillow():
    assert header(rarely_sampled()) == ("JPEG", 8, 24)
    image = decode(rarely_sampled())
    assert image.shape == (8, 24, 3)
    assert (image == 128).all()


def test_what_is_no_picture_says_so():
    for record in (b"hello, world", b"\xff\xd8", b"II*\0" + bytes(40), b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(BadImage, match=r"it is none of JPEG, PNG|its JPEG header is damaged"):
            decode(record)
    for ask in (decode, header):
        with pytest.raises(BadImage, match="it is empty"):
            ask(b"")


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_header_that_claims_too_much_is_refused_before_anything_is_decoded(kind):
    record = bytearray(KINDS[kind][0])
    if kind == "jpeg":
        at = record.index(b"\xff\xc0") + 5
        record[at : at + 4] = (60000).to_bytes(2, "big") * 2
        size = "60000 x 60000"
    else:
        record[16:24] = (30000).to_bytes(4, "big") * 2
        record[29:33] = zlib.crc32(record[12:29]).to_bytes(4, "big")
        size = "30000 x 30000"
    for ask in (decode, header):
        with pytest.raises(BadImage, match=f"it has {size} pixels; the limit is {MOST_PIXELS}"):
            ask(bytes(record))


@pytest.mark.parametrize("with_simplejpeg", [True, False])
def test_a_jpeg_is_made_smaller_while_it_is_decoded(monkeypatch, with_simplejpeg):
    if not with_simplejpeg:
        monkeypatch.setattr(decoding, "_simplejpeg", lambda: None)
    for shrink in SHRINKS:
        for height, width in ((48, 64), (17, 31), (8, 90), (63, 15)):
            record = encode(picture(height, width))
            image = Picture(record).decode(shrink)
            assert image.shape == (-(-height // shrink), -(-width // shrink), 3)
            rows, columns = height // shrink, width // shrink
            whole = decode(record)[: rows * shrink, : columns * shrink].astype(float)
            means = whole.reshape(rows, shrink, columns, shrink, 3).mean(axis=(1, 3))
            assert np.abs(image[:rows, :columns] - means).mean() < 3
    assert Picture(KINDS["png"][0]).decode(2).shape == (48, 64, 3)


def test_room_is_used_again():
    room, records = Room(), [KINDS[kind][0] for kind in ("jpeg", "cmyk jpeg", "grey jpeg", "png")]
    for record in records:
        assert np.array_equal(decode(record, room), decode(record))
    assert np.shares_memory(decode(records[0], room), decode(records[0], room))


def test_pillow_takes_the_place_of_simplejpeg(monkeypatch):
    wanted = decode(KINDS["jpeg"][0])
    monkeypatch.setattr(decoding, "_simplejpeg", lambda: None)
    assert header(KINDS["jpeg"][0]) == ("JPEG", 48, 64)
    assert np.abs(decode(KINDS["jpeg"][0]) - wanted.astype(int)).max() <= 2
    assert np.abs(decode(encode(picture())) - picture().astype(int)).mean() < 2
    with pytest.raises(BadImage, match="its JPEG data are damaged"):
        decode(KINDS["jpeg"][0][:-100])


def test_a_missing_library_is_named_with_the_way_out(monkeypatch):
    for module, needs in (("PIL", lambda: decode(KINDS["png"][0])), ("cv2", lambda: resize(picture(), 9, 9))):
        for cached in (decoding._pillow, opencv):
            cached.cache_clear()
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(JobError, match=r"install it with `pip install dpnn\[data\]`"):
            needs()
    for cached in (decoding._pillow, opencv):
        cached.cache_clear()


def bilinear(image, height, width):
    """In float64, with pixels at half numbers."""
    for axis, wanted in ((0, height), (1, width)):
        n = image.shape[axis]
        at = np.clip((np.arange(wanted) + 0.5) * n / wanted - 0.5, 0, n - 1)
        lo = np.floor(at).astype(int)
        part = (at - lo).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        image = image.take(lo, axis) * (1 - part) + image.take(np.minimum(lo + 1, n - 1), axis) * part
    return image


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(30, 40), (20, 55), (90, 100), (47, 33), (48, 64)])
def test_resizing_is_bilinear(channels, size):
    image = np.random.default_rng(0).integers(0, 256, (48, 64, channels)).astype(np.uint8)
    resized = resize(image, *size)
    assert resized.shape == (*size, channels)
    assert np.abs(resized - bilinear(image.astype(float), *size)).max() <= 1.01


def test_no_pixel_is_skipped_where_a_picture_becomes_much_smaller():
    image = np.random.default_rng(0).integers(0, 256, (160, 320, 3)).astype(np.uint8)
    means = image.reshape(20, 8, 40, 8, 3).mean(axis=(1, 3))
    assert np.abs(resize(image, 20, 40) - means).max() <= 2
    assert abs(resize(image, 23, 47).mean() - image.mean()) < 1


def test_the_shorter_side_and_the_middle():
    assert resize_shorter(picture(48, 64), 24).shape == (24, 32, 3)
    assert resize_shorter(picture(64, 48), 96).shape == (128, 96, 3)
    assert resize_shorter(picture(1, 200), 4).shape == (4, 800, 3)
    assert np.array_equal(centre_crop(picture(48, 64), 10), picture(48, 64)[19:29, 27:37])
    with pytest.raises(ValueError, match="48 x 64 pixels holds no square of 49"):
        centre_crop(picture(48, 64), 49)


def test_nothing_heavy_is_imported_before_it_is_needed(python):
    done = python("-c", "import sys, dpnn.data.view; print({'cv2', 'PIL', 'simplejpeg'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr
