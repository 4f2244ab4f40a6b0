"""Which part of a replica owns which node of the network."""

from dataclasses import dataclass

from dpnn.nn.graph import Graph, Node


@dataclass(frozen=True)
class Placement:
    """`part_of[node.index]` is the part that computes the node and holds its parameters."""

    parts: int
    part_of: tuple[int, ...]

    @classmethod
    def whole(cls, graph: Graph) -> "Placement":
        """The whole network on one part."""
        return cls(parts=1, part_of=(0,) * len(graph.nodes))

    def nodes(self, graph: Graph, part: int) -> list[Node]:
        """The nodes of one part, in topological order."""
        return [node for node in graph.nodes if self.part_of[node.index] == part]
