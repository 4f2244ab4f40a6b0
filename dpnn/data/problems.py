"""What is wrong with data, one finding at a time: training raises the first, `dpnn data check` lists all."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
from numpy.typing import NDArray

from dpnn.errors import DataError

SHOWN = 10
"""Findings of one kind in one dataset that are told one by one; the others are counted."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. `text` says all of it; file, dataset and index are for programs."""

    text: str
    file: str
    dataset: str = ""
    index: int | None = None
    count: int = 1
    """How many of its kind it stands for."""
    warning: bool = False


def refuse(problems: Iterable[Problem]) -> None:
    """DataError with the first of the problems, where there is one."""
    for problem in problems:
        raise DataError(problem.text)


def listed(places: NDArray[Any], tell: Callable[[int], Problem]) -> Iterator[Problem]:
    """A problem for each of the first places in a dataset, and one that counts all others."""
    for place in places[:SHOWN].tolist():
        yield tell(place)
    more = len(places) - SHOWN
    if more > 0:
        last = tell(int(places[SHOWN]))
        text = f"{last.file}, {last.dataset}: {more:,} more like these"
        yield msgspec.structs.replace(last, text=text, count=more)
