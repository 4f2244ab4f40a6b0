"""Raw samples and frames as the network sees them, against float64; by each kernel that runs here, and by NumPy."""

from fractions import Fraction

import numpy as np
import pytest

from dpnn import native, philox
from dpnn.data.manifest import Content
from dpnn.data.view import AUGMENTATIONS, BadSample, base, network_shape, view_of
from dpnn.errors import DataError, JobError

from .conftest import by_threads

SHAPES = [(6, 5, 3), (9, 2, 1), (28, 28, 1), (19, 19, 12), (3, 40, 300), (8,), (7, 5)]
DTYPES = ["uint8", "float16", "float32"]


def content(shape, dtype="uint8", **options):
    return Content(
        kind="encoded" if "codec" in options else "raw", shape=shape, dtype=dtype, labels="single", num_classes=2,
        block=8, **options,
    )  # fmt: skip


def numbers(channels):
    rng = np.random.default_rng(1)
    std = rng.uniform(20, 90, channels)
    std[-1] = 0 if channels > 2 else std[-1]
    return rng.uniform(50, 200, channels).tolist(), std.tolist()


def normalised(x, mean, std):
    """In float64; a constant channel is only centred."""
    return (x.astype(np.float64) - mean) / np.where(np.array(std) > 0, std, 1)


def samples(n, shape, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 256, (n, *shape))
    return x.astype(dtype) if dtype == "uint8" else (x * rng.choice([1e-7, 0.01, 1, -1], x.shape)).astype(dtype)


def put(view, source, slots, choices, dtype=np.float32):
    out = np.full((len(slots), *view.shape), np.nan, dtype)
    view.put(source, slots, choices, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_gathered_and_normalised(by, shape, dtype):
    mean, std = numbers(shape[-1])
    x, slots = samples(20, shape, dtype), np.array([3, 19, 0, 3, 7])
    view = view_of(content(shape, dtype), mean=mean, std=std)
    assert view.shape == shape
    out = put(view, x, slots, view.draw(slots, 0))
    np.testing.assert_allclose(out, normalised(x[slots], mean, std), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 3])
def test_crops_are_cut_from_zero_pixels_around_and_mirrored(by, shape, dtype):
    """He et al., image by image: the zeros are normalised with all others."""
    mean, std = numbers(shape[-1])
    height, width, _ = shape
    x, ids = samples(60, shape, dtype), np.arange(100, 160, dtype=np.uint64)
    view = view_of(content(shape, dtype), augment="crop-flip", seed=5, mean=mean, std=std)
    out = put(view, x, np.arange(60)[::-1], view.draw(ids, 2))
    for image, sample, result in zip(x[::-1], ids, out, strict=True):
        words = [int(word) for word in philox.by_sample(5, 2, "augment", np.array([sample]), 3)[0]]
        row, column = words[0] * 9 >> 32, words[1] * 9 >> 32
        crop = np.pad(image, ((4, 4), (4, 4), (0, 0)))[row : row + height, column : column + width]
        crop = crop[:, ::-1] if words[2] >> 31 else crop
        np.testing.assert_allclose(result, normalised(crop, mean, std), rtol=1e-5, atol=1e-5)


def test_all_crops_and_both_directions_occur():
    view = view_of(content((6, 5, 3)), augment="crop-flip", mean=[0] * 3, std=[1] * 3)
    x = samples(1, (6, 5, 3), "uint8")
    out = put(view, x, np.zeros(4000, np.int64), view.draw(np.arange(4000, dtype=np.uint64), 0))
    assert len({image.tobytes() for image in out}) == 9 * 9 * 2


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_numpy_and_the_kernels_make_the_same_numbers(monkeypatch, augment):
    mean, std = numbers(3)
    x, slots = samples(30, (9, 7, 3), "uint8"), np.arange(30)
    view = view_of(content((9, 7, 3)), augment=augment, mean=mean, std=std)
    choices = view.draw(slots, 0)
    by_kernel = put(view, x, slots, choices)
    monkeypatch.setattr(base, "_kernel", lambda name: None)
    assert np.array_equal(put(view, x, slots, choices), by_kernel)


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_float64_is_exact_to_its_last_digits(augment):
    mean, std = numbers(3)
    x, slots = samples(10, (9, 7, 3), "uint8"), np.arange(10)
    view = view_of(content((9, 7, 3)), augment=augment, mean=mean, std=std, dtype=np.float64)
    choices = view.draw(slots, 0)
    if augment == "none":
        np.testing.assert_allclose(put(view, x, slots, choices, np.float64), normalised(x, mean, std), rtol=1e-14)
    small = put(view_of(content((9, 7, 3)), augment=augment, mean=mean, std=std), x, slots, choices)
    np.testing.assert_allclose(put(view, x, slots, choices, np.float64), small, rtol=1e-5, atol=1e-5)


