"""A placed network, rewritten so that each node lies on one part and each array crosses to another part once.

- A layer whose filters are shared out becomes branches over runs of its filters, with a Concat behind them; what they
  hold keeps the layer's names. A ReLU behind the layer moves into the branches.
- An output that is read on several parts gets there through a binomial tree of Forks, one on each part: forward it is
  a broadcast, and backward, since a Fork adds the gradients of its readers, a reduction.
- An Add of outputs on several parts becomes a tree of Adds, likewise: a reduction, and backward a broadcast.

All other edges between parts stay as they are. What follows (schedule, memory, messages) knows edges only.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Graph, Node, Param, make_node
from dpnn.nn.join import Add, Concat, Fork
from dpnn.nn.layer import Input, Layer
from dpnn.nn.pointwise import ReLU
from dpnn.plan.placement import Placement, filters_of


@dataclass(frozen=True)
class Placed:
    """A network over `parts`: part_of[i] computes graph.nodes[i]."""

    graph: Graph
    parts: int
    part_of: tuple[int, ...]

    @classmethod
    def whole(cls, graph: Graph) -> "Placed":
        """The whole network on one part."""
        return cls(graph, 1, (0,) * len(graph.nodes))

    def nodes(self, part: int) -> list[Node]:
        """The nodes of one part, in topological order."""
        return [node for node in self.graph.nodes if self.part_of[node.index] == part]

    @property
    def reader(self) -> int:
        """The part that reads the data."""
        return self.part_of[self.graph.images]

    @property
    def writer(self) -> int:
        """The part that has the network's output."""
        return self.part_of[self.graph.output]


def spread(graph: Graph, placement: Placement) -> Placed:
    """The network of `placement`, ready to be cut along its parts."""
    if placement.parts == 1:
        return Placed.whole(graph)
    return _with_trees(*_with_shards(graph, placement), placement.parts)


