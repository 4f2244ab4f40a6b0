"""Which part of a replica computes which node of the network: the placements that a job file can name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dpnn.errors import JobError
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Block, Graph, Node
from dpnn.nn.layer import Layer
from dpnn.nn.norm import BatchNormalize, BatchSums
from dpnn.plan.costs import n_params

Pattern = int | tuple[int, ...]
Shards = Mapping[int, tuple[int, ...]]
Array = NDArray[np.float64]
_LARGE = 0.05
"""Of all parameters or all work: a layer with a larger share is worth to be shared out by its filters."""
NO_SHARDS: Shards = MappingProxyType({})


@dataclass(frozen=True)
class Loads:
    """By node index, in seconds: what a micro-batch takes there, and what its output takes to another part and back.

    `units` are the nodes that one op computes, in topological order; all of a unit's work stands at its first node.
    """

    work: Array
    crossing: Array
    units: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Placement:
    """`part_of[node.index]` is the part that computes the node and holds its parameters.

    `shards[node.index]` are the parts that share out the node's filters; its outputs come together on its own part.
    """

    parts: int
    part_of: tuple[int, ...]
    shards: Shards = field(default_factory=dict)

    @classmethod
    def whole(cls) -> "Placement":
        """Any network on one part."""
        return cls(1, ())


def settled(graph: Graph, parts: int, part_of: Sequence[int], shards: Shards) -> Placement:
    """The placement with what has to lie together put together: data with their first reader, a loss with its scores,
    both halves of a synchronous BatchNorm with what they read."""
    settled = list(part_of)
    for node in graph.nodes:
        if isinstance(node.layer, BatchSums | BatchNormalize) or node.index in graph.losses:
            settled[node.index] = settled[node.inputs[0]]
    readers = graph.readers(graph.nodes[graph.images])
    home = settled[readers[0][0].index]
    for index in (graph.images, graph.labels, graph.ids):
        settled[index] = home
    return Placement(parts, tuple(settled), dict(shards))


def by_depth(graph: Graph, parts: int, loads: Loads, shards: Shards = NO_SHARDS, rounds: int = 1) -> Placement:
    """Stages: the units in their order, cut where the slowest stage, and what crosses to it, is cheapest.

    Each part has `rounds` stages, one in every round. `shards`: of the placement; who shares a layer has as much less
    of the others.
    """
    units, stages = loads.units, rounds * parts
    if stages > len(units):
        raise JobError(f"parallel.parts = {parts}: the network is computed in {len(units)} pieces; use at most so many")
    whole, shared = _divided(loads, parts, shards)
    shared = np.tile(shared / rounds, rounds)
    work = np.concatenate([[0.0], np.cumsum([whole[list(unit)].sum() for unit in units])])
    crossing = _crossings(graph, loads)
    n = len(units)
    best, choice = work + shared[0], []
    best[0] = np.inf
    for stage in range(1, stages):
        new, cuts = np.full(n + 1, np.inf), np.zeros(n + 1, int)
        for end in range(stage + 1, n + 1):
            starts = np.arange(stage, end)
            slowest = np.maximum(best[starts], work[end] - work[starts] + crossing[starts] + shared[stage])
            at = int(np.argmin(slowest))
            new[end], cuts[end] = slowest[at], starts[at]
        best = new
        choice.append(cuts)
    part_of, end = [0] * len(graph.nodes), n
    for stage in range(stages - 1, 0, -1):
        start = int(choice[stage - 1][end])
        for index in (index for unit in units[start:end] for index in unit):
            part_of[index] = stage % parts
        end = start
    return settled(graph, parts, part_of, shards)


def _crossings(graph: Graph, loads: Loads) -> Array:
    """Seconds that a cut before each unit costs: what is written before it and read behind it."""
    place = {index: i for i, unit in enumerate(loads.units) for index in unit}
    crossing = np.zeros(len(loads.units) + 1)
    for index, own in place.items():
        last = max((place[reader.index] for reader, _ in graph.readers(graph.nodes[index])), default=own)
        crossing[own + 1 : last + 1] += loads.crossing[index]
    return crossing


def _divided(loads: Loads, parts: int, shards: Shards) -> tuple[Array, Array]:
    """The work of nodes that aren't shared out, and by the part what it has of those that are."""
    whole, shared = loads.work.copy(), np.zeros(parts)
    for index, owners in shards.items():
        shared[list(owners)] += whole[index] / len(owners)
        whole[index] = 0.0
    return whole, shared


