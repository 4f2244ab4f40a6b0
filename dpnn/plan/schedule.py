"""The instructions of one step, as data: printable, and checked without MPI.

A part's list is put together of tasks: forward or backward through some of its nodes and one micro-batch. Which task
comes when is one order of the whole step (`plan/pipeline.py`), so nothing can deadlock. Around what is computed stands
what is exchanged, put in by one rule each:

- a message from another part is received right before the first group that reads it, and sent off right after the
  group that wrote it. Its buffer is there early: receives are posted when the step begins, and when a slot is taken
  anew; before that what the slot sent must have left it.
- an output that is summed over all replicas (`collected`) is sent off right after it was written, and waited for
  right before it is read; its gradient likewise.
- what makes gradients of weights, on which no other rank waits, stands behind the last gradient that the task sends to
  another part, or else right behind the backward that it belongs to: so the other part waits for less (Qi et al. 2023,
  section 2).
- a bucket of gradients is opened before the first instruction of the step that writes into it, and ready after the
  last one (so in the last micro-batch only; where micro-batches are grains, in each);

Every rank of one part has the same list, so nothing is negotiated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpnn.backends.base import Backend, Group, Mode
from dpnn.errors import JobError
from dpnn.nn.graph import Graph, Node
from dpnn.nn.layer import Input
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
from dpnn.plan.messages import Message, messages_of
from dpnn.plan.pipeline import Pipeline, Task, levels_of, order_of
from dpnn.plan.spread import Placed
from dpnn.plan.store import Piece


@dataclass(frozen=True)
class Plan:
    """What one rank does in a step: groups of nodes, and the instructions over them."""

    placed: Placed
    part: int
    mode: Mode
    groups: tuple[Group, ...]
    messages: tuple[Message, ...]
    """Those of all parts, by number."""
    instructions: tuple[Instruction, ...]
    rows: int
    """The most samples that a micro-batch of this rank can have."""
    dtype: np.dtype[Any]
    """What its activations are computed in."""
    levels: tuple[int, ...]
    """Of the groups: those of one level are a task (plan/pipeline.py)."""
    slots: int = 1
    """Micro-batches that are in flight at once."""
    grains: bool = False
    """Whether each micro-batch is a grain: it assigns the gradients, and they are ready after each."""
    channels_last: bool = False
    """Whether images lie as NHWC in memory."""

    @property
    def graph(self) -> Graph:
        """The network as it is placed."""
        return self.placed.graph

    def content(self, message: Message) -> str:
        """What a message carries, for people."""
        name = self.graph.nodes[message.node].name
        return f"the gradient by {name}" if message.gradient else f"the output of {name}"

    def words(self, instruction: Instruction) -> str:
        """An instruction, for people who know the network, not the plan."""
        kind, nodes = type(instruction).__name__, self.graph.nodes
        match instruction:
            case Forward(group, _) | Backward(group, _) | Weights(group, _):
                return f"{kind} {' + '.join(node.name for node in self.groups[group].nodes)}"
            case Collect(node, _, gradient) | Collected(node, _, gradient):
                return f"{kind} the {'gradient by' if gradient else 'output of'} {nodes[node].name} over the replicas"
            case PostRecv(number, _) | Recv(number, _):
                message = self.messages[number]
                return f"{kind} {self.content(message)} from part {message.source}"
            case Send(number, _) | Sent(number, _):
                message = self.messages[number]
                return f"{kind} {self.content(message)} to part {message.target}"
            case Load(micro, _):
                return f"{kind} micro-batch {micro + 1}"
            case Open(lo, hi) | Ready(lo, hi):
                return f"{kind} gradients {lo:,} to {hi:,}"
            case _:
                return kind

    def __str__(self) -> str:
        names = [" + ".join(node.name for node in group.nodes) for group in self.groups]
        nodes = self.graph.nodes
        lines = []
        for instruction in self.instructions:
            match instruction:
                case Forward(group, _) | Backward(group, _) | Weights(group, _):
                    lines.append(f"{instruction}  {names[group]}")
                case Collect(node, _, _) | Collected(node, _, _):
                    lines.append(f"{instruction}  {nodes[node].name}")
                case PostRecv(number, _) | Recv(number, _) | Send(number, _) | Sent(number, _):
                    message = self.messages[number]
                    what = "gradient by " if message.gradient else ""
                    other = message.source if message.target == self.part else message.target
                    lines.append(f"{instruction}  {what}{nodes[message.node].name}, part {other}")
                case _:
                    lines.append(str(instruction))
        return "\n".join(lines)


def compile_plan(
    placed: Placed,
    part: int,
    backends: Sequence[Backend],
    mode: Mode,
    rows: int,
    microbatches: int = 1,
    pieces: Sequence[Piece] = (),
    bucket_nbytes: int = 0,
    grains: bool = False,
    pipeline: Pipeline = "1f1b",
) -> Plan:
    """The plan of a rank that computes one part of a placed network.

    `rows`: the most samples of a micro-batch. `pieces`: what its store holds (training only). `bucket_nbytes`: a
    bucket is closed when it is at least so large. `grains`: buckets are exchanged after every micro-batch.
    """
    wanted = [node for node in placed.nodes(part) if not (mode == "eval" and node.training_only)]
    groups = choose_groups(wanted, backends, mode)
    messages = messages_of(placed, mode)
    orders, slots = order_of(placed, microbatches, mode == "train", "sequence" if grains else pipeline)
    levels_of_nodes = levels_of(placed)
    levels = [levels_of_nodes[group.nodes[-1].index] for group in groups]
    lists = _Lists(placed, part, groups, levels, messages, mode, microbatches)
    passes = lists.passes(orders[part], slots[part], grains)
    if mode == "train":
        buckets = make_buckets(pieces, bucket_nbytes, backends[0].dtype.itemsize)
        passes = [_with_buckets(groups, steps, buckets, pieces) for steps in passes]
        passes.append([Finish()])
    steps = tuple(step for steps in passes for step in steps)
    return Plan(
        placed,
        part,
        mode,
        tuple(groups),
        messages,
        steps,
        rows,
        backends[0].dtype,
        tuple(levels),
        slots[part],
        grains,
        backends[0].channels_last,
    )


def choose_groups(nodes: Sequence[Node], backends: Sequence[Backend], mode: Mode) -> list[Group]:
    """Each node, save inputs, in one group: the first backend is asked first, the next for what it declined."""
    left = [node for node in nodes if not isinstance(node.layer, Input)]
    groups: list[Group] = []
    for backend in backends:
        found = backend.groups(left, mode)
        groups += found
        taken = {node.index for group in found for node in group.nodes}
        left = [node for node in left if node.index not in taken]
    if left:
        names = ", ".join(backend.name for backend in backends)
        raise JobError(f"{left[0].name}: none of the backends ({names}) computes {type(left[0].layer).__name__}")
    return sorted(groups, key=lambda group: group.nodes[-1].index)


def make_buckets(pieces: Sequence[Piece], bucket_nbytes: int, itemsize: int) -> list[tuple[int, int]]:
    """Slices [lo, hi) of the flat gradients, in the order in which they get ready: statistics, then from the end on.

    A bucket consists of whole pieces, and holds at least `bucket_nbytes` save the last one.
    """
    statistics = [piece for piece in pieces if piece.spec.statistic]
    trained = [piece for piece in pieces if not piece.spec.statistic]
    buckets = [(statistics[0].offset, statistics[-1].end)] if statistics else []
    hi = trained[-1].end if trained else 0
    for piece in reversed(trained):
        if (hi - piece.offset) * itemsize >= bucket_nbytes or piece.offset == 0:
            buckets.append((piece.offset, hi))
            hi = piece.offset
    return buckets


class _Lists:
    """Puts together what one part does in forward and backward."""

    def __init__(
        self,
        placed: Placed,
        part: int,
        groups: Sequence[Group],
        levels: Sequence[int],
        messages: Sequence[Message],
        mode: Mode,
        microbatches: int,
    ) -> None:
        self._graph, self._last = placed.graph, microbatches - 1
        self._by_level: dict[int, list[tuple[int, Group]]] = {}
        for i, group in enumerate(groups):
            self._by_level.setdefault(levels[i], []).append((i, group))
        self._own_inputs = [node.index for node in placed.nodes(part) if isinstance(node.layer, Input)]
        self._received = [message.number for message in messages if message.target == part]
        self._sent = [message.number for message in messages if message.source == part]
        # By node: its output comes, or goes; the gradients by it come. By edge: the gradient along it goes.
        self._comes: dict[int, int] = {}
        self._goes: dict[int, list[int]] = {}
        self._gradients_come: dict[int, list[int]] = {}
        self._gradient_goes: dict[tuple[int, int], int] = {}
        for message in messages:
            if message.source == part and message.gradient:
                self._gradient_goes[message.edge] = message.number
            elif message.source == part:
                self._goes.setdefault(message.node, []).append(message.number)
            elif message.target == part and message.gradient:
                self._gradients_come.setdefault(message.node, []).append(message.number)
            elif message.target == part:
                self._comes[message.node] = message.number
        nodes = [node for group in groups for node in group.nodes]
        self._collected = {node.index for node in nodes if node.layer.collected and mode == "train"}

    def passes(self, order: Sequence[Task], slots: int, grains: bool) -> list[list[Instruction]]:
        """The tasks one after the other, in one list; with `grains` a list for each micro-batch."""
        passes: list[list[Instruction]] = [[]]
        passes[0] += [PostRecv(number, slot) for slot in range(slots) for number in self._received]
        last = {task.micro: task for task in order if not task.backward}
        begun: set[int] = set()
        arrived: list[set[int]] = [set() for _ in range(slots)]
        for task in order:
            slot, steps = task.micro % slots, passes[-1]
            if task.backward:
                steps += self._backward(task.level, slot)
                continue
            if task.micro not in begun:
                begun.add(task.micro)
                arrived[slot].clear()
                if task.micro >= slots:
                    if grains:
                        passes.append(steps := [])
                    steps += [Sent(number, slot) for number in self._sent]
                    steps += [PostRecv(number, slot) for number in self._received]
                steps.append(Load(task.micro, slot))
                steps += [Send(number, slot) for index in self._own_inputs for number in self._goes.get(index, ())]
            steps += self._forward(task.level, slot, arrived[slot])
            if task == last[task.micro]:
                steps.append(Loss(slot, task.micro == self._last))
        passes[-1] += [Sent(number, slot) for slot in range(slots) for number in self._sent]
        return passes

    def _forward(self, level: int, slot: int, arrived: set[int]) -> list[Instruction]:
        steps: list[Instruction] = []
        for i, group in self._by_level.get(level, ()):
            sources = dict.fromkeys(node.inputs[position] for node, position in group.inputs)
            for source in sources:
                if source in self._comes and source not in arrived:
                    steps.append(Recv(self._comes[source], slot))
                    arrived.add(source)
            steps += [Collected(source, slot, False) for source in sources if source in self._collected]
            if not group.forward_view:
                steps.append(Forward(i, slot))
            last = group.nodes[-1].index
            if last in self._collected:
                steps.append(Collect(last, slot, False))
            steps += [Send(number, slot) for number in self._goes.get(last, ())]
        return steps

    def _backward(self, level: int, slot: int) -> list[Instruction]:
        pieces = [
            (self._backward_of(i, group, slot), [Weights(i, slot)] if group.splits else [])
            for i, group in reversed(self._by_level.get(level, ()))
            if any(node.needs_grad for node in group.nodes)
        ]
        sends = [place for place, (steps, _) in enumerate(pieces) if any(isinstance(step, Send) for step in steps)]
        last = sends[-1] if sends else -1
        awaited = [step for steps, _ in pieces[: last + 1] for step in steps]
        late = [step for _, weights in pieces[: last + 1] for step in weights]
        return awaited + late + [step for piece in pieces[last + 1 :] for steps in piece for step in steps]

    def _backward_of(self, i: int, group: Group, slot: int) -> list[Instruction]:
        """Of one group, save the gradients of weights."""
        last = group.nodes[-1]
        steps: list[Instruction] = [Recv(number, slot) for number in self._gradients_come.get(last.index, ())]
        if last.index in self._collected:
            steps.append(Collected(last.index, slot, True))
        if not group.backward_view:
            steps.append(Backward(i, slot))
        for node, position in group.inputs:
            source = self._graph.nodes[node.inputs[position]]
            if source.index in self._collected and source.needs_grad:
                steps.append(Collect(source.index, slot, True))
            if (node.index, position) in self._gradient_goes:
                steps.append(Send(self._gradient_goes[node.index, position], slot))
        return steps


def _with_buckets(
    groups: Sequence[Group], steps: list[Instruction], buckets: Sequence[tuple[int, int]], pieces: Sequence[Piece]
) -> list[Instruction]:
    """Put Open before the first instruction that writes into a bucket, Ready after the last one."""
    group_of = {
        (param.name, param.lo): i for i, group in enumerate(groups) for node in group.nodes for param in node.params
    }
    writers: dict[tuple[type[Compute], int], list[int]] = {}
    for piece in pieces:
        for kind in (Forward,) if piece.spec.statistic else (Backward, Weights):
            writers.setdefault((kind, group_of[piece.name, piece.lo]), []).append(piece.offset)
    places: dict[tuple[int, int], list[int]] = {bucket: [] for bucket in buckets}
    for place, step in enumerate(steps):
        if not isinstance(step, Compute):
            continue
        for offset in writers.get((type(step), step.group), ()):
            places[next(bucket for bucket in buckets if bucket[0] <= offset < bucket[1])].append(place)
    opens = {place: [b for b in buckets if places[b] and places[b][0] == place] for place in range(len(steps))}
    readies = {place: [b for b in buckets if places[b] and places[b][-1] == place] for place in range(len(steps))}
    return [
        new
        for place, step in enumerate(steps)
        for new in (*(Open(*b) for b in opens[place]), step, *(Ready(*b) for b in readies[place]))
    ]
