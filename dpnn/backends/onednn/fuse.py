"""Which nodes become one op: a layer, the normalisation or addition behind it, its ReLU, its Fork."""

import math
from collections.abc import Sequence
from dataclasses import replace

from dpnn.backends.base import Backend, Edge, Group, Mode
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Node, readers_among
from dpnn.nn.join import Add, Concat, Fork
from dpnn.nn.layer import pair
from dpnn.nn.norm import BatchNorm, BatchNormalize, BatchSums, LocalResponseNorm
from dpnn.nn.pointwise import Flatten, ReLU
from dpnn.nn.pool import GlobalAvgPool, MaxPool

_NORMS = (BatchNorm, BatchNormalize)
_MIXED = (*_NORMS, Add, ReLU, Fork)
_HEADS = (Conv, Dense, MaxPool, GlobalAvgPool, LocalResponseNorm, Concat, Flatten, BatchSums, *_MIXED)
_MUCH = 256
"""A dense layer's weights are kept out of all micro-batches but the last where they are so many times as much as the
numbers that a sample has there."""
_BEFORE_RELU = (Conv, Dense, *_NORMS, Add)


def fuse(nodes: Sequence[Node], mode: Mode, backend: Backend) -> list[Group]:
    """The groups of the nodes that this backend computes, in topological order of their last nodes."""
    heads = [node for node in nodes if type(node.layer) in _HEADS and _fits(node)]
    readers = readers_among(nodes)
    taken: set[int] = set()
    groups: list[Group] = []

    def only_reader(node: Node) -> Node | None:
        """The one node behind `node`, if it is one of mine."""
        found = readers.get(node.index, [])
        return found[0] if len(found) == 1 and found[0].index not in taken else None

    def follow(chain: list[Node], kind: type) -> bool:
        """Append the only reader of the chain's end, where it is of a kind."""
        reader = only_reader(chain[-1])
        if reader is None or type(reader.layer) is not kind:
            return False
        chain.append(reader)
        return True

    # A sum takes in the normalisations before it, so sums come first.
    adds = [node for node in heads if type(node.layer) is Add]
    for head in [*adds, *heads]:
        if head.index in taken:
            continue
        chain = [head]
        if isinstance(head.layer, Add) and mode == "train":
            sources = [node for node in nodes if node.index in head.inputs and type(node.layer) in _NORMS]
            chain = [*(node for node in sources if only_reader(node) is head), head]
        # What stands before a synchronous BatchNorm is forked: to its sums, which only training has.
        folds = isinstance(head.layer, Conv) and mode == "eval"
        if folds and not follow(chain, BatchNorm) and follow(chain, Fork):
            follow(chain, BatchNormalize)
        if type(chain[-1].layer) in _BEFORE_RELU:
            follow(chain, ReLU)
        if type(chain[-1].layer) not in (Fork, BatchSums):
            follow(chain, Fork)
        taken.update(node.index for node in chain)
        splits = isinstance(head.layer, Conv | Dense)
        group = Group(tuple(chain), backend, forward_view=isinstance(head.layer, Fork), splits=splits)
        groups.append(replace(group, in_place=_in_place(group), gathers=_gathers(head)))
    return sorted(groups, key=lambda group: group.nodes[-1].index)


def _gathers(node: Node) -> bool:
    """Whether the weights are so much more than the numbers of a sample that they should be passed over once a step."""
    k, c = node.params[0].spec.shape if isinstance(node.layer, Dense) else (0, 0)
    return k * c >= _MUCH * (k + c) > 0


def _fits(node: Node) -> bool:
    """Whether a pooling's places can be numbered in a byte; and a Fork is of activations, not of labels."""
    if isinstance(node.layer, Fork):
        return node.needs_grad
    return not isinstance(node.layer, MaxPool) or math.prod(pair(node.layer.size)) <= 256


def _in_place(group: Group) -> Edge | None:
    """The input whose gradient may be written over the output's: a plain one of a sum, or the only one."""
    if type(group.nodes[0].layer) not in _MIXED:
        return None
    plain = [(node.index, i) for node, i in group.inputs if type(node.layer) not in _NORMS]
    normalized = [(node.index, i) for node, i in group.inputs if i == 0]
    return plain[0] if plain else normalized[0] if len(normalized) == 1 else None