def test_halves_count_where_smaller_numbers_are_flushed():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = every[np.isfinite(every)].reshape(1, -1, 1)
    view = view_of(content(x.shape[1:], "float16"), mean=[0], std=[1])
    with native.denormals_flushed():
        out = put(view, x, np.array([0]), view.draw(np.array([0]), 0))
    assert np.array_equal(out, x.astype(np.float32))


def test_nothing_is_read_or_written_beyond_the_samples(by):
    x = samples(40, (5, 3, 3), "uint8")
    for augment in ("none", "crop-flip"):
        view = view_of(content((5, 3, 3)), augment=augment, mean=[0] * 3, std=[1] * 3)
        before, out = x.copy(), np.full((12, *view.shape), np.nan, np.float32)
        view.put(x, np.arange(10), view.draw(np.arange(10), 0), out[1:11])
        assert np.isnan(out[[0, 11]]).all()
        assert np.isfinite(out[1:11]).all()
        assert np.array_equal(x, before)
        for slots in ([-1], [40], [0, 41, 2]):
            with pytest.raises(IndexError, match="of 40"):
                view.put(x, np.array(slots), view.draw(np.array(slots), 0), out[: len(slots)])
        for wrong in (out.astype(np.float64)[:10], out[:, ::-1][:10]):
            with pytest.raises(ValueError, match="without gaps, batches as float32"):
                view.put(x, np.arange(10), view.draw(np.arange(10), 0), wrong)


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_a_sample_is_made_alike_in_any_piece_on_any_thread_and_otherwise_in_another_epoch(augment):
    mean, std = numbers(3)
    x, ids = samples(500, (12, 11, 3), "uint8"), np.arange(1000, 1500, dtype=np.uint64)
    view = view_of(content((12, 11, 3)), augment=augment, seed=3, mean=mean, std=std)
    slots, choices = np.random.default_rng(2).permutation(500), view.draw(ids, 1)
    whole = put(view, x, slots, choices[slots])
    assert np.array_equal(view.draw(ids[7:11], 1), choices[7:11])
    cuts = [0, 1, 30, 77, 200, 201, 350, 500]
    assert np.array_equal(by_threads(view, x, slots, choices, cuts), whole)
    assert np.array_equal(put(view, x, slots, view.draw(ids, 2)[slots]), whole) == (augment == "none")


def test_evaluation_sees_what_is_stored():
    x, slots = samples(5, (6, 5, 3), "uint8"), np.arange(5)
    for augment in AUGMENTATIONS:
        view = view_of(content((6, 5, 3)), augment=augment, mean=[0] * 3, std=[1] * 3, training=False)
        assert np.array_equal(put(view, x, slots, view.draw(slots, 0)), x)


def test_a_batch_may_be_empty(by):
    for augment in ("none", "crop-flip"):
        view = view_of(content((6, 5, 3)), augment=augment, mean=[0] * 3, std=[1] * 3)
        none = np.empty(0, np.int64)
        assert put(view, samples(3, (6, 5, 3), "uint8"), none, view.draw(none, 0)).shape == (0, 6, 5, 3)


FRAMES = content((20,), codec="frames")


