"""The bench for a layer with a ReLU behind it, which this backend computes in one op."""

from collections.abc import Sequence
from typing import Any

from dpnn import nn
from dpnn.backends.base import Group, Mode
from dpnn.backends.cuda import Cuda


class WithReLU:
    """A backend that puts a ReLU behind each layer; the bench sees the two as one layer."""

    def __init__(self, backend: Cuda) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def groups(self, nodes: Sequence[nn.Node], mode: Mode) -> list[Group]:
        (node,) = nodes
        relu = nn.ReLU(name="relu")
        behind = nn.Node(node.index + 1, "relu", relu, (node.index,), (node.shape,), node.shape, (), True, False)
        groups = self.backend.groups([node, behind], mode)
        assert [group.nodes for group in groups] == [(node, behind)]
        return groups