def shard_cuts(layer: Layer, shards: int) -> list[int]:
    """Where the filters (or units) of each shard of a layer begin, and their number."""
    n = filters_of(layer)
    return [n * i // shards for i in range(shards + 1)]


class _Nodes:
    """Nodes that are put together, each with its part; `now[i]` does what node i of the old graph did."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.part_of: list[int] = []
        self.now: dict[int, int] = {}

    def add(
        self, part: int, layer: Layer, name: str, inputs: Sequence[int], aside: bool, params: Sequence[Param] | None
    ) -> int:
        """Append a node on a part; `aside`: it exists in training only."""
        own = None if params is None else tuple(params)
        self.nodes.append(make_node(self.nodes, layer, name, tuple(inputs), aside, own))
        self.part_of.append(part)
        return len(self.nodes) - 1

    def copy(self, node: Node, part: int, inputs: Sequence[int], layer: Layer | None = None) -> int:
        """The same node on a part, reading other nodes."""
        return self.add(part, layer or node.layer, node.name, inputs, node.training_only, node.params)

    def graph(self, old: Graph) -> Graph:
        """The whole of it, in place of `old`."""
        counts = Counter(source for node in self.nodes for source in node.inputs)
        nodes = [
            replace(node, layer=replace(node.layer, readers=counts[node.index]))
            if isinstance(node.layer, Fork)
            else node
            for node in self.nodes
        ]
        return Graph.rewritten(nodes, old, [self.now[i] for i in range(len(old.nodes))])


def _with_shards(graph: Graph, placement: Placement) -> tuple[Graph, tuple[int, ...]]:
    """The layers in `placement.shards` as branches over their filters."""
    new, inside = _Nodes(), set[int]()
    for node in graph.nodes:
        if node.index in inside:
            continue
        parts = placement.shards.get(node.index, ())
        inputs = [new.now[i] for i in node.inputs]
        if len(parts) < 2:
            new.now[node.index] = new.copy(node, placement.part_of[node.index], inputs)
            continue
        home, (source,) = placement.part_of[node.index], inputs
        if new.nodes[source].needs_grad:
            fork = Fork(readers=len(parts))
            source = new.add(home, fork, f"{node.name}.fork", inputs, node.training_only, None)
        relu = follower(graph, node)
        ends = []
        for part, (lo, hi) in zip(parts, pairwise(shard_cuts(node.layer, len(parts))), strict=True):
            run = f"[{lo}:{hi}]"
            params = [_run_of(param, lo, hi) for param in node.params]
            end = new.add(part, _narrowed(node.layer, hi - lo), node.name + run, [source], node.training_only, params)
            if relu is not None:
                end = new.add(part, relu.layer, relu.name + run, [end], node.training_only, None)
            ends.append(end)
        new.now[node.index] = new.add(home, Concat(), f"{node.name}.join", ends, node.training_only, None)
        if relu is not None:
            new.now[relu.index] = new.now[node.index]
            inside.add(relu.index)
    return new.graph(graph), tuple(new.part_of)


def _narrowed(layer: Layer, filters: int) -> Layer:
    """The layer with fewer filters."""
    if isinstance(layer, Conv) and layer.groups == 1:
        return replace(layer, filters=filters)
    if isinstance(layer, Dense):
        return replace(layer, units=filters)
    raise TypeError(f"{layer.name} has no filters to share out")


def follower(graph: Graph, node: Node) -> Node | None:
    """The ReLU that alone reads `node`, if there is one."""
    readers = graph.readers(node)
    return readers[0][0] if len(readers) == 1 and isinstance(readers[0][0].layer, ReLU) else None


def _run_of(param: Param, lo: int, hi: int) -> Param:
    """The filters [lo, hi) of a parameter whose first dimension is the filters."""
    each = prod(param.spec.shape[1:])
    spec = replace(param.spec, shape=(hi - lo, *param.spec.shape[1:]))
    return replace(param, spec=spec, lo=param.lo + lo * each)


def _with_trees(graph: Graph, part_of: Sequence[int], parts: int) -> Placed:
    """Trees of Forks and Adds where an output, or a sum, concerns several parts."""
    new = _Nodes()
    local: dict[tuple[int, int], int] = {}
    """What a part reads in place of a node of the old graph, by (node, part)."""
    for node in graph.nodes:
        part = part_of[node.index]
        places = [_read_on(graph, part_of, source, node) for source in node.inputs]
        inputs = [local[source, place] for source, place in zip(node.inputs, places, strict=True)]
        if isinstance(node.layer, Add):
            inputs = _add_tree(new, node, part, inputs, places)
        new.now[node.index] = local[node.index, part] = index = new.copy(node, part, inputs)
        readers = [reader for reader, _ in graph.readers(node)]
        wanted = Counter(_read_on(graph, part_of, node.index, reader) for reader in readers)
        members = [part, *(other for other in wanted if other != part)]
        if len(members) > 1 and not node.needs_grad and not isinstance(node.layer, Input | Fork):
            # So that no backend makes one op of the node and the only reader that it sees.
            fork = Fork(readers=0)
            local[node.index, part] = new.add(part, fork, f"{node.name}.fork", [index], node.training_only, None)
        _fork_tree(new, node, members, wanted, local, all(reader.training_only for reader in readers))
    return Placed(new.graph(graph), parts, tuple(new.part_of))


def _read_on(graph: Graph, part_of: Sequence[int], source: int, reader: Node) -> int:
    """The part on which `reader` reads a node: its own, save that a tree of Adds takes its inputs where they are.

    What others read too (a residual block's plain shortcut) has a tree of its own.
    """
    here, there = part_of[source], part_of[reader.index]
    if isinstance(reader.layer, Add) and here != there and not isinstance(graph.nodes[source].layer, Fork):
        others = [part_of[i] for i in reader.inputs]
        if others.count(here) > 1 or len({there, *others}) > 2:
            return here
    return there


def _fork_tree(
    new: _Nodes,
    node: Node,
    members: Sequence[int],
    wanted: Counter[int],
    local: dict[tuple[int, int], int],
    aside: bool,
) -> None:
    """A Fork on each part of `members` that has several readers, its own and the parts behind it in the tree."""
    children = Counter(_above(i) for i in range(1, len(members)))
    for i in range(1, len(members)):
        member, source = members[i], local[node.index, members[_above(i)]]
        if wanted[member] + children[i] > 1:
            source = new.add(member, Fork(readers=0), f"{node.name}.fork{member}", [source], aside, None)
        local[node.index, member] = source


def _add_tree(new: _Nodes, node: Node, part: int, inputs: Sequence[int], places: Sequence[int]) -> list[int]:
    """What is left to add on `part`: what is read there, and sums of what is read on other parts, `places`."""
    by_part: dict[int, list[int]] = {part: []}
    for source, place in zip(inputs, places, strict=True):
        by_part.setdefault(place, []).append(source)
    members = list(by_part)
    for i in range(len(members) - 1, 0, -1):
        summands = by_part[members[i]]
        if len(summands) > 1:
            name = f"{node.name}.sum{members[i]}"
            summands = [new.add(members[i], Add(), name, summands, node.training_only, None)]
        by_part[members[_above(i)]] += summands
    return by_part[part]


def _above(i: int) -> int:
    """The member above member i of a binomial tree: i without its lowest bit."""
    return i & (i - 1)
