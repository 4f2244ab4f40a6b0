"""The order of forward and backward over the micro-batches of a step, on each part."""

from collections.abc import Sequence
from typing import Literal

from dpnn.plan.messages import Message

Pipeline = Literal["1f1b", "gpipe", "sequence"]
"""`gpipe`: forward through all, then backward through all (Huang et al. 2019). `1f1b`: as early as possible backward,
so that few are in flight (Narayanan et al. 2019). `sequence`: one after the other, which grains need."""


def stages_of(parts: int, messages: Sequence[Message]) -> list[int]:
    """The stage of each part in the pipeline: parts that wait for one another within a forward pass are in one."""
    behind: list[set[int]] = [set() for _ in range(parts)]
    for message in messages:
        if not message.gradient:
            behind[message.source].add(message.target)
    reach = [_reach(behind, part) for part in range(parts)]
    level = [0] * parts
    # From stage to stage messages go forward only, so the longest way is found by as many rounds as there are parts.
    for _ in range(parts):
        for part in range(parts):
            for other in behind[part]:
                level[other] = max(level[other], level[part] + (part not in reach[other]))
    return level


def _reach(behind: Sequence[set[int]], part: int) -> set[int]:
    """The parts that messages from `part` lead to, itself only where they lead back."""
    found: set[int] = set()
    left = [part]
    while left:
        new = behind[left.pop()] - found
        found |= new
        left += new
    return found


def phases(
    stages: Sequence[int], part: int, microbatches: int, trains: bool, pipeline: Pipeline
) -> tuple[list[tuple[str, int]], int]:
    """The phases of a part, (direction, micro-batch), and how many micro-batches are in flight at once.

    Backward goes through the micro-batches in the order of forward, so that the first one assigns the gradients.
    """
    forward = [("forward", micro) for micro in range(microbatches)]
    backward = [("backward", micro) for micro in range(microbatches)]
    if not trains:
        return forward, 1
    ahead = {"1f1b": max(stages) - stages[part], "gpipe": microbatches - 1, "sequence": 0}[pipeline]
    if max(stages) == 0:
        ahead = 0  # nobody works while others wait
    ahead = min(ahead, microbatches - 1)
    order = forward[:ahead]
    for micro in range(microbatches - ahead):
        order += [forward[micro + ahead], backward[micro]]
    return order + backward[microbatches - ahead :], ahead + 1
