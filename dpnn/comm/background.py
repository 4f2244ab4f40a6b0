"""Work that goes on beside a rank's own, and mustn't stand still."""

import math
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from dpnn.comm.faults import started, wait
from dpnn.comm.ranks import Ranks
from dpnn.errors import RankError

T = TypeVar("T")

_TOLD_S = 1.0
"""How often ranks that wait for others' work hear that it gets on."""


class Background(Generic[T]):
    """`call(note)` in a thread of its own: whenever it gets on it notes what it waits for next.

    It may take as long as it likes, but not get on for `limit_s` seconds. `what` names it in messages.
    """

    def __init__(self, what: str, call: Callable[[Callable[[str], object]], T], limit_s: float) -> None:
        self._what, self._limit_s = what, limit_s
        self._noted = time.monotonic(), "a thread to begin"
        self._result = started(lambda: call(self._note))

    def done(self) -> bool:
        """Whether it has ended. What it raised is raised here; RankError where it doesn't get on."""
        if self._ended():
            self._result.result()
            return True
        return False

    def result(self) -> T:
        """What the call returns, once it does; errors as in `done`."""
        wait(self.done, self._what, math.inf)
        return self._result.result()

    def together(self, ranks: Ranks) -> T:
        """What the call returns, once those of all `ranks` have. Collective; a DpnnError of one is raised on all.

        Who waits hears now and then that others get on: that may take longer than a rank waits for another.
        """
        results: list[T] = []
        while ranks.any(self.goes_on()):
            pass
        ranks.check(lambda: results.append(self._result.result()))
        return results[0]

    def goes_on(self) -> bool:
        """Return once it has ended, or has got on for some time: whether it is still at it. RankError as in `done`."""
        end = time.monotonic() + min(_TOLD_S, self._limit_s / 4)
        wait(lambda: self._ended() or self._noted[0] > end, self._what, math.inf)
        return not self._result.done()

    def _ended(self) -> bool:
        if self._result.done():
            return True
        since, whom = self._noted
        if time.monotonic() - since > self._limit_s:
            raise RankError(
                f"{self._what} has waited {self._limit_s:g} s for {whom}, and has not got on; "
                "if that is only slow, raise parallel.stall_abort_s"
            )
        return False

    def _note(self, whom: str) -> None:
        self._noted = time.monotonic(), whom
