"""Pictures as the network sees them, encoded or raw, against the recipe in float64."""

import io
import math
from pathlib import Path

import numpy as np
import pytest

from dpnn import philox
from dpnn.data.decode import decode, encode, resize
from dpnn.data.manifest import Content
from dpnn.data.view import AUGMENTATIONS, BadSample, view_of
from dpnn.data.view.colour import EIGENVALUES, EIGENVECTORS, Colour
from dpnn.data.view.images import ResizedBox

from .conftest import by_threads

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("simplejpeg")
pytest.importorskip("cv2")

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos" / "test"
MEAN, STD = (123.0, 117.0, 104.0), (58.0, 57.0, 60.0)
PICTURE = Content(kind="encoded", codec="image", labels="single", num_classes=2, block=8)
SIZES = [(40, 50), (256, 256), (24, 24), (61, 33), (150, 100), (1, 1), (3, 200), (400, 90)]
SIZE = 24


def picture(height, width, seed=0):
    """Noise on a slope."""
    y, x = np.mgrid[:height, :width]
    slope = np.stack((x * 200 / width, y * 200 / height, (x + y) * 100 / (width + height)), axis=-1)
    return (slope + np.random.default_rng(seed).integers(0, 56, slope.shape)).astype(np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return memoryview(file.getvalue())


def look(augment="none", size=SIZE, kind=PICTURE, **options):
    return view_of(kind, augment=augment, size=size, mean=MEAN, std=STD, **options)


def put(view, source, slots, choices, dtype=np.float32):
    out = np.full((len(slots), *view.shape), np.nan, dtype)
    view.put(source, np.asarray(slots), choices, out)
    return out


def box(augment, words, height, width):
    """Top, left, height, width, mirrored: the recipe for one picture, from its words."""
    u = [(int(word) >> 8) / 2**24 for word in words]
    side = max(round(min(height, width) * 224 / 256), 1)
    if augment == "none":
        return (height - side) // 2, (width - side) // 2, side, side, False
    if augment == "crop-flip":
        return int(u[0] * (height - side + 1)), int(u[1] * (width - side + 1)), side, side, u[2] >= 0.5
    for i in range(10):
        area = height * width * (0.08 + 0.92 * u[i])
        ratio = math.exp(math.log(3 / 4) + math.log(16 / 9) * u[10 + i])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w, u[22] >= 0.5
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w, u[22] >= 0.5


def coloured(x, choice):
    """Brightness, contrast and saturation in one of their orders, as fb.resnet.torch has them; then light."""
    weights = np.array([0.299, 0.587, 0.114])
    brightness, contrast, saturation, *light = (float(number) for number in choice)
    x = brightness * x
    x = contrast * x + (1 - contrast) * (x @ weights).mean()
    x = saturation * x + (1 - saturation) * (x @ weights)[..., None]
    return x + light


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_picture_becomes_its_box_resized_mirrored_coloured_and_normalised(by, augment, dtype):
    images = [picture(*size, seed) for seed, size in enumerate(SIZES * 4)]
    ids = np.arange(70, 70 + len(images), dtype=np.uint64)
    view = look(augment, seed=9, dtype=dtype)
    choices = view.draw(ids, 3)
    out = put(view, [png(image) for image in images], range(len(images)), choices, dtype)
    words = philox.by_sample(9, 3, "augment", ids, 30)
    for image, drawn, choice, result in zip(images, words, choices, out, strict=True):
        top, left, h, w, mirrored = box(augment, drawn, *image.shape[:2])
        x = resize(image[top : top + h, left : left + w], SIZE, SIZE).astype(np.float64)
        x = x[:, ::-1] if mirrored else x
        x = coloured(x, choice[23:]) if augment == "imagenet" else x
        np.testing.assert_allclose(result, (x - MEAN) / STD, atol=1e-5 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_jpeg_is_decoded_no_larger_than_it_must_be_and_looks_alike(augment):
    """Smooth pictures, since what is finer than the network's pixels is averaged in another way."""
    y, x = np.mgrid[:333, :500]
    smooth = np.stack((x / 2, y / 2, (x + y) / 4), axis=-1).astype(np.uint8)
    view, ids = look(augment), np.arange(40, dtype=np.uint64)
    choices = view.draw(ids, 0)
    small = put(view, [memoryview(encode(smooth))], np.zeros(40, int), choices)
    large = put(view, [png(smooth)], np.zeros(40, int), choices)
    assert np.abs(small - large).max() < 0.2
    assert np.abs((small - large).mean(axis=(0, 1, 2))).max() < 0.02


def test_a_picture_of_256_pixels_is_not_resized():
    image = picture(256, 300)
    view = view_of(PICTURE, mean=(0,) * 3, std=(1,) * 3)
    assert view.shape == (224, 224, 3)
    for training in (True, False):
        view = view_of(PICTURE, augment="crop-flip" if not training else "none", mean=(0,) * 3, std=(1,) * 3,
                       training=training)  # fmt: skip
        assert np.array_equal(put(view, [png(image)], [0], view.draw(np.zeros(1), 0))[0], image[16:240, 38:262])


def test_evaluation_sees_the_middle_whatever_training_sees():
    image = [png(picture(70, 90))]
    wanted = put(look(), image, [0], look().draw(np.zeros(1), 0))
    for augment in AUGMENTATIONS:
        view = look(augment, training=False)
        assert np.array_equal(put(view, image, [0], view.draw(np.zeros(1), 5)), wanted)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_raw_pictures_are_seen_as_encoded_ones(augment):
    images = np.stack([picture(60, 80, seed) for seed in range(6)])
    raw = Content(kind="raw", shape=(60, 80, 3), labels="single", num_classes=2, block=8)
    ids = np.arange(6, dtype=np.uint64)
    encoded, stored = look(augment), look(augment, kind=raw)
    choices = encoded.draw(ids, 0)
    assert np.array_equal(stored.draw(ids, 0), choices)
    wanted = put(encoded, [png(image) for image in images], range(6), choices)
    assert np.array_equal(put(stored, images, range(6), choices), wanted)


def test_raw_pictures_keep_their_size_where_none_is_asked():
    raw = Content(kind="raw", shape=(60, 80, 3), labels="single", num_classes=2, block=8)
    images = picture(60, 80)[None]
    view = look("imagenet", size=0, kind=raw)
    out = put(view, images, np.zeros(50, int), view.draw(np.arange(50, dtype=np.uint64), 0))
    assert out.shape == (50, 60, 80, 3)
    assert len({image.tobytes() for image in out}) == 50


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_raw_pictures_of_other_channels_are_resized_too(by, channels):
    raw = Content(kind="raw", shape=(60, 80, channels), labels="single", num_classes=2, block=8)
    images = np.random.default_rng(0).integers(0, 256, (3, 60, 80, channels)).astype(np.uint8)
    view = view_of(raw, augment="crop-flip", size=30, mean=[9] * channels, std=[3] * channels)
    choices = view.draw(np.arange(3, dtype=np.uint64), 0)
    out = put(view, images, range(3), choices)
    for image, (top, left, mirrored), result in zip(images, choices.tolist(), out, strict=True):
        top, left = int(top * 9), int(left * 29)
        cut = resize(image[top : top + 52, left : left + 52], 30, 30)
        cut = cut[:, ::-1] if mirrored >= 0.5 else cut
        np.testing.assert_allclose(result, (cut - 9.0) / 3, atol=1e-5)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_picture_is_made_alike_in_any_piece_on_any_thread_and_otherwise_in_another_epoch(augment):
    images = [picture(*size, seed) for seed, size in enumerate(SIZES * 6)]
    records = [memoryview(encode(image)) if i % 3 else png(image) for i, image in enumerate(images)]
    n, view = len(records), look(augment)
    ids, slots = np.arange(n, dtype=np.uint64), np.random.default_rng(2).permutation(n)
    choices = view.draw(ids, 1)
    whole = put(view, records, slots, choices[slots])
    assert np.array_equal(view.draw(ids[7:11], 1), choices[7:11])
    cuts = [0, 1, 2, 9, 25, 26, 40, n]
    assert np.array_equal(by_threads(view, records, slots, choices, cuts), whole)
    assert np.array_equal(put(view, records, slots, view.draw(ids, 2)[slots]), whole) == (augment == "none")


def test_boxes_are_distributed_as_torchvision_draws_them():
    """Its RandomResizedCrop, written out with NumPy's generator, has the same mean area, ratio and place."""
    height, width, n = 300, 400, 4000
    boxes = ResizedBox(0)
    drawn = np.array([boxes.box(choice, height, width) for choice in boxes.draw(np.arange(n), 0).tolist()], float)
    rng, peer = np.random.default_rng(0), []
    for _ in range(n):
        for _ in range(10):
            area, ratio = height * width * rng.uniform(0.08, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= width and h <= height:
                peer.append((rng.integers(height - h + 1), rng.integers(width - w + 1), h, w, rng.integers(2)))
                break
    peer = np.array(peer, float)

    def measures(of):
        top, left, h, w, mirrored = of.T
        return np.stack((h * w / (height * width), np.log(w / h), top + h / 2, left + w / 2, mirrored, h * w * w))

    ours, theirs = measures(drawn), measures(peer)
    error = np.sqrt(ours.var(1) / ours.shape[1] + theirs.var(1) / theirs.shape[1])
    assert (np.abs(ours.mean(1) - theirs.mean(1)) < 4 * error).all()
    assert (np.abs(ours.std(1) - theirs.std(1)) < 0.05 * theirs.std(1)).all()
    assert 0.08 - 0.01 < ours[0].min() < 0.09
    assert np.abs(ours[1]).max() < math.log(4 / 3) + 0.02
    assert (drawn[:, 0] + drawn[:, 2] <= height).all()
    assert (drawn[:, 1] + drawn[:, 3] <= width).all()
    assert drawn.min() >= 0


@pytest.mark.parametrize(("height", "width", "wanted"), [(10, 900, (10, 13)), (900, 10, (13, 10)), (1, 1, (1, 1))])
def test_the_largest_box_in_the_middle_is_taken_where_none_fits(height, width, wanted):
    boxes = ResizedBox(0)
    found = [boxes.box(choice, height, width) for choice in boxes.draw(np.arange(200), 0).tolist()]
    whole = [found for found in found if found[2:4] == wanted]
    assert len(whole) > 100
    assert ((height - wanted[0]) // 2, (width - wanted[1]) // 2) in {found[:2] for found in whole}


def test_colours_change_within_their_limits_and_light_as_published():
    drawn = Colour.draw(philox.by_sample(0, 0, "augment", np.arange(20000), 7))
    jitter, light = drawn[:, :3], drawn[:, 3:]
    assert 0.6 <= jitter.min() < 0.61
    assert 1.39 < jitter.max() <= 1.4
    np.testing.assert_allclose(jitter.mean(0), 1, atol=0.01)
    np.testing.assert_allclose(jitter.std(0), 0.8 / math.sqrt(12), rtol=0.02)
    # Krizhevsky et al.: alpha_i lambda_i along component i, alpha normal of deviation 0.1, pixels from 0 to 1.
    wanted = EIGENVECTORS @ np.diag((255 * 0.1 * EIGENVALUES) ** 2) @ EIGENVECTORS.T
    np.testing.assert_allclose(np.cov(light.T), wanted, rtol=0.05)
    np.testing.assert_allclose(EIGENVECTORS.T @ EIGENVECTORS, np.eye(3), atol=1e-3)
    assert abs(np.corrcoef(drawn.T) - np.eye(6))[:3].max() < 0.03


def test_any_two_changes_of_colour_may_change_places():
    """Why none of their random orders is drawn."""
    x, grey = picture(9, 8).astype(float), np.array([0.299, 0.587, 0.114])
    changes = [
        lambda x: 1.3 * x,
        lambda x: 0.7 * x + 0.3 * (x @ grey).mean(),
        lambda x: 0.8 * x + 0.2 * (x @ grey)[..., None],
    ]
    for first in changes:
        for second in changes:
            np.testing.assert_allclose(first(second(x)), second(first(x)), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 24])
def test_colours_are_changed_in_pictures_of_any_size(by, size):
    view = look("imagenet", size=size)
    choices = view.draw(np.arange(8, dtype=np.uint64), 0)
    choices[:, 22] = 0
    out = np.full((10, *view.shape), np.nan, np.float32)
    flat = np.full((5, 5, 3), (30, 120, 220), np.uint8)
    view.put([png(flat)], np.zeros(8, int), choices, out[1:9])
    assert np.isnan(out[[0, 9]]).all()
    for choice, result in zip(choices, out[1:9], strict=True):
        wanted = (coloured(np.full((size, size, 3), flat[0, 0], float), choice[23:]) - MEAN) / STD
        np.testing.assert_allclose(result, wanted, atol=1e-5)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_bad_record_is_named_by_its_place_and_those_before_it_are_done(augment):
    good = png(picture(40, 40))
    whole = encode(picture(40, 40))
    for bad, reason in (
        (whole[: len(whole) // 2], "JPEG data are damaged"),
        (b"", "empty"),
        (bytes(90), "none of JPEG"),
    ):
        view = look(augment)
        choices = view.draw(np.arange(4, dtype=np.uint64), 0)
        out = np.full((4, *view.shape), np.nan, np.float32)
        with pytest.raises(BadSample, match=reason) as caught:
            view.put([memoryview(bad), good], np.array([1, 1, 0, 1]), choices, out)
        assert (caught.value.index, np.isfinite(out).all(axis=(1, 2, 3)).tolist()) == (2, [True, True, False, False])
        assert reason in caught.value.reason
        view.put([good], np.zeros(4, int), choices, out)  # the view is as good as before
        assert np.isfinite(out).all()


def test_real_photos_are_centred_by_their_own_moments():
    files = sorted(PHOTOS.glob("*/*.jpg"))[::40]
    if not files:
        pytest.skip(f"{PHOTOS} isn't here")
    records = [memoryview(file.read_bytes()) for file in files]
    pixels = np.concatenate([decode(record).reshape(-1, 3) for record in records])
    for augment in ("none", "crop-flip"):
        view = view_of(PICTURE, augment=augment, mean=pixels.mean(0), std=pixels.std(0))
        out = put(view, records, range(len(records)), view.draw(np.arange(len(records)), 0))
        assert np.abs(out.mean(axis=(0, 1, 2))).max() < 0.2
        assert np.abs(out.std(axis=(0, 1, 2)) - 1).max() < 0.2
