"""Placements by name, and the search for the best one.

`auto` looks at what the named placements would bring, alone and with large layers shared out by their filters, in
several numbers of micro-batches; the best are then improved in small steps: a group of nodes goes to the part of a
neighbour, a branch to another part, a layer's filters are shared out or brought together. What decides is the forecast
of a step (plan/forecast.py), under the limit on memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from dpnn.errors import JobError
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Graph
from dpnn.plan.costs import n_params
from dpnn.plan.forecast import Forecast, Forecaster, Setting
from dpnn.plan.placement import (
    Loads,
    Pattern,
    Placement,
    by_branches,
    by_depth,
    by_filters,
    by_names,
    outer_blocks,
    settled,
    shardable,
)

GB = 1e9
_NAMED: dict[str, Callable[[Graph, int, Loads], Placement]] = {
    "branches": by_branches,
    "depth": by_depth,
    "filters": by_filters,
}
_ALL = 256
"""So many placements of groups on parts are all looked at."""
_LOOKS = 20_000
"""Forecasts of the search, times the nodes of the network: larger ones take longer each."""
_STARTS = 3
"""Kinds of placements whose best is improved."""
_ROUNDS = 2, 3
"""Stages that each part has, where there are several: the next micro-batch comes to it earlier, so that it waits less
when a step begins and ends (Narayanan et al. 2021, section 2.2)."""
_SHARED = 8
"""Layers whose filters the search shares out or brings together."""


def place(graph: Graph, parts: int, wanted: str | Mapping[str, Pattern], loads: Loads) -> Placement:
    """The placement of a name or of a table; JobError where it can't be, with the nearest that can."""
    if isinstance(wanted, str):
        return _NAMED[wanted](graph, parts, loads)
    return by_names(graph, parts, wanted)


def choose(
    forecaster: Forecaster,
    parts: int,
    wanted: str | Mapping[str, Pattern],
    microbatches: int = 0,
    memory_gb: float = 0.0,
    room: float = math.inf,
) -> list[tuple[str, Forecast]]:
    """What was looked at, by name, the best first; JobError where nothing stays under `memory_gb` (0: any).

    `microbatches`: 0 for the best number. `room`: bytes that a rank should stay under where no `memory_gb` says so;
    where none does, what needs least comes first.
    """
    numbers = [microbatches] if microbatches else forecaster.microbatches()
    search = _Search(forecaster, parts, memory_gb, room)
    if wanted == "auto":
        for number in numbers:
            for name, placement in _candidates(forecaster, parts, number):
                search.look(name, Setting(placement, number))
        search.improve()
    else:
        for number in numbers:
            placement = place(forecaster.graph, parts, wanted, forecaster.loads(number))
            search.look(wanted if isinstance(wanted, str) else "table", Setting(placement, number))
    return search.results()


def _candidates(forecaster: Forecaster, parts: int, number: int) -> Iterator[tuple[str, Placement]]:
    """The named placements that can be, and these with large layers shared out."""
    graph, loads = forecaster.graph, forecaster.loads(number)
    for name, make in _NAMED.items():
        try:
            yield name, make(graph, parts, loads)
        except JobError:
            continue
    for rounds in _ROUNDS:
        if rounds * parts <= len(loads.units):
            stages = by_depth(graph, rounds * parts, loads).part_of
            yield f"depth in {rounds} rounds", settled(graph, parts, [stage % parts for stage in stages], {})
    try:
        large = by_filters(graph, parts, loads).shards
    except JobError:
        return
    dense = {index: shared for index, shared in large.items() if isinstance(graph.nodes[index].layer, Dense)}
    for shards in (dense, large) if dense and dense != large else (large,):
        lighter = loads.work.copy()
        lighter[list(shards)] /= parts
        for name, make in (("depth", by_depth), ("branches", by_branches)):
            try:
                placement = make(graph, parts, replace(loads, work=lighter))
            except JobError:
                continue
            yield f"{name} and filters", replace(placement, shards=shards)


