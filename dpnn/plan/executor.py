"""The loop that walks a plan's instructions.

Everything is bound while building: each instruction becomes one call without arguments. A step looks nothing up,
checks nothing and reserves nothing.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from dpnn.backends.base import Op, SplitOp, Step
from dpnn.data import Batch
from dpnn.memory import Wire
from dpnn.native import denormals_flushed
from dpnn.plan.instructions import (
    Backward,
    Collect,
    Collected,
    Compute,
    Finish,
    Forward,
    Instruction,
    Load,
    Loss,
    Open,
    PostRecv,
    Ready,
    Recv,
    Send,
    Sent,
    Weights,
)
from dpnn.plan.memory import Arena, Buffers, Key, Layout
from dpnn.plan.schedule import Plan
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


Call = Callable[[], object]


class Edges(Protocol):
    """Messages to and from the other parts of the replica (dpnn/comm/edges.py).

    `send` and `receive` give two calls: to start, and to wait until the buffer is free, or full.
    """

    def send(self, crew: tuple[int, ...], part: int, tag: int, buffer: Array, what: str) -> tuple[Call, Call]: ...
    def receive(self, crew: tuple[int, ...], part: int, tag: int, buffer: Array, what: str) -> tuple[Call, Call]: ...
    def poke(self) -> None: ...


class Executor:
    """One plan, bound to its memory: `run` takes one batch through it.

    `sum_over` makes a `Sum` of an array over the replicas. `strategy` may be missing in evaluation only;
    `eager`: it has something under way from the first instruction on, not only once gradients are ready. `edges` may
    be missing where the network lies on one part.
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
        edges: Edges | None = None,
    ) -> None:
        self.plan = plan = layout.plan
        self.memory = memory = arena.memory
        self.dtype = layout.dtype
        self.place = 0
        """Rises by one with every call of every step: what a watchdog reads."""
        self.loss = 0.0
        """This rank's share of the loss of the last step."""
        self._steps = [Step(seed=seed) for _ in range(plan.slots)]
        self._strategy, self._eager, self._edges = strategy, eager, edges
        self._batch: Batch | None = None
        self._counts: Sequence[tuple[int, int]] = ()
        self._sums: dict[tuple[Key, int], tuple[int, int]] = {}
        self._summed, collected = self._collected_arrays(plan)
        self._sum = sum_over(self._summed.buf) if sum_over and self._sums else None
        self._slots = [
            Buffers(layout, slot, arena, store, collected[slot], step) for slot, step in enumerate(self._steps)
        ]
        self._calls_of: dict[object, Call] = self._message_calls()
        graph, part, part_of = plan.graph, plan.part, plan.placed.part_of
        self.inputs: list[tuple[Wire, ...]] = []
        """Where images, labels and ids of a micro-batch lie, for each slot; empty on a part that doesn't read."""
        if part == plan.placed.reader:
            nodes = [graph.nodes[i] for i in (graph.images, graph.labels, graph.ids)]
            self.inputs = [tuple(memory.wire(slot.output(node)) for node in nodes) for slot in self._slots]
        losses = [graph.nodes[i] for i in graph.losses if part_of[i] == part]
        losses = [node for node in losses if plan.mode == "train" or not node.training_only]
        self._losses = [[slot.output(node) for node in losses] for slot in self._slots]
        self._ops: list[list[Op]] = [
            [group.backend.build(group, slot, plan.mode) for group in plan.groups] for slot in self._slots
        ]
        self._outputs = [[slot.output(group.nodes[-1]) for group in plan.groups] for slot in self._slots]
        self._results: list[Array] = []
        if part == plan.placed.writer:
            self._results = [self._slots[0].output(graph.nodes[node]) for node in (graph.output, layout.labels)]
        self._calls = self._bind()
        self._walked = 0
        """Calls of all steps so far."""

    @_QUIET
    def run(self, batch: Batch, counts: Sequence[tuple[int, int]], total: int) -> None:
        """One step over `batch`, of which a part that doesn't read wants the epoch only.

        `counts`: for each micro-batch (my rows, all replicas' rows); `total`: the sum that losses are divided by.
        """
        self._batch, self._counts = batch, counts
        for step in self._steps:
            step.epoch, step.total = batch.epoch, total
        self.loss = 0.0
        if self._strategy is not None:
            self._strategy.begin()
        with denormals_flushed():
            for place, call in enumerate(self._calls, self._walked):
                self.place = place
                call()
            self._walked += len(self._calls)
            for wires in self.inputs:
                for wire in wires:
                    wire.wait()  # the batch's memory may be written again

    @property
    def results(self) -> tuple[Array, Array] | None:
        """The network's output, (rows, classes), and the labels to it; None on a part that doesn't have them."""
        if not self._results:
            return None
        scores, labels = map(self.memory.read, self._results)
        return scores, labels

    def instruction(self) -> str:
        """The one that is being executed, for people. Any thread may ask."""
        return self.plan.words(self._instructions[self.place % len(self._calls)]) if self._calls else "nothing to do"

    @_QUIET
    def not_finite(self) -> str | None:
        """Go forward through the last batch again; the first node whose output isn't finite through this rank.

        Collective where outputs cross to other parts or are summed over the replicas, so it always goes to the end.
        None also where what isn't finite came from there: a rank that it came from names the node.
        """
        name, foreign = None, False
        for step, call in self._bound:
            match step:
                case Load():
                    call()
                case PostRecv(number, _) | Send(number, _) | Sent(number, _):
                    if not self.plan.messages[number].gradient:
                        call()
                case Recv(number, slot):
                    message = self.plan.messages[number]
                    if not message.gradient:
                        call()
                        received = self._slots[slot].output(self.plan.graph.nodes[message.node])
                        foreign = foreign or not self._finite(received, slot)
                case Collect(_, _, False):
                    call()
                case Collected(_, slot, False):
                    call()
                    lo, hi = self._sums[self._sum_key(step), slot]
                    foreign = foreign or not np.isfinite(self._summed.buf[lo:hi]).all()
                case Forward(group, slot):
                    call()
                    nodes, output = self.plan.groups[group].nodes, self._outputs[slot][group]
                    rows = None if nodes[-1].layer.batched else len(output) if output.ndim else None
                    if name is None and not foreign and not self._finite(output, slot, rows):
                        name = nodes[0].name
        return name

    def _finite(self, array: Array, slot: int, rows: int | None = None) -> bool:
        """Whether what the last micro-batch in a slot wrote into an array is finite."""
        written = array[: self._steps[slot].rows if rows is None else rows] if array.ndim else array
        return array.dtype.kind != "f" or bool(np.isfinite(self.memory.read(written)).all())

    def _collected_arrays(self, plan: Plan) -> tuple[Wire, list[dict[Key, Array]]]:
        """One flat array for all outputs and gradients that are summed over the replicas, and views of it by slot."""
        collects = dict.fromkeys(step for step in plan.instructions if isinstance(step, Collect))
        shapes = [(self._sum_key(step), step.slot, plan.graph.nodes[step.node].shape) for step in collects]
        flat = self.memory.lift(np.zeros(sum(math.prod(shape) for _, _, shape in shapes), np.float64))
        offset, views = 0, [dict[Key, Array]() for _ in range(plan.slots)]
        for key, slot, shape in shapes:
            end = offset + math.prod(shape)
            self._sums[key, slot] = (offset, end)
            views[slot][key] = flat.array[offset:end].reshape(shape)
            offset = end
        return flat, views

    def _sum_key(self, instruction: Collect | Collected) -> Key:
        if not instruction.gradient:
            return instruction.node, -1
        reader, position = self.plan.graph.readers(self.plan.graph.nodes[instruction.node])[0]
        return reader.index, position

    def _message_calls(self) -> dict[object, Call]:
        """What each instruction about a message does."""
        plan, calls = self.plan, dict[object, Call]()
        mine = [message for message in plan.messages if plan.part in (message.source, message.target)]
        edges = self._edges
        if edges is None:
            if mine:
                raise TypeError("a part of a network needs edges to the other parts")
            return calls
        for message in mine:
            for slot, buffers in enumerate(self._slots):
                # Slots are taken in turn on both parts, and MPI keeps the order: the number alone is the tag.
                number, wire = message.number, self.memory.wire(buffers.message(message))
                buffer, what = wire.buf, plan.content(message)
                if message.source == plan.part:
                    start, end = edges.send(message.crew, message.target, number, buffer, what)
                    calls |= {Send(number, slot): _all(wire.pull, wire.wait, start), Sent(number, slot): end}
                else:
                    start, end = edges.receive(message.crew, message.source, number, buffer, what)
                    calls |= {PostRecv(number, slot): _all(wire.wait, start), Recv(number, slot): _all(end, wire.push)}
        return calls

    def _bind(self) -> list[Call]:
        self._bound: list[tuple[object, Call]] = []
        self._instructions: list[Instruction] = []
        """The one that each call belongs to."""
        calls: list[Call] = []
        under_way = self._eager
        for step in self.plan.instructions:
            call = self._call(step)
            self._bound.append((step, call))
            calls.append(call)
            under_way = under_way or isinstance(step, Ready | Collect)
            if under_way and isinstance(step, Compute) and self._strategy is not None:
                calls.append(self._strategy.poke)
            if self._calls_of and self._edges is not None and isinstance(step, Compute):
                calls.append(self._edges.poke)
            self._instructions += [step] * (len(calls) - len(self._instructions))
        return calls

    def _call(self, step: object) -> Call:
        strategy = self._strategy
        match step:
            case Load(micro, slot):
                return partial(self._load, micro, slot)
            case Forward(group, slot):
                return self._ops[slot][group].forward
            case Backward(group, slot):
                return self._ops[slot][group].backward
            case Weights(group, slot):
                return cast(SplitOp, self._ops[slot][group]).weights
            case PostRecv() | Recv() | Send() | Sent():
                return self._calls_of[step]
            case Loss(slot, last):
                return partial(self._add_losses, slot, last)
            case Collect(_, slot, _) if self._sum is not None:
                lo, hi = self._sums[self._sum_key(step), slot]
                wire = self._summed
                return _all(partial(wire.pull, lo, hi), wire.wait, partial(self._sum.start, lo, hi))
            case Collected(_, slot, _) if self._sum is not None:
                return _all(self._sum.finish, partial(self._summed.push, *self._sums[self._sum_key(step), slot]))
            case Open(lo, hi) if strategy is not None:
                return partial(strategy.open, lo, hi)
            case Ready(lo, hi) if strategy is not None:
                return partial(strategy.ready, lo, hi)
            case Finish() if strategy is not None:
                return strategy.finish
        raise TypeError(f"{step} needs a strategy and a sum over the replicas")

    def _load(self, micro: int, slot: int) -> None:
        batch, step = self._batch, self._steps[slot]
        step.rows, step.batch = self._counts[micro]
        step.first = micro == 0 or self.plan.grains
        step.last = micro == len(self._counts) - 1 or self.plan.grains
        step.before = lo = sum(rows for rows, _ in self._counts[:micro])
        if batch is None or not self.inputs:
            return
        hi = lo + step.rows
        for wire, values in zip(self.inputs[slot], (batch.x, batch.labels, batch.ids), strict=True):
            wire.load(values[lo:hi])

    def _add_losses(self, slot: int, last: bool) -> None:
        for loss in self._losses[slot]:
            self.loss += float(self.memory.read(loss))
        if last and self._strategy is not None:
            self._strategy.tell(self.loss)


def _all(*calls: Call) -> Call:
    """The calls as one."""

    def run() -> None:
        for call in calls:
            call()

    return run
