"""Which lanes were leased to which replica, and how far their gradients have arrived.

Lanes are leased one by one, epoch after epoch, to who asks: a faster replica takes more. A replica goes through its
leases in their order, and its pushes say how many steps they hold: so the ledger knows for each lease how many of its
steps have arrived, without asking. What has not arrived when a checkpoint is cut is leased again when the run goes on;
what a replica held that has died is leased to others.

Where shards lie on the nodes' own disks, a replica is leased lanes of its own node only, each so often as the run has
epochs: a node that has done with its lanes doesn't wait for others, and doesn't go through them once more.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from dpnn.data import Run
from dpnn.data.owners import Owners


class Ledger:
    """Of a run of `total` steps over lanes, each so many steps long. `owners`: of the lanes; None: a single one.

    With several owners the run is of whole epochs.
    """

    def __init__(self, lanes: Sequence[int], total: int, replicas: int, owners: Owners | None = None) -> None:
        self._lanes = tuple(lanes)
        self._owned = owners.lane_runs() if owners else [range(len(self._lanes))]
        """The lanes of each owner."""
        self._owner = owners.replicas if owners else (0,) * replicas
        """That whose lanes a replica is leased."""
        self._left: list[deque[Run]] = [deque() for _ in self._owned]
        """What each owner leases first: leased before the run was cut, or cut off because the run ends there."""
        self._next = [(0, owned.start) for owned in self._owned]
        """The epoch and lane that come after it."""
        self._epochs = -(-total // sum(self._lanes))
        self._to_lease = total
        """Steps."""
        self.held: list[deque[Run]] = [deque() for _ in range(replicas)]
        """What each replica has leased and not yet pushed."""
        self.steps = 0
        """That have arrived."""
        self._living = [self._owner.count(owner) for owner in range(len(self._owned))]
        """Replicas of each owner."""

    def lease(self, replica: int) -> Run | None:
        """The next steps for a replica; None where all are taken."""
        owner = self._owner[replica]
        left = self._left[owner]
        while self._to_lease > 0 and (left or self._next[owner][0] < self._epochs):
            run = left.popleft() if left else self._new(owner)
            n = min(_steps(run), self._to_lease)
            if n > 0:
                if run.first + n <= run.last:
                    left.appendleft(run._replace(first=run.first + n))
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
            n = min(_steps(run), steps)
            steps -= n
            if run.first + n <= run.last:
                held.appendleft(run._replace(first=run.first + n))

    @property
    def open(self) -> bool:
        """Whether there are steps left that haven't arrived."""
        return self._to_lease > 0 or any(self.held)

    def held_by_others(self, replica: int) -> bool:
        """Whether any other replica has leased what hasn't arrived."""
        return any(runs for other, runs in enumerate(self.held) if other != replica)

    def lose(self, replica: int, steps: int) -> int:
        """A replica has died, of which so many steps more than are known of here have arrived elsewhere.

        What it held is leased to others. Returned: the steps that nobody can take, since their owner has no replica
        left; the run does without them.
        """
        self.arrived(replica, steps)
        held, owner = self.held[replica], self._owner[replica]
        self._to_lease += sum(map(_steps, held))
        self._left[owner].extendleft(reversed(held))
        held.clear()
        self._living[owner] -= 1
        if self._living[owner]:
            return 0
        gone = sum(map(_steps, (*self._left[owner], *self._before(self._epochs, owner))))
        self._left[owner].clear()
        self._next[owner] = (self._epochs, self._owned[owner].start)
        self._to_lease -= gone
        return gone

    def copy(self) -> "Ledger":
        """A ledger of its own, as this one is now."""
        return deepcopy(self)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: steps that were leased and haven't arrived, and what follows them."""
        held = [run for runs in (*self._left, *self.held) for run in runs]
        upto = self._next[0]
        if len(self._owned) > 1:  # owners that are behind others have whole lanes left
            upto = (
                max(epoch + (lane > own.start) for (epoch, lane), own in zip(self._next, self._owned, strict=True)),
                0,
            )
            held += [run for owner in range(len(self._owned)) for run in self._before(upto[0], owner)]
        left = sorted((run.epoch, run.lanes.start, run.first, run.last) for run in held)
        return {"next": list(upto), "left": [list(run) for run in left], "steps": self.steps}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from there: before any lease."""
        epoch, lane = state["next"]
        self._next = [(epoch, max(lane, owned.start)) for owned in self._owned]
        for run in state["left"]:
            owner = next(owner for owner, owned in enumerate(self._owned) if run[1] in owned)
            self._left[owner].append(_run(*run))
        self.steps = state["steps"]
        self._to_lease -= self.steps

    def _new(self, owner: int) -> Run:
        (epoch, lane), owned = self._next[owner], self._owned[owner]
        self._next[owner] = (epoch, lane + 1) if lane + 1 < owned.stop else (epoch + 1, owned.start)
        return _run(epoch, lane, 0, self._lanes[lane] - 1)

    def _before(self, end: int, owner: int) -> Iterator[Run]:
        """What an owner hasn't begun to lease of the epochs before `end`."""
        epoch, lane = self._next[owner]
        for number in range(epoch, end):
            for own in self._owned[owner]:
                if self._lanes[own] and (number, own) >= (epoch, lane):
                    yield _run(number, own, 0, self._lanes[own] - 1)


def _run(epoch: int, lane: int, first: int, last: int) -> Run:
    return Run(epoch, range(lane, lane + 1), first, last)


def _steps(run: Run) -> int:
    return run.last - run.first + 1
