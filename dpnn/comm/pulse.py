"""What this process's main thread is doing: noted by it as it goes, read by the watchdog's thread.

A note is an attribute that is set: nothing is called, locked or reserved in a step.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Walk(Protocol):
    """Something that goes through a list of instructions, as the executor does."""

    place: int
    """Rises with every instruction."""

    def instruction(self) -> str:
        """The one at `place`, for people."""
        ...


class Pulse:
    """`doing` is a phase by name, or who walks through a step; `epoch` and `step` count from 1, 0: none.

    `beats` is raised by whatever moves on within a phase. While the main thread waits, `whom` completes "waits for",
    `since` is when that began (time.monotonic), and `idle` says that there is nothing to worry about: whoever is waited
    for need not come.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was."""
        self.doing: str | Walk = "starting"
        self.epoch = self.step = self.beats = 0
        self.whom, self.since, self.idle = "", 0.0, False

    @contextmanager
    def waiting(self, whom: str, since: float, idle: bool = False) -> Iterator[None]:
        """The block waits for `whom`. An error in it leaves the note, for the post-mortem to tell.

        Only the outermost wait counts (save where that one is idle), and only the main thread's.
        """
        outer = self.whom, self.since, self.idle
        if (self.whom and not self.idle) or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.since, self.idle = since, idle
        self.whom = whom
        yield
        self.whom, self.since, self.idle = outer
        self.beats += 1

    def instruction(self) -> str:
        """What is being done, for people."""
        doing = self.doing
        return doing if isinstance(doing, str) else doing.instruction()

    def marks(self) -> tuple[object, ...]:
        """Any two of them differ where something has moved in between."""
        doing = self.doing
        place = 0 if isinstance(doing, str) else doing.place
        return id(doing), place, self.beats, self.epoch, self.step


PULSE = Pulse()
"""This process's: it has one main thread."""
