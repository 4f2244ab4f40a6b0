"""The plans of all parts of a placed network, without MPI."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dpnn.backends.reference import Reference
from dpnn.nn import Graph, Network, SoftmaxCrossEntropy
from dpnn.plan import Placed, Placement, Plan, Store, compile_plan, spread
from dpnn.plan.placement import by_names

SHAPE = (3, 8, 8)
TYPE = np.dtype(np.float64)


def graph_of(network: Network) -> Graph:
    return Graph(network, SHAPE, SoftmaxCrossEntropy())


def placed_by(network: Network, parts: int, patterns: Mapping[str, Any]) -> Placed:
    """The network spread by patterns of names."""
    graph = graph_of(network)
    return spread(graph, by_names(graph, parts, patterns))


def plans_of(placed: Placed, microbatches: int = 1, mode: Any = "train", pipeline: Any = "1f1b") -> list[Plan]:
    """One for each part, of two rows a micro-batch."""
    found = []
    for part in range(placed.parts):
        pieces = Store(placed.nodes(part), TYPE).pieces
        rest = (2, microbatches, pieces, 400, False, pipeline)
        found.append(compile_plan(placed, part, [Reference(TYPE)], mode, *rest))
    return found


def plans_over(graph: Graph, placement: Placement, **how: Any) -> list[Plan]:
    return plans_of(spread(graph, placement), **how)
