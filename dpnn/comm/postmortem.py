"""The post-mortem of a job in which nothing moves any more: a line for every rank.

Any rank of a node can write the lines of all its ranks, by their slots. Nodes meet in the run folder: the rank that
ends the job makes a folder `last-words` there; a node whose ranks wait looks for it, and puts its lines in.
"""

import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from dpnn.comm.slots import Place, here, state_of

_SILENT_S = 10.0
"""A watchdog that hasn't been seen for so long can't run either."""
_SHOWN = 32
"""Lines of a kind that are printed; the file has all."""
_AGAIN_S = 0.1
_LINE = re.compile(r"rank (\d+) \(.*last seen [\d:]{8}$")
"""A whole one: the last one of a file may just be written."""
_WAITS = " waits for "
_ASKED, _ALL = "last-words", "post-mortem.txt"


def trouble(place: Place, now: float) -> str:
    """What is wrong with a rank of this node, as far as others can see; empty where nothing is."""
    late = now - place.seen > _SILENT_S
    state = state_of(place.pid) if place.space == here() else ""
    if state and (late or state != "dead"):
        return f"is {state}"
    return "is stuck, and Python with it" if late else ""


def where(place: Place) -> str:
    """The epoch, the step and the instruction."""
    at = [f"epoch {place.epoch}"] * (place.epoch > 0) + [f"step {place.step}"] * (place.step > 0)
    return ", ".join([*at, place.doing])


def clock(seconds: float) -> str:
    """As people read it."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def lines_of(places: Iterable[Place]) -> list[str]:
    """A line for each of some ranks of this node."""
    host, now = socket.gethostname(), time.time()
    lines = []
    for place in places:
        wrong, waits = trouble(place, now), f"waits for {place.whom}" if place.whom else ""
        what = wrong or waits or "works"
        rest = f", and {waits}" if wrong and waits else ""
        lines.append(
            f"rank {place.rank} ({host}) {what}: {where(place)}{rest}, since {clock(place.since)}; "
            f"last seen {clock(place.seen)}"
        )
    return lines


class LastWords:
    """What the nodes of a job know of their ranks, put together in the run folder `folder`."""

    def __init__(self, folder: Path, size: int) -> None:
        """`size`: ranks of the job."""
        self._asked, self._all, self._size = folder / _ASKED, folder / _ALL, size

    def are_asked(self) -> bool:
        """Whether the job is being ended. The folder is opened: NFS then asks its server for what is new there."""
        return _ASKED in os.listdir(self._asked.parent)

    def add(self, lines: Sequence[str], node: int) -> None:
        """Put in those of a node; `node`: a number of its own."""
        (self._asked / f"{node}.txt").write_text("\n".join([*lines, ""]))

    def collect(self, lines: Sequence[str], limit_s: float) -> dict[int, str]:
        """Lines by rank: those of this node, and what others bring within `limit_s` seconds."""
        found = by_rank(lines)
        until = time.monotonic() + limit_s
        if len(found) < self._size:
            self._asked.mkdir(exist_ok=True)
        while len(found) < self._size and time.monotonic() < until:
            time.sleep(_AGAIN_S)
            for file in self._asked.iterdir():
                found |= by_rank(file.read_text().splitlines())
        return found

    def keep(self, lines: Sequence[str]) -> str:
        """Write all into one file; its path."""
        self._all.write_text("\n".join([*lines, ""]))
        away = self._asked.with_name(f".{_ASKED}")
        with suppress(OSError):  # as none was made
            self._asked.rename(away)  # a node that is late would put its lines in while it is being emptied
        shutil.rmtree(away, ignore_errors=True)
        return str(self._all)


def forget(folder: Path) -> None:
    """The run goes on: what was found when it last ended is of no use any more."""
    (folder / _ALL).unlink(missing_ok=True)
    shutil.rmtree(folder / _ASKED, ignore_errors=True)


def complete(found: dict[int, str], size: int) -> list[str]:
    """Lines by rank, in their order, with one for those that are missing."""
    missing = [rank for rank in range(size) if rank not in found]
    lines = [found[rank] for rank in sorted(found)]
    if missing:
        runs = [[rank for _, rank in run] for _, run in groupby(enumerate(missing), lambda pair: pair[1] - pair[0])]
        named = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        many = "s" if len(missing) > 1 else ""
        lines.append(f"no word from rank{many} {named}: the node is gone, works on, or doesn't reach the run folder")
    return lines


def table(lines: Sequence[str], size: int, kept: str) -> str:
    """What is printed of the lines: first those of ranks that don't wait for others. `kept`: where all are, if so."""
    others = [line for line in lines if _WAITS not in line.partition(":")[0]]
    waiting = [line for line in lines if _WAITS in line.partition(":")[0]]
    shown = []
    for kind, what in ((others, "that don't wait"), (waiting, "that wait")):
        shown += kind[:_SHOWN]
        if len(kind) > _SHOWN:
            shown.append(f"and {len(kind) - _SHOWN} more ranks {what}")
    return "\n  ".join([f"post-mortem of {size} ranks{f', kept in {kept}' if kept else ''}:", *shown])


def by_rank(lines: Iterable[str]) -> dict[int, str]:
    """Lines by the rank that they are of."""
    return {int(found[1]): line for line in lines if (found := _LINE.match(line))}
