"""The instructions of one step, as data: printable, and checked without MPI.

A list is made in two passes. First what is computed, a micro-batch after the other: `Load`, `Forward` through the
groups, `Loss`, `Backward` through them again. Then what is exchanged, put in around it by one rule each:

- a bucket of gradients is opened before the first instruction of the step that writes into it, and ready after the
  last one (so in the last micro-batch only; where micro-batches are grains, in each);
- an output that is summed over all replicas (`collected`) is sent off right after it was written, and waited for
  right before it is read; its gradient likewise.

Every rank of one part has the same list, so nothing is negotiated and nothing can deadlock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dpnn.backends.base import Backend, Group, Mode
from dpnn.errors import JobError
from dpnn.nn.graph import Graph, Node
from dpnn.nn.layer import Input
from dpnn.plan.store import Piece


@dataclass(frozen=True)
class Load:
    """Copy the rows of micro-batch `micro` into the inputs of `slot`."""

    micro: int
    slot: int


@dataclass(frozen=True)
class Forward:
    """Run the forward op of group number `group`."""

    group: int
    slot: int


@dataclass(frozen=True)
class Loss:
    """Add up the losses; after the `last` micro-batch the strategy is told."""

    slot: int
    last: bool


@dataclass(frozen=True)
class Backward:
    """Run the backward op of group number `group`."""

    group: int
    slot: int


@dataclass(frozen=True)
class Collect:
    """Start to sum the output of node `node` over the replicas, or (`gradient`) the gradient by it."""

    node: int
    slot: int
    gradient: bool


@dataclass(frozen=True)
class Collected:
    """Wait until that sum is there."""

    node: int
    slot: int
    gradient: bool


@dataclass(frozen=True)
class Open:
    """From here on grads[lo:hi] is written: wait until nobody reads its last contents."""

    lo: int
    hi: int


@dataclass(frozen=True)
class Ready:
    """grads[lo:hi] is complete: the strategy may exchange it."""

    lo: int
    hi: int


@dataclass(frozen=True)
class Finish:
    """Every gradient is ready: complete the exchange and update the parameters."""


Instruction = Load | Forward | Loss | Backward | Collect | Collected | Open | Ready | Finish


@dataclass(frozen=True)
class Plan:
    """What one rank does in a step: groups of nodes, and the instructions over them."""

    graph: Graph
    mode: Mode
    groups: tuple[Group, ...]
    instructions: tuple[Instruction, ...]
    rows: int
    """The most samples that a micro-batch of this rank can have."""
    grains: bool = False
    """Whether each micro-batch is a grain: it assigns the gradients, and they are ready after each."""
    channels_last: bool = False
    """Whether images lie as NHWC in memory."""

    def __str__(self) -> str:
        names = [" + ".join(node.name for node in group.nodes) for group in self.groups]
        lines = []
        for instruction in self.instructions:
            match instruction:
                case Forward(group, _) | Backward(group, _):
                    lines.append(f"{instruction}  {names[group]}")
                case Collect(node, _, _) | Collected(node, _, _):
                    lines.append(f"{instruction}  {self.graph.nodes[node].name}")
                case _:
                    lines.append(str(instruction))
        return "\n".join(lines)


def compile_plan(
    graph: Graph,
    nodes: Sequence[Node],
    backends: Sequence[Backend],
    mode: Mode,
    rows: int,
    microbatches: int = 1,
    pieces: Sequence[Piece] = (),
    bucket_nbytes: int = 0,
    grains: bool = False,
) -> Plan:
    """The plan of a rank that owns `nodes` of `graph`.

    `rows`: the most samples of a micro-batch. `pieces`: what its store holds (training only). `bucket_nbytes`: a
    bucket is closed when it is at least so large. `grains`: buckets are exchanged after every micro-batch.
    """
    wanted = [
        node for node in nodes if not isinstance(node.layer, Input) and not (mode == "eval" and node.training_only)
    ]
    groups = choose_groups(wanted, backends, mode)
    passes = [_one_micro_batch(groups, mode, micro, micro == microbatches - 1) for micro in range(microbatches)]
    if not grains:
        passes = [[step for steps in passes for step in steps]]
    if mode == "train":
        buckets = make_buckets(pieces, bucket_nbytes, backends[0].dtype.itemsize)
        passes = [_with_buckets(groups, _with_collections(graph, groups, steps), buckets, pieces) for steps in passes]
        passes.append([Finish()])
    steps = tuple(step for steps in passes for step in steps)
    return Plan(graph, mode, tuple(groups), steps, rows, grains, backends[0].channels_last)


def choose_groups(nodes: Sequence[Node], backends: Sequence[Backend], mode: Mode) -> list[Group]:
    """Each node in one group: the first backend in the list is asked first, the next for what it declined."""
    left = list(nodes)
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


def _one_micro_batch(groups: Sequence[Group], mode: Mode, micro: int, last: bool) -> list[Instruction]:
    steps: list[Instruction] = [Load(micro, 0)]
    steps += [Forward(i, 0) for i, group in enumerate(groups) if not group.forward_view]
    steps.append(Loss(0, last))
    if mode == "train":
        for i, group in reversed(list(enumerate(groups))):
            if not group.backward_view and any(node.needs_grad for node in group.nodes):
                steps.append(Backward(i, 0))
    return steps


def _with_collections(graph: Graph, groups: Sequence[Group], steps: list[Instruction]) -> list[Instruction]:
    """Put Collect and Collected around the groups that write and read a collected output, or its gradient."""
    group_of = {node.index: i for i, group in enumerate(groups) for node in group.nodes}
    before: dict[Instruction, list[Instruction]] = {}
    after: dict[Instruction, list[Instruction]] = {}
    for group in groups:
        for node in group.nodes:
            if not node.layer.collected:
                continue
            writer = group_of[node.index]
            reader = group_of[graph.readers(node)[0][0].index]
            for first, second, gradient in (
                (Forward(writer, 0), Forward(reader, 0), False),
                (Backward(reader, 0), Backward(writer, 0), True),
            ):
                if not gradient or node.needs_grad:
                    after.setdefault(first, []).append(Collect(node.index, 0, gradient))
                    before.setdefault(second, []).append(Collected(node.index, 0, gradient))
    return [new for step in steps for new in (*before.get(step, ()), step, *after.get(step, ()))]


def _with_buckets(
    groups: Sequence[Group], steps: list[Instruction], buckets: Sequence[tuple[int, int]], pieces: Sequence[Piece]
) -> list[Instruction]:
    """Put Open before the first instruction that writes into a bucket, Ready after the last one."""
    group_of = {param.name: i for i, group in enumerate(groups) for node in group.nodes for param in node.params}
    writers: dict[Instruction, list[int]] = {}
    for piece in pieces:
        group = group_of[piece.name]
        writer: Instruction = Forward(group, 0) if piece.spec.statistic else Backward(group, 0)
        writers.setdefault(writer, []).append(piece.offset)
    places: dict[tuple[int, int], list[int]] = {bucket: [] for bucket in buckets}
    for place, step in enumerate(steps):
        for offset in writers.get(step, ()):
            places[next(bucket for bucket in buckets if bucket[0] <= offset < bucket[1])].append(place)
    opens = {place: [b for b in buckets if places[b] and places[b][0] == place] for place in range(len(steps))}
    readies = {place: [b for b in buckets if places[b] and places[b][-1] == place] for place in range(len(steps))}
    return [
        new
        for place, step in enumerate(steps)
        for new in (*(Open(*b) for b in opens[place]), step, *(Ready(*b) for b in readies[place]))
    ]
