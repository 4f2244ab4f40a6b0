"""What a checkpoint holds: whole arrays, or slices of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

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
