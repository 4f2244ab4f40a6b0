"""Placements by name, and the search for the best one.

`auto` looks at what the named placements would bring, alone and with large layers shared out by their filters, in
several numbers of micro-batches; the best are then improved in small steps: a group of nodes goes to the part of a
neighbour, a branch to another part, a layer's filters are shared out or brought together. What decides is the forecast
of a step (plan/forecast.py), under the limit on memory; where two are near, memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
_NAMED = {"branches": by_branches, "depth": by_depth, "filters": by_filters}
_ALL = 256
"""So many placements of groups on parts are all looked at."""
_LOOKS = 20_000
"""Forecasts of the search, times the nodes of the network: larger ones take longer each."""
_STARTS = 3
"""Kinds of placements whose best is improved."""
_ROUNDS = 1, 2, 3
"""Stages that each part has: where there are several, the next micro-batch comes to it earlier, so that it waits less
when a step begins and ends (Narayanan et al. 2021, section 2.2)."""
_MANY = 4
"""Layers shared out at once whose forecasts take long."""
_HELD = 0.07
"""What memory counts beside time: half as many bytes on the fullest part are worth 5 % of a step, half as many
parameters as much again. Forecasts aren't better than that, and what belongs to parameters is read and written in every
step, in checkpoints and where a run goes on."""
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
    """The named placements, and these with large layers shared out, as far as they can be."""
    for name, make in _ways(forecaster.graph, parts, forecaster.loads(number)):
        try:
            yield name, make()
        except JobError:
            continue


def _ways(graph: Graph, parts: int, loads: Loads) -> Iterator[tuple[str, Callable[[], Placement]]]:
    """Kinds of placements, and how they are made."""
    yield "filters", partial(by_filters, graph, parts, loads)
    for shards in _shared_out(graph, parts, loads):
        also = " and filters" if shards else ""
        yield f"branches{also}", partial(by_branches, graph, parts, loads, shards)
        for rounds in _ROUNDS if len(shards) < _MANY else _ROUNDS[:1]:
            again = f" in {rounds} rounds" if rounds > 1 else ""
            yield f"depth{again}{also}", partial(by_depth, graph, parts, loads, shards, rounds)


def _shared_out(graph: Graph, parts: int, loads: Loads) -> Iterator[dict[int, tuple[int, ...]]]:
    """Which layers could be shared out, and over which parts: none, all large ones, and the largest Dense ones.

    The latter also over all parts but the first or the last, which have enough of their own: the images' end the most
    arrays between layers, the other end the layers that aren't shared out.
    """
    yield {}
    try:
        large = by_filters(graph, parts, loads).shards
    except JobError:
        return
    yield dict(large)
    dense = [index for index in large if isinstance(graph.nodes[index].layer, Dense)]
    dense.sort(key=lambda index: -n_params(graph.nodes[index]))
    everybody = tuple(range(parts))
    for n in range(1, len(dense) + 1):
        for owners in (everybody, everybody[1:], everybody[:-1])[: 3 if parts > 2 else 1]:
            yield dict.fromkeys(dense[:n], owners)


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

    def rank(self, forecast: Forecast) -> tuple[float, float]:
        """Less is better: memory over the limit; then seconds of a step, and a little what the fullest part holds."""
        most = max(forecast.nbytes)
        held = math.log(most) + math.log(max(forecast.params, default=0) or 1)
        return max(0.0, most - self._limit), math.log(forecast.timing.step or 1e-9) + _HELD * held

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
        shared = list(self._shared(best))
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

    def _shared(self, best: Forecast) -> Iterator[Placement]:
        """A large layer's filters shared out over all parts, all but the busiest or fullest, or brought together."""
        placement, everybody = best.setting.placement, tuple(range(self._parts))
        spared = [max(everybody, key=lambda part: of[part]) for of in (best.timing.busy, best.nbytes)]
        choices = [everybody, *(tuple(part for part in everybody if part != one) for one in dict.fromkeys(spared))]
        layers = sorted(shardable(self._graph, self._parts), key=lambda node: -n_params(node))[:_SHARED]
        for node in layers:
            others = {index: owners for index, owners in placement.shards.items() if index != node.index}
            own = placement.shards.get(node.index)
            if own:
                yield replace(placement, shards=others)
            for owners in choices:
                if owners != own and len(owners) > 1:
                    yield replace(placement, shards={**others, node.index: owners})
