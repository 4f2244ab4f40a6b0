"""What crosses between the parts of a replica: arrays of a micro-batch, each from one part to another."""

from dataclasses import dataclass
from functools import lru_cache

from dpnn.backends.base import Edge, Mode
from dpnn.nn.graph import Node
from dpnn.nn.join import Add, Concat, Fork
from dpnn.plan.spread import Placed


@dataclass(frozen=True)
class Message:
    """The output of node `node`, or (`gradient`) the gradient by it that the reader of `edge` sends back.

    `number` is the same on all parts. `crew` are the parts that take part in the same broadcast or collation, where
    these are more than two: they have a communicator of their own.
    """

    number: int
    node: int
    edge: Edge
    gradient: bool
    source: int
    target: int
    crew: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int]:
        """The buffer that it is sent from, and that it is received into."""
        return self.edge if self.gradient else (self.node, -1)


@lru_cache(maxsize=8)
def messages_of(placed: Placed, mode: Mode) -> tuple[Message, ...]:
    """All messages of a micro-batch, in the order of the nodes: a gradient follows on what it is the gradient of."""
    graph, part_of = placed.graph, placed.part_of
    edges = [
        (node, reader, position)
        for node in graph.nodes
        for reader, position in graph.readers(node)
        if part_of[node.index] != part_of[reader.index] and not (mode == "eval" and reader.training_only)
    ]
    crews: dict[tuple[str, int], set[int]] = {}
    for node, reader, _ in edges:
        crews.setdefault(_tree(placed, node, reader), set()).update((part_of[node.index], part_of[reader.index]))
    found: list[Message] = []
    for node, reader, position in edges:
        members = crews[_tree(placed, node, reader)]
        crew = tuple(sorted(members)) if len(members) > 2 else ()
        source, target, edge = part_of[node.index], part_of[reader.index], (reader.index, position)
        found.append(Message(len(found), node.index, edge, False, source, target, crew))
        if mode == "train" and node.needs_grad:
            found.append(Message(len(found), node.index, edge, True, target, source, crew))
    return tuple(found)


def _tree(placed: Placed, node: Node, reader: Node) -> tuple[str, int]:
    """The broadcast or the collation that an edge between parts belongs to, by the node at its root."""
    graph, part_of = placed.graph, placed.part_of
    if isinstance(reader.layer, Add | Concat) and not isinstance(node.layer, Fork):
        root = reader
        while isinstance(root.layer, Add):
            above = graph.readers(root)
            if not above or not isinstance(above[0][0].layer, Add) or part_of[above[0][0].index] == part_of[root.index]:
                break
            root = above[0][0]
        return "collation", root.index
    root = node
    while isinstance(root.layer, Fork) and part_of[root.inputs[0]] != part_of[root.index]:
        root = graph.nodes[root.inputs[0]]
    return "broadcast", root.index
