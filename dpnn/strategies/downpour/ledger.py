"""Which lanes were leased to which replica, and how far their gradients have arrived.

Lanes are leased one by one, epoch after epoch, to who asks: a faster replica takes more. A replica goes through its
leases in their order, and its pushes say how many steps they hold: so the ledger knows for each lease how many of its
steps have arrived, without asking. What has not arrived when a checkpoint is cut is leased again when the run goes on.
"""

from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from dpnn.data import Run


class Ledger:
    """Of a run of `total` steps over lanes, each so many steps long."""

    def __init__(self, lanes: Sequence[int], total: int, replicas: int) -> None:
        self._lanes = tuple(lanes)
        self._left: deque[Run] = deque()
        """What is to be leased first: leased before the run was cut, or cut off because the run ends there."""
        self._next = (0, 0)
        """The epoch and lane that come after it."""
        self._to_lease = total
        """Steps."""
        self.held: list[deque[Run]] = [deque() for _ in range(replicas)]
        """What each replica has leased and not yet pushed."""
        self.steps = 0
        """That have arrived."""

    def lease(self, replica: int) -> Run | None:
        """The next steps for a replica; None where all are taken."""
        while self._to_lease > 0:
            run = self._left.popleft() if self._left else self._new()
            n = min(run.last - run.first + 1, self._to_lease)
            if n > 0:
                if run.first + n <= run.last:
                    self._left.appendleft(run._replace(first=run.first + n))
                run = run._replace(last=run.first + n - 1)
                self._to_lease -= n
                self.held[replica].append(run)
                return run
        return None

    def arrived(self, replica: int, steps: int) -> None:
        """So many steps more of a replica have arrived."""
        self.steps += steps
        held = self.held[replica]
        while steps:
            run = held.popleft()
            n = min(run.last - run.first + 1, steps)
            steps -= n
            if run.first + n <= run.last:
                held.appendleft(run._replace(first=run.first + n))

    def copy(self) -> "Ledger":
        """A ledger of its own, as this one is now."""
        return deepcopy(self)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: steps that were leased and haven't arrived, and what follows them."""
        held = [*self._left, *(run for runs in self.held for run in runs)]
        left = sorted((run.epoch, run.lanes.start, run.first, run.last) for run in held)
        return {"next": list(self._next), "left": [list(run) for run in left], "steps": self.steps}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from there: before any lease."""
        self._left = deque(_run(*run) for run in state["left"])
        epoch, lane = state["next"]
        self._next = (epoch, lane)
        self.steps = state["steps"]
        self._to_lease -= self.steps

    def _new(self) -> Run:
        epoch, lane = self._next
        self._next = (epoch, lane + 1) if lane + 1 < len(self._lanes) else (epoch + 1, 0)
        return _run(epoch, lane, 0, self._lanes[lane] - 1)


def _run(epoch: int, lane: int, first: int, last: int) -> Run:
    return Run(epoch, range(lane, lane + 1), first, last)
