"""Which ranks go on together where others have died, and from which step: decided on all alike, from what all tell.

Replicas that always have the same parameters (allreduce) are put together of any parts that are left. All go back to
the last step that all have ended: they are apart by one at most. Replicas with parameters of their own (average) stay
what they are; one that has lost a part is lost. They may be several steps apart: all go on from the step of the first,
once those behind have caught up.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dpnn.errors import RankError


class Told(NamedTuple):
    """What a rank tells of where it stands."""

    number: int
    """Of the rank, when the job started."""
    part: int
    home: int
    """The replica that it is of, by the number of that one's first rank."""
    stands: bool
    """Whether it has parameters."""
    steps: int
    """Of the run, which these surely have behind them."""
    averages: int = 0
    """That its part of the replica has ended."""
    bad_samples: int = 0


class Regrouped(NamedTuple):
    """What comes of it. Ranks are numbered by their places in what was told."""

    replicas: list[list[int]]
    """The ranks of each, part by part."""
    steps: int
    """All go on from this step."""
    back: dict[int, tuple[int, int]]
    """Whose parameters are of use, and the steps and averages after which they are."""
    ahead: int | None = None
    """The new replica whose parameters those take that have fewer averages behind them; None: none has."""
    homes: tuple[int, ...] = ()
    """The replicas that stay what they were, as in `Told.home`."""

    @property
    def places(self) -> list[int]:
        """The ranks that go on, in their order."""
        return [rank for replica in self.replicas for rank in replica]


def together(told: Sequence[Told], parts: int, grains: int) -> Regrouped:
    """Replicas that are alike. `grains`: they divide these; 0: there are none. RankError where none is left."""
    ranks = [[rank for rank, one in enumerate(told) if one.part == part] for part in range(parts)]
    most = min(map(len, ranks))
    if most == 0:
        raise RankError(f"no rank is left of part {ranks.index([])} of {parts}; go on with --resume")
    count = max(n for n in range(1, most + 1) if grains % n == 0)
    replicas = [[ranks[part][replica] for part in range(parts)] for replica in range(count)]
    steps = min(one.steps for one in told)
    return Regrouped(replicas, steps, dict.fromkeys(replicas[0], (steps, 0)))


def apart(told: Sequence[Told], parts: int) -> Regrouped:
    """Replicas with parameters of their own. RankError where none is whole."""
    ranks: dict[int, list[int]] = {}
    for rank, one in sorted(enumerate(told), key=lambda pair: pair[1].part):
        ranks.setdefault(one.home, []).append(rank)
    homes = tuple(sorted(home for home, found in ranks.items() if len(found) == parts))
    whole = [ranks[home] for home in homes]
    if not whole:
        raise RankError(f"no replica is left that has all its {parts} parts; go on with --resume")
    ends = [min((told[rank].steps, told[rank].averages) for rank in found) for found in whole]
    back = {rank: end for found, end in zip(whole, ends, strict=True) for rank in found}
    averages = [count for _, count in ends]
    ahead = averages.index(max(averages)) if min(averages) < max(averages) else None
    return Regrouped(whole, max(steps for steps, _ in ends), back, ahead, homes)
