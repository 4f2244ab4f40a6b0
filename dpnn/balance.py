"""Replicas of unequal speed: how many lanes each gets, so that all need the same time for a step.

Measured once, when a run starts: every replica computes a few steps over as many samples as an equal share would be,
all at the same time, since what they share (memory, caches) is part of their speed.
"""

from collections.abc import Callable
from itertools import pairwise
from time import perf_counter

import numpy as np

from dpnn import config
from dpnn.comm.faults import wait
from dpnn.comm.mesh import Mesh
from dpnn.comm.ranks import Ranks
from dpnn.data import Batch, Sampler, no_samples
from dpnn.evaluate import Array, Model
from dpnn.plan import Strategy, Sum

_STEPS = 3
"""Of which the first one warms up."""


class Nobody(Strategy, Sum):
    """No other replica: nothing is exchanged, nothing is updated."""

    def begin(self) -> None: ...
    def open(self, lo: int, hi: int) -> None: ...
    def ready(self, lo: int, hi: int) -> None: ...
    def poke(self) -> None: ...
    def tell(self, loss: float) -> None: ...
    def start(self, lo: int, hi: int) -> None: ...
    def finish(self) -> None: ...


def speeds(mesh: Mesh, model: Model, rows: int, limit_s: float) -> Array:
    """Samples a second of every replica, over `rows` samples a step: those of its slowest part.

    Collective; `model` is used up by it.
    """
    layout = model.lay_out(mesh.crew, lambda: model.training(rows))
    executor = model.executor(layout, lambda array: Nobody(), Nobody(), mesh=mesh)
    batch = no_samples(0, 0)
    for inputs in executor.inputs[:1]:
        images, labels, ids = (np.zeros_like(wire.buf) for wire in inputs)
        batch = Batch(images, labels, ids, rows, 0, 0, None)
    times = []
    for _ in range(_STEPS):
        begin = perf_counter()
        executor.run(batch, [(rows, rows)], rows)
        model.memory.wait()
        times.append(perf_counter() - begin)
    mine, parts, found = np.array([min(times[1:])]), np.empty(mesh.parts), np.empty(mesh.replicas)
    wait(mesh.model.Iallgather(mine, parts).Test, "the times of all parts", limit_s)
    wait(mesh.data.Iallgather(parts.max(keepdims=True), found).Test, "the times of all replicas", limit_s)
    return rows / found


def deal(found: Array, lanes: int) -> list[int]:
    """Where each replica's run of lanes begins, and their number: in proportion to the speeds, at least one each."""
    replicas = len(found)
    cuts = [0, *(int(cut) for cut in np.rint(np.cumsum(found) / found.sum() * lanes))]
    for i in range(1, replicas + 1):
        cuts[i] = min(max(cuts[i], cuts[i - 1] + 1), lanes - (replicas - i))
    return cuts


def runs(
    world: Ranks, mesh: Mesh, trial: Callable[[], Model], sampler: Sampler, options: config.Parallel,
    choices: dict[str, str],
) -> list[range]:  # fmt: skip
    """The lanes of each replica by their speeds: as the run chose before, else measured with a `trial`, and kept.

    Collective over the world.
    """
    question = f"lanes {mesh.replicas}x{mesh.parts}"
    if question not in choices:
        rows = sampler.max_micro_rows(mesh.replicas, options.microbatches)
        cuts = deal(speeds(mesh, trial(), rows, options.stall_abort_s), sampler.lanes)
        choices[question] = world.first(lambda: " ".join(map(str, cuts)))
    return [range(lo, hi) for lo, hi in pairwise(map(int, choices[question].split()))]
