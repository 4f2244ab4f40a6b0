"""What a checkpoint holds: whole arrays, slices of them, or only where they lie in its files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run between two steps.

    `params`: arrays by parameter name. `optimizer`: the same by name of its state. `epoch`, `step`: the next step,
    within its epoch. `steps`: taken since the start. `info`: what JSON can hold (seed, lanes, job, versions).
    """

    params: dict[str, Array]
    optimizer: dict[str, dict[str, Array]]
    epoch: int
    step: int
    steps: int
    info: dict[str, Any] = field(default_factory=dict)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """All arrays by their path in the file."""
        for name, array in self.params.items():
            yield f"params/{name}", array
        for state, arrays in self.optimizer.items():
            for name, array in arrays.items():
                yield f"optimizer/{state}/{name}", array


@dataclass(frozen=True, eq=False)
class Slice:
    """Of the parameter `name`, or a state of it: `array`, flat, the numbers from `lo` on of a whole one of `shape`."""

    name: str
    lo: int
    shape: tuple[int, ...]
    array: Array


class Extent(NamedTuple):
    """The numbers [lo, hi) of a flattened array: one run of bytes in `file`, from `offset` on, with this `crc32`."""

    file: Path
    dataset: str
    """Its path in the file."""
    lo: int
    hi: int
    offset: int
    crc32: int


class Stored(NamedTuple):
    """An array in a checkpoint's files."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    extents: range
    """Those of the checkpoint's that make up the array, in order."""


@dataclass(frozen=True, eq=False)
class Contents:
    """What is in the checkpoint at `path`, and where; its arrays are read by the ranks that need them.

    `arrays`: by name of the state ("": the parameters themselves) and of the parameter. All else as in a Checkpoint.
    """

    path: Path
    arrays: Mapping[tuple[str, str], Stored]
    extents: Sequence[Extent]
    epoch: int
    step: int
    steps: int
    info: dict[str, Any]

    def shapes(self, state: str = "") -> dict[str, tuple[int, ...]]:
        """The shapes of a state's arrays, by name of the parameter."""
        return {name: stored.shape for (of, name), stored in self.arrays.items() if of == state}