def by_branches(graph: Graph, parts: int, loads: Loads, shards: Shards = NO_SHARDS) -> Placement:
    """Every Branches spread over the parts, longest branch first to who has least; all else on the first part.

    `shards`: of the placement.
    """
    part_of, widest, (whole, _) = [0] * len(graph.nodes), ("", 0), _divided(loads, parts, shards)
    for block in outer_blocks(graph):
        runs = [run for run in block.branches if run[0] < run[1]]
        widest = max(widest, (block.name, len(runs)), key=lambda item: item[1])
        spread_branches(block, parts, whole, part_of)
    if widest[1] < parts:
        what = f"the widest, {widest[0]}, has {widest[1]} branches" if widest[1] else "the network has none"
        raise JobError(
            f'parallel.placement = "branches" with parallel.parts = {parts}: {what}; '
            f'use parallel.parts = {max(widest[1], 1)} or parallel.placement = "auto"'
        )
    return settled(graph, parts, part_of, shards)


def outer_blocks(graph: Graph) -> list[Block]:
    """The Branches that aren't inside a branch of another one; the first branch of Heads is no inside."""

    def inside(inner: Block, outer: Block) -> bool:
        runs = outer.branches[outer.join is None :]
        return inner is not outer and any(lo <= inner.branches[0][0] < hi for lo, hi in runs)

    return [block for block in graph.blocks if not any(inside(block, other) for other in graph.blocks)]


def spread_branches(block: Block, parts: int, work: Array, part_of: list[int]) -> None:
    """Write into `part_of` where the branches of a block go: the longest first, to who has least. `work`: of nodes."""
    load = dict.fromkeys(range(parts), 0.0)
    runs = [(float(work[lo:hi].sum()), lo, hi) for lo, hi in block.branches if lo < hi]
    for seconds, lo, hi in sorted(runs, key=lambda run: -run[0]):
        part = min(load, key=lambda part: load[part])
        load[part] += seconds
        if block.join is None and lo == block.branches[0][0]:
            continue  # the network going on
        part_of[lo:hi] = [part] * (hi - lo)


def by_filters(graph: Graph, parts: int, loads: Loads) -> Placement:
    """The large Conv and Dense layers shared out by their filters; all else on the first part."""
    layers = shardable(graph, parts)
    if not layers:
        raise JobError(
            f'parallel.placement = "filters" with parallel.parts = {parts}: no Conv (in one group) or Dense layer has '
            'so many filters; use fewer parts, or parallel.placement = "auto"'
        )
    work, params = loads.work.sum(), graph.n_params
    large = [n for n in layers if n_params(n) > _LARGE * params or loads.work[n.index] > _LARGE * work]
    large = large or [max(layers, key=n_params)]
    shards = {node.index: tuple(range(parts)) for node in large}
    return settled(graph, parts, [0] * len(graph.nodes), shards)


def shardable(graph: Graph, parts: int) -> list[Node]:
    """The layers that have at least `parts` filters to share out."""
    return [node for node in graph.nodes if filters_of(node.layer) >= max(parts, 2)]


def filters_of(layer: Layer) -> int:
    """How many filters (or units) a layer has to share out: 0 where it can't be."""
    if isinstance(layer, Conv):
        return layer.filters if layer.groups == 1 else 0
    return layer.units if isinstance(layer, Dense) else 0


def by_names(graph: Graph, parts: int, patterns: Mapping[str, Pattern]) -> Placement:
    """Nodes by patterns of their names, the first that fits; what no pattern fits goes where its first input is."""
    for pattern, wanted in patterns.items():
        for part in (wanted,) if isinstance(wanted, int) else wanted:
            if not 0 <= part < parts:
                raise JobError(
                    f"parallel.placement: {pattern!r} is to lie on part {part}, but parallel.parts = {parts}; "
                    f"use 0 to {parts - 1}"
                )
    part_of, shards, used = [0] * len(graph.nodes), dict[int, tuple[int, ...]](), set[str]()
    for node in graph.nodes:
        fitting = [pattern for pattern in patterns if fnmatchcase(node.name, pattern)]
        used.update(fitting)
        wanted = patterns[fitting[0]] if fitting else part_of[node.inputs[0]] if node.inputs else 0
        if isinstance(wanted, int):
            part_of[node.index] = wanted
            continue
        part_of[node.index] = wanted[0]
        if filters_of(node.layer) >= len(wanted) > 1:
            shards[node.index] = tuple(wanted)
        elif node.params and len(wanted) > 1:
            raise JobError(
                f"parallel.placement: {node.name} ({type(node.layer).__name__}) can't be shared out over parts "
                f"{list(wanted)}: that takes a Conv in one group or a Dense layer with so many filters"
            )
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        names = ", ".join(node.name for node in graph.nodes if node.params)
        raise JobError(f"parallel.placement: no layer has a name like {unused[0]!r}; there are {names}")
    return settled(graph, parts, part_of, shards)
