"""Mean and standard deviation of each channel, summed up while samples pass by, and merged shard by shard.

`Sums` are whole numbers, so no order matters. `Running` rounds: the same where samples come in the same order.
"""

import math
from collections.abc import Iterable
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_WIDE, _MOST_ROWS = 512, 1 << 16
"""Values of a channel that are summed up side by side, which is quick; squares of so many fit into 32 bits."""


class Sums(msgspec.Struct, frozen=True, tag="sums"):
    """Of uint8 samples: the sum and the sum of squares, exact."""

    n: int
    """Values of each channel."""
    sums: list[int]
    squares: list[int]

    @classmethod
    def of(cls, samples: Array) -> Self:
        """Of samples (..., C)."""
        channels = samples.shape[-1]
        values = samples.reshape(-1, channels)
        n, sums, squares = len(values), np.zeros(channels, np.uint64), np.zeros(channels, np.uint64)
        whole = n // _WIDE * _WIDE
        for part in (values[:whole].reshape(-1, _WIDE * channels), values[whole:]):
            for lo in range(0, len(part), _MOST_ROWS):
                rows = part[lo : lo + _MOST_ROWS]
                for total, of in ((sums, rows), (squares, np.square(rows, dtype=np.uint16))):
                    columns = of.sum(axis=0, dtype=np.uint32)
                    total += columns.reshape(-1, channels).sum(axis=0, dtype=np.uint64)
        return cls(n, sums.tolist(), squares.tolist())

    def __add__(self, other: Self) -> Self:
        """Of both parts of the samples."""
        sums, squares = (
            [a + b for a, b in zip(mine, its, strict=True)]
            for mine, its in ((self.sums, other.sums), (self.squares, other.squares))
        )
        return type(self)(self.n + other.n, sums, squares)

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel."""
        return tuple(total / self.n for total in self.sums)

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel."""
        pairs = zip(self.sums, self.squares, strict=True)
        return tuple(math.sqrt((square * self.n - total**2) / self.n**2) for total, square in pairs)


class Running(msgspec.Struct, frozen=True, tag="running"):
    """Of floating-point samples: the mean and the sum of squared deviations.

    Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983, equation 1.5b.
    """

    n: int
    """Values of each channel."""
    mean: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def of(cls, samples: Array) -> Self:
        """Of samples (..., C)."""
        values = samples.reshape(-1, samples.shape[-1]).astype(np.float64)
        mean = values.mean(axis=0)
        values -= mean
        return cls(len(values), tuple(mean.tolist()), tuple(np.square(values).sum(axis=0).tolist()))

    def __add__(self, other: Self) -> Self:
        """Of both parts of the samples."""
        n, mean, distance = self.n + other.n, np.array(self.mean), np.array(other.mean) - self.mean
        mean += distance * (other.n / n)
        squares = self.squares + distance**2 * (self.n * other.n / n) + other.squares
        return type(self)(n, tuple(mean.tolist()), tuple(squares.tolist()))

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel."""
        return tuple(math.sqrt(square / self.n) for square in self.squares)


Moments = Sums | Running


def moments_of(samples: Array) -> Moments:
    """Of samples (..., C)."""
    return Sums.of(samples) if samples.dtype == np.uint8 else Running.of(samples)


def merged(parts: Iterable[Moments]) -> Moments:
    """Of all parts together, taken in their order; all are of one kind."""
    first, *rest = parts
    if isinstance(first, Sums):
        return sum((part for part in rest if isinstance(part, Sums)), first)
    return sum((part for part in rest if isinstance(part, Running)), first)
