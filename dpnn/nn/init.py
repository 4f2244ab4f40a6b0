"""Initial parameters, drawn by a counter from (seed, parameter name, index).

The number at an index depends on nothing else: not on the rank, the order of construction or the piece it is drawn
in. A shard of a parameter draws only its own piece.
"""

import math
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpnn.nn.layer import ParamSpec
from dpnn.philox import words

_BLOCK = 1 << 20
"""Numbers drawn at a time, so that a large parameter needs no large arrays of words."""
_LANE = 16
"""Blocks start and end at multiples of it: NumPy may round the last numbers of an array, which don't fill a vector
register, differently, and a number must not depend on where its piece ends."""


def draw(
    seed: int, name: str, spec: ParamSpec, lo: int = 0, hi: int | None = None, dtype: DTypeLike = np.float32
) -> NDArray[Any]:
    """The numbers [lo, hi) of the flattened initial values of the parameter `name`, as dtype[hi - lo].

    "he" is normal with the variance 2 / fan_in (He et al. 2015). Computed in float64, then rounded to `dtype`.
    """
    hi = math.prod(spec.shape) if hi is None else hi
    if spec.draw in ("zeros", "ones"):
        return np.full(hi - lo, spec.draw == "ones", dtype)
    scale = math.sqrt(2 / spec.fan_in)
    stream = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
    values = np.empty(hi - lo, dtype)
    for start in range(lo // _LANE * _LANE, hi, _BLOCK):
        stop = min(start + _BLOCK, -(-hi // _LANE) * _LANE)
        block = scale * _normal(words(stop - start, seed, stream, start=start))
        first, last = max(lo, start), min(hi, stop)
        values[first - lo : last - lo] = block[first - start : last - start]
    return values


def _normal(word: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One standard normal number a word, by Box and Muller (1958): the halves of the word are radius and angle."""
    radius = np.sqrt(-2 * np.log(((word >> np.uint64(32)) + 0.5) * 2.0**-32))
    angle = (word & np.uint64(0xFFFFFFFF)) * (2 * np.pi * 2.0**-32)
    return np.asarray(radius * np.cos(angle), np.float64)
