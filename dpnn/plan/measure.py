"""How long groups take on this rank: each kind once by itself, over arrays of zeros."""

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dpnn.backends.base import Backend, Group, SplitOp, Step
from dpnn.memory import HOST, Memory
from dpnn.native import denormals_flushed
from dpnn.nn.graph import Graph
from dpnn.plan.costs import Costs, Phases, Time, multiply_adds, question
from dpnn.plan.memory import Arena, Buffers, Layout
from dpnn.plan.placement import Placement, shardable
from dpnn.plan.schedule import choose_groups, compile_plan
from dpnn.plan.spread import Placed, spread
from dpnn.plan.store import Store

Array = NDArray[Any]

_ROWS = 4, 16
"""Samples that a group is timed with, beside one."""
_LARGE_S = 0.05
"""A group that takes so long isn't timed with more samples."""
_LONG_S = 0.3
"""Calls of a group are repeated until they took so long."""
_CALLS = 2, 3
"""At least, and at most: the first one may be slower."""
_ODD = 2.0
"""Samples don't take so many times as long where there are more of them, nor all so many times as long as more do."""
_CACHES = 1 << 25
"""Bytes that are read before each call, so that it finds its arrays where it does in a step: in memory."""


def measured(graph: Graph, parts: int, backends: Sequence[Backend], rows: int) -> Costs:
    """The costs of this rank: times of all groups of a network, also of layers shared out over `parts`.

    `rows`: the most samples of a step. Groups with outputs that replicas sum are left out: for these, and for what else
    isn't among the groups, the rate of multiply-adds is that of all that was measured.
    """
    shards = {node.index: tuple(range(parts)) for node in shardable(graph, parts)}
    found: dict[str, Time] = {}
    work = seconds = 0.0
    other = np.ones(_CACHES, np.uint8)  # zeros that nobody wrote are one page, and a fill may store past the caches
    for one in (graph, spread(graph, Placement(parts, (0,) * len(graph.nodes), shards)).graph):
        for group in choose_groups(one.nodes, backends, "train"):
            if question(group) in found or _is_summed(one, group):
                continue
            found[question(group)] = time = _time(one, group, backends, rows, other)
            if any(multiply_adds(node) for node in group.nodes):
                work += 3 * sum(map(multiply_adds, group.nodes))
                seconds += sum(time.of(1))
    return Costs(multiply_adds=work / seconds if seconds else Costs.multiply_adds, groups=found)


def _is_summed(graph: Graph, group: Group) -> bool:
    """Whether replicas sum what the group writes or reads."""
    sources = [graph.nodes[node.inputs[i]] for node, i in group.inputs]
    return any(node.layer.collected for node in (*group.nodes, *sources))


def _time(graph: Graph, group: Group, backends: Sequence[Backend], most: int, other: Array) -> Time:
    """Of several numbers of samples, up to `most`; `other` is read before each call, to take the caches."""
    times: dict[int, Phases] = {}
    seconds = partial(_seconds, graph, group, backends, other)
    for n in (1, *(n for n in _ROWS if n <= most)):
        add_time(times, n, seconds)
        if n > 1 and max(times[n]) > _LARGE_S:
            break
    if group.gathers and most not in times:  # the gradients of its weights are made of all samples of a step at once
        add_time(times, most, seconds)
    return Time(tuple(times), *zip(*times.values(), strict=True))


def add_time(times: dict[int, Phases], rows: int, seconds: Callable[[int], Phases]) -> None:
    """Time so many samples, more than were timed before. What can't be beside those before is timed once more.

    A machine that stands still for a moment would else be taken for a layer that takes a second.
    """
    before = max(times, default=0)
    times[rows] = seconds(rows)
    if not before:
        return
    pairs = list(zip(times[before], times[rows], strict=True))
    if any(less > _ODD * more for less, more in pairs):
        times[before] = Phases(*map(min, times[before], seconds(before)))
    elif any(more > _ODD * less * rows / before for less, more in pairs):
        times[rows] = Phases(*map(min, times[rows], seconds(rows)))


def _seconds(graph: Graph, group: Group, backends: Sequence[Backend], other: Array, rows: int) -> Phases:
    """Seconds of a group."""
    inside = {node.index for node in group.nodes}
    lone = Placed(graph, 2, tuple(int(node.index not in inside) for node in graph.nodes))
    plan = compile_plan(lone, 0, backends, "train", rows)
    memory = backends[0].memory
    layout, arena = Layout(plan), Arena(memory)
    arena.reserve(layout.nbytes)
    memory.zero(arena.take(0, (layout.nbytes,), np.dtype(np.uint8)))
    store = Store(group.nodes, backends[0].dtype, memory)
    flat = store.params_wire
    memory.zero(flat.array)  # else all of it is one page
    store.place(flat, flat)  # gradients are zeros too, and a layer may fill half a machine
    buffers = Buffers(layout, 0, arena, store, {}, Step(rows=rows, batch=rows, total=rows))
    fastest = partial(_fastest, memory, other)
    forward = backward = weights = 0.0
    for mine in plan.groups:
        op = mine.backend.build(mine, buffers, "train")
        _, *scratch, _ = buffers.room(mine)
        with denormals_flushed():
            if not mine.forward_view:
                inputs = [buffers.input(node, position) for node, position in mine.inputs]
                forward += fastest(op.forward, (*inputs, scratch[0]))
            if not mine.backward_view and any(node.needs_grad for node in mine.nodes):
                gradients = buffers.d_outputs(mine.nodes[-1])
                backward += fastest(op.backward, (*gradients, scratch[1]))
                weights += fastest(cast(SplitOp, op).weights, (*gradients, scratch[2])) if mine.splits else 0.0
    return Phases(forward, backward, weights)


def _fastest(memory: Memory, other: Array, call: Callable[[], None], fresh: Sequence[Array]) -> float:
    """Seconds of a call, with `other` in the caches in place of its arrays.

    `fresh`: those that the group before has just written, or used as scratch too, and that are in the caches therefore.
    """
    times: list[float] = []
    while len(times) < _CALLS[0] or (len(times) < _CALLS[1] and sum(times) <= _LONG_S):
        if memory is HOST:
            for array in (other, *fresh):
                np.max(array, initial=0)
        begin = perf_counter()
        call()
        memory.wait()
        times.append(perf_counter() - begin)
    return min(times)
