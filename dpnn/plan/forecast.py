"""What a placement would bring: the step of all parts, compiled and gone through with costs; nothing is computed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dpnn.backends.base import Backend
from dpnn.nn.graph import Graph
from dpnn.plan.costs import Costs
from dpnn.plan.instructions import Backward, Finish, Forward, Instruction, Weights
from dpnn.plan.memory import Layout, message_nbytes
from dpnn.plan.pipeline import Pipeline
from dpnn.plan.placement import Loads, Placement
from dpnn.plan.schedule import Plan, choose_groups, compile_plan
from dpnn.plan.simulate import Timing, simulate
from dpnn.plan.spread import Placed, spread
from dpnn.plan.store import lay


@dataclass(frozen=True)
class Setting:
    """A placement, and in how many micro-batches a step goes through it."""

    placement: Placement
    microbatches: int


@dataclass(frozen=True)
class Forecast:
    """A setting and what it would bring."""

    setting: Setting
    placed: Placed
    plans: tuple[Plan, ...]
    """Of each part."""
    timing: Timing
    params: tuple[int, ...]
    """Numbers that each part holds."""
    nbytes: tuple[int, ...]
    """Of each part: parameters, gradients, what the optimizer keeps, the copy that checkpoints are written from, and
    all arrays between."""

    def message_nbytes(self, number: int) -> int:
        """Of a message of one micro-batch."""
        return message_nbytes(self.plans[0], number)


class Forecaster:
    """Forecasts for one network on one kind of rank; `rows`: the most samples of a replica's step.

    `held`: how many numbers a rank has for each parameter; None: itself, its gradient, and the optimizer's `states`.
    """

    def __init__(
        self,
        graph: Graph,
        backends: Sequence[Backend],
        rows: int,
        states: int,
        costs: Costs,
        pipeline: Pipeline = "1f1b",
        held: float | None = None,
    ) -> None:
        self.graph, self.rows, self.costs = graph, rows, costs
        self._backends, self._pipeline = backends, pipeline
        self._held = 2 + states if held is None else held
        self.groups = choose_groups(graph.nodes, backends, "train")
        """Those of the whole network on one part."""

    def loads(self, microbatches: int) -> Loads:
        """The work of nodes in a micro-batch."""
        graph, rows = self.graph, -(-self.rows // microbatches)
        work, crossing = np.zeros(len(graph.nodes)), np.zeros(len(graph.nodes))
        for group in self.groups:
            work[group.nodes[0].index] = sum(self.costs.group(group, rows, microbatches))
        for node in graph.nodes:
            nbytes = math.prod(node.shape) * self._backends[0].dtype.itemsize * (rows if node.layer.batched else 1)
            crossing[node.index] = self.costs.message(nbytes) * (1 + node.needs_grad)
        return Loads(work, crossing, [[node.index for node in group.nodes] for group in self.groups])

    def microbatches(self) -> list[int]:
        """The numbers of micro-batches that are worth a look."""
        return [2**i for i in range(6) if 2**i <= self.rows]

    def look(self, setting: Setting) -> Forecast:
        """What a setting would bring."""
        placed = spread(self.graph, setting.placement)
        rows = -(-self.rows // setting.microbatches)
        compiled = partial(
            compile_plan, placed, backends=self._backends, mode="train", rows=rows, pipeline=self._pipeline,
            microbatches=setting.microbatches, bucket_nbytes=2**62,
        )  # fmt: skip
        pieces = [lay(placed.nodes(part)) for part in range(placed.parts)]
        plans = tuple(compiled(part=part, pieces=held) for part, held in enumerate(pieces))
        params = tuple(held[-1].end if held else 0 for held in pieces)

        times = [[self.costs.group(group, rows, setting.microbatches) for group in plan.groups] for plan in plans]

        def seconds(plan: Plan, step: Instruction) -> float:
            match step:
                case Forward(group, _):
                    return times[plan.part][group].forward
                case Backward(group, _):
                    return times[plan.part][group].backward
                case Weights(group, _):
                    return times[plan.part][group].weights
                case Finish():
                    return self.costs.update(params[plan.part])
            return 0.0

        timing = simulate(plans, seconds, self.costs.message, message_nbytes)
        each = self._held * self._backends[0].dtype.itemsize
        nbytes = tuple(
            Layout(plan, rooms=False).nbytes + math.ceil(n * each) for plan, n in zip(plans, params, strict=True)
        )
        return Forecast(setting, placed, plans, timing, params, nbytes)
