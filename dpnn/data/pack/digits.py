"""The built-in data: scikit-learn's 1,797 images of handwritten digits, 8 x 8 pixels of 0..16."""

import numpy as np

from dpnn.data.pack.source import InMemory, Source, Split
from dpnn.errors import JobError


def read_digits() -> Source:
    """One part, of which a fifth is held out. JobError where scikit-learn isn't installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise JobError('the data "digits" come with scikit-learn; install it with: pip install dpnn[digits]') from error
    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    split = Split("train", InMemory(images, "digits"), labels, np.arange(len(labels), dtype=np.uint64))
    return Source([split], num_classes=10, held_out=0.2)
