"""ImageNet's changes of colour: brightness, contrast, saturation, light; with the normalisation one map of a pixel.

With the grey g = 0.299 r + 0.587 g + 0.114 b of a pixel x, and G its mean over the picture:

    brightness b: x -> b x      contrast c: x -> c x + (1 - c) G      saturation s: x -> s x + (1 - s) g

As in fb.resnet.torch nothing is cut off in between; so these are linear, any two of them may change places, and their
random order there is no matter. Light adds one colour to all pixels, along the principal components of ImageNet's
colours (Krizhevsky et al., "ImageNet classification with deep convolutional neural networks", 2012, section 4.1).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.view.base import Normalisation
from dpnn.native import address

Array = NDArray[Any]

GREY = np.array([0.299, 0.587, 0.114])
JITTER = 0.4
LIGHT = 0.1
# Of pixels from 0 to 1, as published with fb.resnet.torch.
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)  # (colour, component)


class Colour:
    """Changes colours and normalises."""

    WORDS = 7

    def __init__(self, normalise: Normalisation) -> None:
        self._normalise = normalise

    @staticmethod
    def draw(words: Array) -> Array:
        """Brightness, contrast, saturation, and what light adds to red, green and blue: (N, 6) from words (N, 7)."""
        uniform = (words + 0.5) * 2.0**-32
        jitter = 1 + JITTER * (2 * uniform[:, :3] - 1)
        # Box and Muller, 1958: two pairs of words are four normal numbers, of which three are used.
        radius, angle = np.sqrt(-2 * np.log(uniform[:, [3, 5]])), 2 * np.pi * uniform[:, [4, 6]]
        normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1)[:, :3]
        light = 255 * (LIGHT * normal * EIGENVALUES) @ EIGENVECTORS.T
        return np.concatenate((jitter, light), axis=1)

    def __call__(self, image: Array, choice: Array, out: Array) -> None:
        """Of one picture, uint8 (H, W, 3); `choice` as drawn, (6,). All without gaps."""
        kernel = self._normalise.kernel("colour")
        if kernel is not None:
            kernel(image.size, address(image), address(choice), *self._normalise.addresses, address(out))
            return
        x = image.astype(out.dtype)
        brightness, contrast, saturation, *light = choice.astype(out.dtype)
        grey = x @ GREY.astype(out.dtype)
        x = saturation * x + (1 - saturation) * grey[..., None]
        x = brightness * (contrast * x + (1 - contrast) * grey.mean()) + np.array(light)
        self._normalise(x, out)
