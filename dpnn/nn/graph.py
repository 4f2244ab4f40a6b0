"""The flattened network: nodes in topological order, shapes inferred, every name unique and stable."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dpnn.errors import JobError
from dpnn.nn.chain import Branches, Chain, Network
from dpnn.nn.join import Fork, Heads
from dpnn.nn.layer import Input, Layer, ParamSpec, Shape
from dpnn.nn.loss import SigmoidCrossEntropy, SoftmaxCrossEntropy
from dpnn.nn.norm import BatchNorm, BatchNormalize, BatchSums

Loss = SoftmaxCrossEntropy | SigmoidCrossEntropy


@dataclass(frozen=True)
class Param:
    """A parameter of a node: its full name (`conv1.weight`), its role in the layer (`weight`), what it is.

    A node that has only some of a layer's filters holds the numbers from `lo` on of the flattened array of shape
    `whole`; `spec.shape` is that of its own.
    """

    name: str
    role: str
    spec: ParamSpec
    lo: int
    whole: Shape


@dataclass(frozen=True)
class Node:
    """A layer in its place. `inputs` are the indices of the nodes whose outputs it reads."""

    index: int
    name: str
    layer: Layer
    inputs: tuple[int, ...]
    input_shapes: tuple[Shape, ...]
    shape: Shape
    params: tuple[Param, ...]
    needs_grad: bool
    """Whether the gradient of the output is wanted: something at or before this node is trained."""
    training_only: bool


@dataclass(frozen=True)
class Block:
    """Branches as they were flattened: `branches` are runs [lo, hi) of nodes, `join` the node that collates them.

    None for Heads, which have no join; their first branch is the network going on.
    """

    name: str
    branches: tuple[tuple[int, int], ...]
    join: int | None


class Graph:
    """A network, its input and its losses as one list of nodes.

    `network` is a description; `shape` that of one sample (C, H, W); `loss` is put at the end of every head;
    `labels` is the shape of a sample's labels: () for one class, (K,) for K independent ones.

    Gradients flow along edges: (reader, position of the input) names one. Each output has one reader that sends a
    gradient back, because a Fork stands wherever there would be several.
    """

    blocks: tuple[Block, ...]
    """All Branches of the network, inner ones before those that hold them."""

    def __init__(self, network: Network, shape: Shape, loss: Loss, labels: Shape = ()) -> None:
        self._nodes: list[Node] = []
        self._heads: list[tuple[int, float, bool]] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._blocks: list[Block] = []
        self.images = self._add(Input(shape=shape), "images", ())
        self.labels = self._add(Input(shape=labels, holds="uint8" if labels else "int32"), "labels", ())
        self.ids = self._add(Input(shape=(), holds="uint64"), "ids", ())
        end = self._flatten(network, "", self.images, weight=1.0, training_only=False)
        if end is not None:
            self._heads.append((end, 1.0, False))
        self._heads.sort(key=lambda head: head[2])
        self.output = self._heads[0][0]
        """The node whose output is the network's: one score for each class."""
        self.losses = tuple(
            self._add(replace(loss, weight=weight), f"{self._nodes[head].name}.loss", (head, self.labels), aside)
            for head, weight, aside in self._heads
        )
        self.blocks = tuple(self._blocks)
        self._close()

    def _close(self) -> None:
        """All nodes are there: check their names, and find their readers."""
        self.nodes: tuple[Node, ...] = tuple(self._nodes)
        names = [node.name for node in self.nodes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise JobError(f"two layers of the network have the name {twice[0]!r}; give one of them another name")
        self._readers: list[list[tuple[Node, int]]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for position, source in enumerate(node.inputs):
                self._readers[source].append((node, position))

    @classmethod
    def rewritten(cls, nodes: Sequence[Node], old: "Graph", now: Sequence[int]) -> "Graph":
        """The same network in other nodes; now[i] is the one that does what old.nodes[i] did. It has no `blocks`."""
        graph = cls.__new__(cls)
        graph._nodes, graph.blocks = list(nodes), ()
        graph.images, graph.labels, graph.ids, graph.output = (
            now[i] for i in (old.images, old.labels, old.ids, old.output)
        )
        graph.losses = tuple(now[i] for i in old.losses)
        graph._close()
        return graph

    def readers(self, node: Node) -> list[tuple[Node, int]]:
        """The edges that leave `node`: (reader, position of the input)."""
        return self._readers[node.index]

    def params(self) -> Iterator[Param]:
        """All parameters in forward order."""
        for node in self.nodes:
            yield from node.params

    @property
    def n_params(self) -> int:
        """How many numbers are trained (running statistics are not)."""
        return sum(math.prod(p.spec.shape) for p in self.params() if p.spec.statistic == 0)

    def _flatten(self, part: Network, name: str, source: int, weight: float, training_only: bool) -> int | None:
        """Add the nodes of `part`; the index of its output, or None where it ended in heads."""
        if isinstance(part, Layer):
            return self._layer(part, name or part.name or _kind(part), source, training_only)
        if isinstance(part, Chain):
            end: int | None = source
            for child in part.parts:
                own = self._own_name(child, name)
                if end is None:
                    raise JobError(f"{name or 'the network'}: {own} stands after Heads, which end a network")
                end = self._flatten(child, _join(name, own), end, weight, training_only)
            return end
        return self._branches(part, name, source, weight, training_only)

    def _branches(self, part: Branches, name: str, source: int, weight: float, training_only: bool) -> int | None:
        name = name or part.name or "branches"
        if not part.branches:
            raise JobError(f"{name}: Branches need at least one branch")
        heads = part.join if isinstance(part.join, Heads) else None
        if heads is not None and len(heads.weights) != len(part.branches):
            raise JobError(f"{name}: {len(part.branches)} branches, but Heads gives {len(heads.weights)} weights")
        if self._nodes[source].needs_grad and len(part.branches) > 1:
            source = self._add(Fork(readers=len(part.branches)), f"{name}.fork", (source,), training_only)
        ends, runs = [], []
        for i, child in enumerate(part.branches):
            first = len(self._nodes)
            own = checked_name(child) or f"branch{i + 1}"
            path = _join(name, own)
            if heads is not None and i == 0:
                # The first branch is the network going on: heads at its side leave its names as they were.
                child = child if isinstance(child, Chain) else Chain(child)
                path = _join(name.rpartition(".")[0], child.name)
            scale = heads.weights[i] if heads else 1.0
            aside = training_only or (heads is not None and i > 0)
            end = self._flatten(child, path, source, weight * scale, aside)
            runs.append((first, len(self._nodes)))
            if heads is None and end is None:
                raise JobError(f"{name}: branch {own} ends in Heads, but the branches are joined")
            if heads is not None and end is not None:
                self._heads.append((end, weight * scale, aside))
            elif end is not None:
                ends.append(end)
        join = None
        if not isinstance(part.join, Heads):
            join = self._add(part.join, f"{name}.{part.join.name or 'join'}", tuple(ends), training_only)
        self._blocks.append(Block(name, tuple(runs), join))
        return join

    def _own_name(self, part: Network, scope: str) -> str:
        """A name for a part of a chain: its own, or its kind and a counter (`conv1`, `conv2`, `relu1`)."""
        kind = _kind(part)
        self._counts[scope, kind] += 1
        return checked_name(part) or f"{kind}{self._counts[scope, kind]}"

    def _layer(self, layer: Layer, name: str, source: int, training_only: bool) -> int:
        if isinstance(layer, BatchNorm) and layer.sync:
            if self._nodes[source].needs_grad:
                source = self._add(Fork(readers=2), f"{name}.fork", (source,), training_only)
            sums = self._add(BatchSums(), f"{name}.sums", (source,), training_only)
            normalize = BatchNormalize(momentum=layer.momentum, eps=layer.eps)
            return self._add(normalize, name, (source, sums), training_only)
        inputs = (source, self.ids) if layer.reads_ids else (source,)
        return self._add(layer, name, inputs, training_only)

    def _add(self, layer: Layer, name: str, inputs: tuple[int, ...], training_only: bool = False) -> int:
        node = make_node(self._nodes, layer, name, inputs, training_only)
        self._nodes.append(node)
        return node.index


def make_node(
    nodes: Sequence[Node],
    layer: Layer,
    name: str,
    inputs: tuple[int, ...],
    training_only: bool = False,
    params: tuple[Param, ...] | None = None,
) -> Node:
    """The node that comes behind `nodes`; `params` where they aren't the layer's own whole ones."""
    shapes = tuple(nodes[i].shape for i in inputs)
    layer = replace(layer, name=name)
    shape = layer.infer(*shapes)
    if params is None:
        specs = layer.params(*shapes)
        params = tuple(Param(f"{name}.{role}", role, spec, 0, spec.shape) for role, spec in specs.items())
    return Node(
        index=len(nodes),
        name=name,
        layer=layer,
        inputs=inputs,
        input_shapes=shapes,
        shape=shape,
        params=params,
        needs_grad=any(p.spec.statistic == 0 for p in params) or any(nodes[i].needs_grad for i in inputs),
        training_only=training_only or layer.in_training_only,
    )


def checked_name(part: Network) -> str:
    """A part's own name; JobError where it can't be a part of longer names and of paths in a checkpoint."""
    if "." in part.name or "/" in part.name:
        raise JobError(f"{part.name!r} is not a name for a layer: it has a dot or a slash; use a dash or an underscore")
    return part.name


def _kind(part: Network) -> str:
    return type(part).__name__.lower()


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def readers_among(nodes: Sequence[Node]) -> dict[int, list[Node]]:
    """Those of some nodes that read a node, by its index: a node that reads it twice stands there twice."""
    readers: dict[int, list[Node]] = {}
    for node in nodes:
        for source in node.inputs:
            readers.setdefault(source, []).append(node)
    return readers