@pytest.mark.parametrize("stored", [1, 3, 16, 50, 299])
@pytest.mark.parametrize("training", [True, False])
def test_frames_are_one_of_each_equal_stretch(by, stored, training):
    mean, std = numbers(20)
    ids = np.arange(30, dtype=np.uint64)
    x = np.random.default_rng(0).integers(0, 256, (stored, 20)).astype(np.uint8)
    view = view_of(FRAMES, frames=16, seed=4, mean=mean, std=std, training=training)
    assert view.shape == (16, 1, 20)
    out = put(view, [memoryview(x.tobytes())], np.zeros(30, np.int64), view.draw(ids, 1))
    words = philox.by_sample(4, 1, "frames", ids, 16)
    for result, drawn in zip(out, words, strict=True):
        u = [Fraction(int(word), 1 << 32) if training else Fraction(1, 2) for word in drawn]
        at = [int((i + u[i]) * stored / 16) for i in range(16)]
        np.testing.assert_allclose(result[:, 0], normalised(x[at], mean, std), rtol=1e-5, atol=1e-5)


def test_a_record_that_is_no_frames_is_named_by_its_place():
    view = view_of(FRAMES, mean=[0] * 20, std=[1] * 20)
    assert view.shape == (128, 1, 20)
    good = memoryview(bytes(40))
    for bad in (bytes(39), b""):
        out = np.full((3, *view.shape), np.nan, np.float32)
        with pytest.raises(BadSample, match="bytes are not frames of 20") as caught:
            view.put([good, memoryview(bad)], np.array([0, 0, 1]), view.draw(np.arange(3), 0), out)
        assert caught.value.index == 2
        assert not out[:2].any()


def test_shapes_of_the_network():
    picture = content((), codec="image")
    assert network_shape(content((6, 5, 3))) == (3, 6, 5)
    assert network_shape(content((6, 8, 3)), size=4) == (3, 4, 4)
    assert network_shape(content((9,))) == (9,)
    assert network_shape(picture) == (3, 224, 224)
    assert network_shape(picture, size=32) == (3, 32, 32)
    assert network_shape(FRAMES) == (20, 128, 1)
    assert network_shape(FRAMES, frames=7) == (20, 7, 1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (content((5,)), {"augment": "crop-flip"}, r'"crop-flip" needs images \(H, W, C\).*uint8 of shape \(5,\)'),
        (FRAMES, {"augment": "imagenet"}, r"needs images .*encoded as 'frames'; use \"none\""),
        (content((6, 5, 3)), {"augment": "swirl"}, r"'swirl' is none of none, crop-flip, imagenet"),
        (content((6, 5, 3), "float32"), {"augment": "imagenet"}, r"needs images of uint8 in red, green and blue"),
        (content((6, 5, 1)), {"augment": "imagenet"}, r"\(6, 5, 1\); use \"crop-flip\""),
        (content((5,)), {"size": 4}, r"data.size = 4 is for images, .*\(5,\); leave it out"),
        (FRAMES, {"size": 4}, r"data.size = 4 is for images"),
        (content((6, 5, 3)), {"size": 6}, r"data.size = 6 is more than the samples have, .*\(6, 5, 3\)"),
        (content((6, 5, 3), "float32"), {"size": 4}, r"data.size = 4 is for images of uint8"),
        (content((6, 5, 12)), {"size": 4}, r"up to 4 channels"),
        (content((6, 5, 3)), {"frames": 4}, r"data.frames = 4 is for frames, .*\(6, 5, 3\); leave it out"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_a_job_cannot_ask_is_refused_when_the_view_is_made(kind, options, message, training):
    with pytest.raises(JobError, match=message):
        view_of(kind, mean=[0] * 3, std=[1] * 3, training=training, **options)


def test_a_normalisation_of_other_channels_is_refused():
    with pytest.raises(DataError, match=r"mean and std are of 2 channels.*\(6, 5, 3\)"):
        view_of(content((6, 5, 3)), mean=[0, 0], std=[1, 1])
    with pytest.raises(DataError, match="of 1 channels"):
        view_of(FRAMES, mean=[0] * 20, std=[1])
