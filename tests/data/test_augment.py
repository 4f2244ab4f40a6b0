"""Changes of a sample depend on seed, epoch and its id alone."""

import numpy as np
import pytest

from dpnn import philox
from dpnn.data.augment import AUGMENTATIONS, CropFlip
from dpnn.errors import JobError

SHAPE = (6, 5, 3)
UINT8 = np.dtype(np.uint8)


def change(augment, samples, ids, epoch):
    return augment.apply(samples, augment.draw(ids, epoch))


def images(n):
    return np.random.default_rng(0).integers(1, 256, (n, *SHAPE)).astype(np.uint8)


def test_crop_flip_equals_the_recipe_image_by_image():
    x, ids = images(40), np.arange(100, 140, dtype=np.uint64)
    changed = change(CropFlip(5, SHAPE, UINT8, 40), x, ids, 2)
    for image, sample, result in zip(x, ids, changed, strict=True):
        words = [int(word) for word in philox.by_sample(5, 2, "augment", np.array([sample]), 3)[0]]
        row, column = words[0] * 9 >> 32, words[1] * 9 >> 32
        crop = np.pad(image, ((4, 4), (4, 4), (0, 0)))[row : row + 6, column : column + 5]
        assert np.array_equal(result, crop[:, ::-1] if words[2] >> 31 else crop)


def test_all_crops_and_both_directions_occur():
    x = np.broadcast_to(images(1), (4000, *SHAPE))
    changed = change(CropFlip(0, SHAPE, UINT8, 4000), x, np.arange(4000, dtype=np.uint64), 0)
    assert len({image.tobytes() for image in changed}) == 9 * 9 * 2


def test_an_image_is_changed_alike_in_any_batch_and_otherwise_in_any_other_epoch():
    x, ids = images(20), np.arange(20, dtype=np.uint64)
    augment = CropFlip(0, SHAPE, UINT8, 20)
    whole = change(augment, x, ids, 0)
    assert np.array_equal(change(augment, x[7:11], ids[7:11], 0), whole[7:11])
    assert np.array_equal(change(CropFlip(0, SHAPE, UINT8, 20), x[::-1], ids[::-1], 0), whole[::-1])
    assert not np.array_equal(change(augment, x, ids, 1), whole)
    assert not np.array_equal(change(CropFlip(1, SHAPE, UINT8, 20), x, ids, 0), whole)


def test_the_samples_themselves_are_not_written():
    x = images(8)
    before = x.copy()
    change(CropFlip(0, SHAPE, UINT8, 8), x, np.arange(8, dtype=np.uint64), 0)
    assert np.array_equal(x, before)


def test_a_batch_may_be_empty():
    for augmentation in AUGMENTATIONS.values():
        assert change(augmentation(0, SHAPE, UINT8, 4), images(0), np.empty(0, np.uint64), 0).shape == (0, *SHAPE)


def test_what_is_no_image_is_refused():
    with pytest.raises(JobError, match="needs images"):
        CropFlip(0, (5,), UINT8, 4)