class _Search:
    """Settings that were looked at, and the way to better ones."""

    def __init__(self, forecaster: Forecaster, parts: int, memory_gb: float, room: float) -> None:
        self._forecaster, self._graph, self._parts = forecaster, forecaster.graph, parts
        self._limit, self._memory_gb = memory_gb * GB or room, memory_gb
        self._found: dict[object, tuple[str, Forecast]] = {}
        self._left = max(50, _LOOKS // len(self._graph.nodes))
        self._units = forecaster.loads(1).units

    def look(self, name: str, setting: Setting) -> Forecast:
        """The forecast of a setting, made once."""
        placement = setting.placement
        key = (placement.part_of, tuple(sorted(placement.shards.items())), setting.microbatches)
        if key not in self._found:
            self._found[key] = name, self._forecaster.look(setting)
        return self._found[key][1]

    def rank(self, forecast: Forecast) -> tuple[float, float, float]:
        """Less is better: memory over the limit, seconds of a step, memory."""
        most = max(forecast.nbytes)
        return max(0.0, most - self._limit), forecast.timing.step, most

    def results(self) -> list[tuple[str, Forecast]]:
        """All that was looked at, the best first; JobError where the best needs more memory than the job allows."""
        ranked = sorted(self._found.values(), key=lambda item: self.rank(item[1]))
        name, best = ranked[0]
        if self._memory_gb and max(best.nbytes) > self._limit:
            raise JobError(
                f"parallel.memory_gb = {self._memory_gb:g}: with parallel.parts = {self._parts} the least is "
                f"{max(best.nbytes) / GB:.3g} GB on a rank ({name}, {best.setting.microbatches} micro-batches); "
                "use more parts, a smaller batch, or a higher limit"
            )
        return ranked

    def improve(self) -> None:
        """Go from the best settings to better neighbours, until there is none or enough was looked at."""
        if self._parts ** len(self._units) <= _ALL:
            self._look_at_all()
        best: dict[str, Forecast] = {}
        for name, forecast in sorted(self._found.values(), key=lambda item: self.rank(item[1])):
            best.setdefault(name, forecast)
        for name, forecast in list(best.items())[:_STARTS]:
            self._climb(f"{name}, improved", forecast, self._left // _STARTS)

    def _look_at_all(self) -> None:
        numbers = {forecast.setting.microbatches for _, forecast in self._found.values()}
        for parts in product(range(self._parts), repeat=len(self._units)):
            part_of = [0] * len(self._graph.nodes)
            for unit, part in zip(self._units, parts, strict=True):
                for index in unit:
                    part_of[index] = part
            for number in sorted(numbers):
                self.look("all", Setting(settled(self._graph, self._parts, part_of, {}), number))

    def _climb(self, name: str, best: Forecast, left: int) -> None:
        better, looks = True, 0
        while better:
            better = False
            for placement in self._neighbours(best):
                if looks >= left:
                    return
                looks += 1
                found = self.look(name, replace(best.setting, placement=placement))
                if self.rank(found) < self.rank(best):
                    best, better = found, True
                    break

    def _neighbours(self, best: Forecast) -> Iterator[Placement]:
        """Placements one step away; first those that take work from the busiest part."""
        placement, busy = best.setting.placement, best.timing.busy
        moves = [*self._moved_units(placement), *self._moved_branches(placement)]
        moves.sort(key=lambda move: busy[move[2]] - busy[move[1]])
        shared = list(self._shared(placement))
        # A few of each kind at a time: which kind helps isn't known.
        for at in range(max(len(moves), len(shared))):
            for nodes, _, part in moves[at : at + 1]:
                part_of = list(placement.part_of)
                for index in nodes:
                    part_of[index] = part
                yield settled(self._graph, self._parts, part_of, placement.shards)
            yield from shared[at : at + 1]

    def _moved_units(self, placement: Placement) -> Iterator[tuple[Sequence[int], int, int]]:
        """(nodes, their part, a part of one that they read or that reads them)."""
        for unit in self._units:
            own = placement.part_of[unit[0]]
            nodes = [self._graph.nodes[index] for index in unit]
            near = {placement.part_of[i] for node in nodes for i in node.inputs}
            near |= {placement.part_of[r.index] for node in nodes for r, _ in self._graph.readers(node)}
            for part in sorted(near - {own}):
                yield unit, own, part

    def _moved_branches(self, placement: Placement) -> Iterator[tuple[Sequence[int], int, int]]:
        for block in outer_blocks(self._graph):
            for lo, hi in block.branches[block.join is None :]:
                for part in range(self._parts if lo < hi else 0):
                    if part != placement.part_of[lo]:
                        yield range(lo, hi), placement.part_of[lo], part

    def _shared(self, placement: Placement) -> Iterator[Placement]:
        """A large layer's filters shared out over all parts, or brought together."""
        layers = sorted(shardable(self._graph, self._parts), key=lambda node: -n_params(node))[:_SHARED]
        for node in layers:
            shards = dict(placement.shards)
            if shards.pop(node.index, None) is None:
                shards[node.index] = tuple(range(self._parts))
            yield replace(placement, shards=shards)
