"""Which nodes become one op: a layer and the ReLU behind it."""

from collections.abc import Container, Sequence

from dpnn.backends.base import Backend, Group
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Node, readers_among
from dpnn.nn.join import Add, Fork
from dpnn.nn.norm import BatchNorm, BatchNormalize
from dpnn.nn.pointwise import ReLU

_BEFORE_RELU = (Conv, Dense, Add, BatchNorm, BatchNormalize)
_IN_PLACE = (Add, BatchNorm, BatchNormalize, ReLU)
"""Layers whose gradient by their first input is written over that by their output."""


def groups_of(nodes: Sequence[Node], known: Container[type], backend: Backend) -> list[Group]:
    """The groups of the nodes whose layers are `known`, in topological order of their last nodes."""
    readers = readers_among(nodes)
    taken: set[int] = set()
    groups: list[Group] = []
    for node in nodes:
        if type(node.layer) not in known or node.index in taken:
            continue
        chain, behind = [node], readers.get(node.index, [])
        if type(node.layer) in _BEFORE_RELU and len(behind) == 1 and type(behind[0].layer) is ReLU:
            chain.append(behind[0])
        taken.update(one.index for one in chain)
        in_place = (node.index, 0) if type(node.layer) in _IN_PLACE else None
        group = Group(tuple(chain), backend, forward_view=type(node.layer) is Fork, in_place=in_place)
        groups.append(group)
    return sorted(groups, key=lambda group: group.nodes[-1].index)
