"""The loop that walks a plan's instructions.

Everything is bound while building: each instruction becomes one call without arguments. A step looks nothing up,
checks nothing and reserves nothing.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpnn.backends.base import Op, Step
from dpnn.data import Batch
from dpnn.native import denormals_flushed
from dpnn.plan.memory import Arena, Buffers, Key, Layout
from dpnn.plan.schedule import Backward, Collect, Collected, Finish, Forward, Load, Loss, Open, Plan, Ready
from dpnn.plan.store import Store

Array = NDArray[Any]

# The loss tells what isn't finite, on all ranks at once; NumPy would on each, and in its own words.
_QUIET = np.errstate(over="ignore", invalid="ignore", divide="ignore")


class Strategy(Protocol):
    """What the executor tells of a step, and when (DESIGN, section 6)."""

    def begin(self) -> None:
        """A step begins."""
        ...

    def open(self, lo: int, hi: int) -> None:
        """From here on grads[lo:hi] is written."""
        ...

    def ready(self, lo: int, hi: int) -> None:
        """grads[lo:hi] is complete."""
        ...

    def poke(self) -> None:
        """MPI makes no progress by itself: called between instructions while an exchange is under way."""
        ...

    def tell(self, loss: float) -> None:
        """This rank's share of the step's loss is known."""
        ...

    def finish(self) -> None:
        """All gradients are ready: complete the exchange and update the parameters."""
        ...


class Sum(Protocol):
    """A sum over the replicas, in place, of slices of the array that it was made for."""

    def start(self, lo: int, hi: int) -> None: ...
    def finish(self) -> None: ...


class Executor:
    """One plan, bound to its memory: `run` takes one batch through it.

    `sum_over` makes a `Sum` of an array over the replicas. `strategy` may be missing in evaluation only;
    `eager`: it has something under way from the first instruction on, not only once gradients are ready.
    """

    def __init__(
        self,
        layout: Layout,
        store: Store,
        arena: Arena,
        seed: int,
        sum_over: Callable[[Array], Sum] | None = None,
        strategy: Strategy | None = None,
        eager: bool = False,
    ) -> None:
        self.plan = plan = layout.plan
        self.dtype = layout.dtype
        self.place = 0
        """Number of the instruction that is being executed: what a post-mortem reads."""
        self.loss = 0.0
        """This rank's share of the loss of the last step."""
        self._step = Step(seed=seed)
        self._strategy, self._eager = strategy, eager
        self._batch: Batch | None = None
        self._counts: Sequence[tuple[int, int]] = ()
        self._sums: dict[Key, tuple[int, int]] = {}
        self._summed, collected = self._collected_arrays(plan)
        self._sum = sum_over(self._summed) if sum_over and self._sums else None
        buffers = Buffers(layout, arena, store, collected, self._step)
        graph = plan.graph
        self.inputs = tuple(buffers.output(graph.nodes[i]) for i in (graph.images, graph.labels, graph.ids))
        """Where images, labels and ids of a micro-batch lie."""
        losses = [graph.nodes[i] for i in graph.losses if plan.mode == "train" or not graph.nodes[i].training_only]
        self._losses = [buffers.output(node) for node in losses]
        self._ops: list[Op] = [group.backend.build(group, buffers, plan.mode) for group in plan.groups]
        self._outputs = [buffers.output(group.nodes[-1]) for group in plan.groups]
        self.scores = buffers.output(graph.nodes[graph.output])
        """The network's output, (rows, classes)."""
        self.labels = self.inputs[1]
        self._calls = list(self._bind())

    @_QUIET
    def run(self, batch: Batch, counts: Sequence[tuple[int, int]], total: int) -> None:
        """One step over `batch`; `counts`: for each micro-batch (my rows, all replicas' rows); `total`: their sum."""
        self._batch, self._counts = batch, counts
        self._step.epoch, self._step.total = batch.epoch, total
        self.loss = 0.0
        if self._strategy is not None:
            self._strategy.begin()
        with denormals_flushed():
            for place, call in enumerate(self._calls):
                self.place = place
                call()

    @_QUIET
    def not_finite(self) -> str | None:
        """Go through the last batch again; the name of the first node whose output isn't finite through this rank.

        Collective where outputs are summed over the replicas, so it always goes to the end. None also where what isn't
        finite came with such a sum: a rank that it came from names the node.
        """
        name, foreign = None, False
        for load in [call for step, call in self._bound if isinstance(step, Load)]:
            load()
            for step, call in self._bound:
                if isinstance(step, Forward | Collect | Collected) and not getattr(step, "gradient", False):
                    call()
                if isinstance(step, Forward) and name is None and not foreign:
                    nodes = self.plan.groups[step.group].nodes
                    output = self._outputs[step.group]
                    if not np.isfinite(output[: self._step.rows] if nodes[-1].layer.batched else output).all():
                        name = nodes[0].name
                elif isinstance(step, Collected) and not step.gradient:
                    foreign = foreign or not np.isfinite(self._summed[slice(*self._sums[self._sum_key(step)])]).all()
        return name

    def _collected_arrays(self, plan: Plan) -> tuple[Array, dict[Key, Array]]:
        """One flat array for all outputs and gradients that are summed over the replicas, and views of it."""
        wanted: list[tuple[Key, tuple[int, ...]]] = []
        for instruction in plan.instructions:
            if isinstance(instruction, Collect):
                node = plan.graph.nodes[instruction.node]
                key = self._sum_key(instruction)
                if key not in dict(wanted):
                    wanted.append((key, node.shape))
        flat = np.zeros(sum(math.prod(shape) for _, shape in wanted), np.float64)
        offset, views = 0, {}
        for key, shape in wanted:
            end = offset + math.prod(shape)
            self._sums[key] = (offset, end)
            views[key] = flat[offset:end].reshape(shape)
            offset = end
        return flat, views

    def _sum_key(self, instruction: Collect | Collected) -> Key:
        if not instruction.gradient:
            return instruction.node, -1
        reader, position = self.plan.graph.readers(self.plan.graph.nodes[instruction.node])[0]
        return reader.index, position

    def _bind(self) -> list[Callable[[], None]]:
        self._bound: list[tuple[object, Callable[[], None]]] = []
        calls: list[Callable[[], None]] = []
        under_way = self._eager
        for step in self.plan.instructions:
            call = self._call(step)
            self._bound.append((step, call))
            calls.append(call)
            under_way = under_way or isinstance(step, Ready | Collect)
            if under_way and isinstance(step, Forward | Backward) and self._strategy is not None:
                calls.append(self._strategy.poke)
        return calls

    def _call(self, step: object) -> Callable[[], None]:
        strategy = self._strategy
        match step:
            case Load(micro, _):
                return partial(self._load, micro)
            case Forward(group, _):
                return self._ops[group].forward
            case Backward(group, _):
                return self._ops[group].backward
            case Loss(_, last):
                return partial(self._add_losses, last)
            case Collect() if self._sum is not None:
                return partial(self._sum.start, *self._sums[self._sum_key(step)])
            case Collected() if self._sum is not None:
                return self._sum.finish
            case Open(lo, hi) if strategy is not None:
                return partial(strategy.open, lo, hi)
            case Ready(lo, hi) if strategy is not None:
                return partial(strategy.ready, lo, hi)
            case Finish() if strategy is not None:
                return strategy.finish
        raise TypeError(f"{step} needs a strategy and a sum over the replicas")

    def _load(self, micro: int) -> None:
        batch, step = self._batch, self._step
        if batch is None:
            return
        step.rows, step.batch = self._counts[micro]
        step.first = micro == 0 or self.plan.grains
        lo = sum(rows for rows, _ in self._counts[:micro])
        hi = lo + step.rows
        images, labels, ids = self.inputs
        images[: step.rows] = batch.x[lo:hi]
        labels[: step.rows] = batch.labels[lo:hi]
        ids[: step.rows] = batch.ids[lo:hi]

    def _add_losses(self, last: bool) -> None:
        for loss in self._losses:
            self.loss += float(loss)
        if last and self._strategy is not None:
            self._strategy.tell(self.loss)
