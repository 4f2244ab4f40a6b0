"""What every strategy has beside the calls of the executor (`plan.Strategy`)."""

from typing import NamedTuple, Protocol

from dpnn import plan


class Since(NamedTuple):
    """What a replica has done since all had the same parameters."""

    steps: int = 0
    samples: int = 0
    """Of this replica."""
    averages: int = 0
    """How often that has been so."""


NEVER = Since()


class Strategy(plan.Strategy, Protocol):
    """A strategy as the training loop sees it."""

    together: bool
    """Whether all replicas have the same parameters after every step."""
    rate: float
    """The learning rate of the step; set before it."""
    samples: int
    """Of this replica in the step; set before it."""
    skipped: int
    """Bad samples that this rank has skipped in the step; set before it."""
    bad_samples: int
    """Those that all ranks have skipped, as far as they have told one another."""
    stop: bool
    """Before a step: this rank wants to stop. After it: some rank did, and all know."""
    sums_by: str
    """By which way gradients on devices are summed over the replicas; empty on the host."""
    loss: float
    """After a step: its loss over all replicas."""
    wait_s: float
    """Seconds spent waiting for other ranks in the last step."""
    update_s: float
    """Seconds spent updating the parameters in the last step."""
    steps: int
    """Steps whose updates have ended, since it was made."""
    since: Since
    """May be set before the first step, and is then what came before."""
    alone: bool
    """Whether steps are taken while other replicas take none."""

    def close(self) -> None:
        """The run has taken its last step; `bad_samples` is now of all steps. Collective."""
        ...

    def meet(self) -> None:
        """After steps that were taken alone: all have the same number of them behind them. Collective."""
        ...

    def gather(self) -> None:
        """Between two steps: until `release` the parameters are what all replicas have in common. Collective."""
        ...

    def release(self) -> None:
        """The parameters aren't read any more, the run goes on."""
        ...

    def leave(self) -> None:
        """A rank has died, and nothing goes on here; what was under way is given up. Not collective."""
        ...

    def held(self) -> tuple[int, int]:
        """After `leave`: the steps that the parameters have surely behind them, as `steps`, and the averages."""
        ...

    def go_back(self, steps: int, averages: int) -> Since:
        """After `leave`: the parameters, and what the optimizer keeps, as after so many steps, at most one less than in
        `held`, and averages.
        """
        ...
