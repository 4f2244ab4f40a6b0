"""The steps of a synchronous run: where each stands in its epoch, and which samples it has."""

from collections.abc import Sequence
from typing import NamedTuple

from dpnn.data import Sampler


class Lanes(NamedTuple):
    """Whose samples a replica takes."""

    sampler: Sampler
    replica: int
    homes: Sequence[int]
    """The number of the first rank of each replica, this one's own among them."""

    def counts(self, step: int, microbatches: int) -> list[tuple[int, int]]:
        """For each micro-batch of an epoch's step: (samples of this replica, samples of all replicas)."""
        return self.sampler.micro(step, self.replica, len(self.homes), microbatches)

    def rows(self, steps: Sequence[tuple[int, int]]) -> int:
        """Samples of this replica in some steps, each (epoch, step of it)."""
        return sum(mine for _, step in steps for mine, _ in self.counts(step, 1))


class Timetable:
    """Steps count from the start of the run; that after `steps` of them is number `step` of an epoch.

    `epochs`: that the run has; 0: it has `most` steps.
    """

    def __init__(self, sampler: Sampler, steps: int, epoch: int, step: int, epochs: int, most: int) -> None:
        self.sampler, self._begun = sampler, steps
        self._shift = epoch * sampler.steps + step - steps
        """A run that was resumed with another batch took other steps before."""
        self.end = max(epochs * sampler.steps - self._shift if epochs else most, steps)
        """Steps of the whole run."""

    def at(self, steps: int) -> int:
        """Steps of today's size from the first epoch on."""
        return self._shift + steps

    def place(self, steps: int) -> tuple[int, int]:
        """The epoch, and the step in it, that follow on so many steps."""
        return divmod(self._shift + steps, self.sampler.steps)

    def places(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Those of the steps from one to another."""
        return [self.place(steps) for steps in range(begin, end)]

    def samples(self, steps: int) -> int:
        """Samples of all replicas, from where the timetable begins to there."""
        return sum(self.sampler.total(step) for _, step in self.places(self._begun, steps))
