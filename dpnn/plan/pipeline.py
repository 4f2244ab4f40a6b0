"""Which part works on which micro-batch when: one order of the whole step, of which each part follows its own tasks.

A task is a run of nodes of one part that need nothing from other parts in between, forward or backward through one
micro-batch: its nodes have the same `level`, the number of times that the longest way to them has changed parts. A
network cut in depth has one task a stage; one whose branches are spread has several on each part, and while one
micro-batch waits for another part, the next one is worked on. The order is that of a list schedule with assumed costs,
so every rank finds the same one by itself.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from dpnn.nn.join import Fork
from dpnn.plan.costs import Costs
from dpnn.plan.spread import Placed

Pipeline = Literal["1f1b", "gpipe", "sequence"]
"""`1f1b`: backward early, so that few micro-batches are in flight (Narayanan et al. 2019; here one more). `gpipe`:
forward through all, then backward through all (Huang et al. 2019). `sequence`: one after the other."""


@dataclass(frozen=True, order=True)
class Task:
    """Forward or backward through the nodes of a level, of micro-batch `micro`."""

    micro: int
    backward: bool
    level: int


@dataclass
class _Segment:
    """The nodes of a part that have one level."""

    forward: float = 0.0
    backward: float = 0.0
    trained: bool = False
    after: set[tuple[int, int]] = field(default_factory=set)
    """The segments, (part, level), whose outputs it reads."""
    gradients: set[tuple[int, int]] = field(default_factory=set)
    """Those that give it gradients."""


@lru_cache(maxsize=8)
def levels_of(placed: Placed) -> list[int]:
    """The level of each node; read only. What only passes data on (labels, sample ids) is where that is first read."""
    graph, part_of, levels = placed.graph, placed.part_of, list[int]()
    for node in graph.nodes:
        own = part_of[node.index]
        levels.append(max((levels[i] + (part_of[i] != own) for i in node.inputs), default=0))
    for node in reversed(graph.nodes):
        if isinstance(node.layer, Fork) and not node.needs_grad:
            own = part_of[node.index]
            levels[node.index] = min(levels[r.index] - (part_of[r.index] != own) for r, _ in graph.readers(node))
    return levels


@lru_cache(maxsize=8)
def order_of(placed: Placed, microbatches: int, trains: bool, pipeline: Pipeline) -> tuple[list[list[Task]], list[int]]:
    """The tasks of each part in their order, and how many micro-batches it has in flight at once; read only."""
    segments = _segments(placed, trains)
    slots = _slots(placed.parts, segments, microbatches, pipeline if trains else "sequence")
    plain = len({part for part, _ in segments}) == len(segments)
    orders: list[list[Task]] = [[] for _ in range(placed.parts)]
    schedule = _Schedule(segments, slots, full=plain or pipeline == "gpipe")
    for micro in range(microbatches):
        schedule.add(micro, microbatches)
    for part, task in schedule.run():
        orders[part].append(task)
    return orders, slots


def _segments(placed: Placed, trains: bool) -> dict[tuple[int, int], _Segment]:
    part_of, levels, costs = placed.part_of, levels_of(placed), Costs()
    segments: dict[tuple[int, int], _Segment] = defaultdict(_Segment)
    for part in set(range(placed.parts)) - set(part_of):
        segments[part, 0] = _Segment()
    for node in placed.graph.nodes:
        own = part_of[node.index], levels[node.index]
        segment = segments[own]
        phases = costs.phases(node)
        segment.forward += phases.forward
        if not trains and node.training_only:
            continue
        for source in node.inputs:
            other = part_of[source], levels[source]
            if other != own:
                segment.after.add(other)
        if trains and node.needs_grad:
            segment.trained = True
            segment.backward += phases.backward + phases.weights
            for source in node.inputs:
                other = part_of[source], levels[source]
                if other != own and placed.graph.nodes[source].needs_grad:
                    segments[other].gradients.add(own)
    return dict(segments)


def _slots(parts: int, segments: dict[tuple[int, int], _Segment], microbatches: int, pipeline: Pipeline) -> list[int]:
    """For each part: itself and all parts that come behind it can each have a micro-batch, and one may be between them:
    else a part waits for its first gradient while those behind it make it (as ZB-H2 of Qi et al. 2023).

    Where a micro-batch comes to a part several times, on its way forward and back, twice as many.
    """
    if pipeline == "sequence":
        return [1] * parts
    if pipeline == "gpipe":
        return [microbatches if parts > 1 else 1] * parts
    behind: list[set[int]] = [set() for _ in range(parts)]
    for (part, _), segment in segments.items():
        for source, _ in segment.after:
            behind[source].add(part)
    visits = Counter(part for part, _ in segments)
    reached = [len(_reach(behind, part)) for part in range(parts)]
    wanted = [2 * n if visits[part] > 1 else n + (n > 1) for part, n in enumerate(reached)]
    return [min(microbatches, n) for n in wanted]


def _reach(behind: Sequence[set[int]], part: int) -> set[int]:
    """The part and all parts that its outputs lead to."""
    found, left = {part}, [part]
    while left:
        new = behind[left.pop()] - found
        found |= new
        left += new
    return found


class _Schedule:
    """A list schedule: whoever can begin first begins, with what comes first in its order of preference."""

    def __init__(self, segments: dict[tuple[int, int], _Segment], slots: Sequence[int], full: bool) -> None:
        """`full`: backward waits until all slots are taken."""
        self._segments, self._slots = segments, slots
        self._full = full
        self._missing: dict[tuple[int, Task], int] = {}
        self._followers: dict[tuple[int, Task], list[tuple[int, Task]]] = defaultdict(list)
        self._ready: list[dict[Task, float]] = [{} for _ in slots]
        self._left: dict[tuple[int, int], int] = defaultdict(int)
        """Tasks of (part, micro-batch) that aren't done."""

    def add(self, micro: int, microbatches: int) -> None:
        """The tasks of a micro-batch; in their order.

        In a plain pipeline (one segment a part) backward waits until all slots are taken: were it assumed costs that
        decide, a part whose neighbours are faster than assumed would go backward too early, and keep them waiting for
        its forward.
        """
        for (part, level), segment in self._segments.items():
            needs = [(other, Task(micro, False, below)) for other, below in segment.after]
            if micro:
                needs.append((part, Task(micro - 1, False, level)))
            self._need(part, Task(micro, False, level), needs)
            if segment.trained:
                needs = [(other, Task(micro, True, above)) for other, above in segment.gradients]
                last = min(micro + self._slots[part], microbatches) - 1 if self._full else micro
                needs += [(part, Task(last, False, own)) for other, own in self._segments if other == part]
                if micro:
                    needs.append((part, Task(micro - 1, True, level)))
                self._need(part, Task(micro, True, level), needs)

    def _need(self, part: int, task: Task, needs: list[tuple[int, Task]]) -> None:
        self._left[part, task.micro] += 1
        self._missing[part, task] = len(needs)
        for need in needs:
            self._followers[need].append((part, task))
        if not needs:
            self._ready[part][task] = 0.0

    def run(self) -> list[tuple[int, Task]]:
        """All tasks in the order of their beginnings."""
        free, order = [0.0] * len(self._slots), list[tuple[int, Task]]()
        while True:
            first: tuple[float, tuple[object, ...], int, Task] | None = None
            for part, ready in enumerate(self._ready):
                for task, since in ready.items():
                    if self._left.get((part, task.micro - self._slots[part]), 0):
                        continue  # its slot is taken
                    found = max(free[part], since), self._preference(task), part, task
                    first = found if first is None or found[:3] < first[:3] else first
            if first is None:
                return order
            begin, _, part, task = first
            del self._ready[part][task]
            segment = self._segments[part, task.level]
            free[part] = end = begin + (segment.backward if task.backward else segment.forward)
            order.append((part, task))
            self._left[part, task.micro] -= 1
            for other, follower in self._followers[part, task]:
                self._missing[other, follower] -= 1
                if not self._missing[other, follower]:
                    self._ready[other][follower] = end

    def _preference(self, task: Task) -> tuple[object, ...]:
        return not task.backward, task.micro, -task.level
