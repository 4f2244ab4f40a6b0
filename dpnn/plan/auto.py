"""Placements by name, and the choice of one."""

from collections.abc import Callable, Mapping

from dpnn.nn.graph import Graph
from dpnn.plan.costs import Costs
from dpnn.plan.placement import Pattern, Placement, by_branches, by_depth, by_filters, by_names

_BY_NAME: dict[str, Callable[[Graph, int, Costs], Placement]] = {
    "branches": by_branches,
    "depth": by_depth,
    "filters": by_filters,
}


def place(graph: Graph, parts: int, wanted: str | Mapping[str, Pattern], costs: Costs) -> Placement:
    """The placement that a job asks for; JobError where it can't be, with the nearest that can."""
    if parts == 1:
        return Placement(1, (0,) * len(graph.nodes))
    if isinstance(wanted, str):
        return _BY_NAME.get(wanted, by_depth)(graph, parts, costs)
    return by_names(graph, parts, wanted)
