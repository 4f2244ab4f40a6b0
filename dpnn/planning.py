"""Where the layers of a network go, and in how many micro-batches: settled once, when a run starts."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from dpnn import config
from dpnn.backends.base import Backend
from dpnn.comm.crossing import measured_crossing
from dpnn.comm.losses import survives
from dpnn.comm.world import World
from dpnn.evaluate import choose_backends
from dpnn.nn import Graph
from dpnn.observe.folder import RunFolder
from dpnn.optim import STATES
from dpnn.plan import Costs, Forecast, Forecaster, Placement, Setting, choose, measured, place
from dpnn.team import Team


def is_open(job: config.Job) -> bool:
    """Whether measured costs decide where layers go, or in how many micro-batches."""
    return job.parallel.parts > 1 and (isinstance(job.parallel.placement, str) or not job.parallel.microbatches)


def assumed(job: config.Job, graph: Graph, rows: int) -> Placement:
    """The placement of a job by assumed costs; of a job that isn't open, the one that it has.

    `rows`: the most samples of a replica's step. JobError where it can't be, with the nearest that can.
    """
    parallel = job.parallel
    backends, _ = choose_backends(job, Team(1))
    if parallel.placement != "auto" or parallel.memory_gb:
        return forecasts(job, graph, rows, backends, Costs())[0][1].setting.placement
    return place(graph, parallel.parts, "depth", forecaster_of(job, graph, rows, backends, Costs()).loads(1))


def forecaster_of(
    job: config.Job, graph: Graph, rows: int, backends: Sequence[Backend], costs: Costs, held: float | None = None
) -> Forecaster:
    """Forecasts for a job; `held`: numbers that a rank has for each parameter, None: as many as it has by itself."""
    return Forecaster(graph, backends, rows, lasting(job) - 1, costs, job.parallel.pipeline, held)


def lasting(job: config.Job) -> int:
    """Numbers that checkpoints have of each parameter and workers keep: itself, and the optimizer's state."""
    return 1 if job.parallel.strategy == "downpour" else 1 + len(STATES[job.optimizer.name])  # there it is the servers'


def common(job: config.Job, ranks: int) -> int:
    """How many of `ranks` on a node have one and the same parameters and state in common (comm/node.py), at most."""
    return max(1, -(-ranks // job.parallel.parts)) if job.parallel.strategy == "allreduce" else 1


def copies(job: config.Job) -> int:
    """How often a rank has them: once more where steps may have to be taken back (comm/undo.py)."""
    return 2 if survives() and job.parallel.strategy != "downpour" else 1


def forecasts(
    job: config.Job,
    graph: Graph,
    rows: int,
    backends: Sequence[Backend],
    costs: Costs,
    room: float = math.inf,
    held: float | None = None,
) -> list[tuple[str, Forecast]]:
    """What the job's placement would bring, the best first; JobError where there is none.

    `room`: bytes that a rank should stay under where the job doesn't say (parallel.memory_gb). `held`: as for
    `forecaster_of`.
    """
    parallel, forecaster = job.parallel, forecaster_of(job, graph, rows, backends, costs, held)
    microbatches = 1 if job.train.reproducible else parallel.microbatches
    return choose(forecaster, parallel.parts, parallel.placement, microbatches, parallel.memory_gb, room)


def question(job: config.Job, rows: int) -> str:
    """What a setting that was chosen holds for."""
    parallel = job.parallel
    wanted = [parallel.placement, parallel.microbatches, parallel.pipeline, parallel.memory_gb]
    return f"placement over {parallel.parts} parts, {rows} samples: {json.dumps(wanted)}"


def settle(
    world: World, folder: RunFolder, job: config.Job, graph: Graph, rows: int, room_of: Callable[[], float]
) -> tuple[Setting, dict[str, str]]:
    """Where layers go, and what is to be kept in choices.json for it. Collective, as is `room_of` (see `forecasts`).

    What the run chose when it began on as many parts is kept; else costs are measured: those of layers on the first
    rank, those of messages between neighbours.
    """
    asked = question(job, rows)
    kept = world.first(lambda: folder.read_choices().get(asked, ""))
    if kept:
        return read(kept), {asked: kept}
    # A gradient; what is kept, in common with others; as much again while a checkpoint is written.
    held = None if job.parallel.memory_gb else 1 + lasting(job) * (copies(job) / common(job, world.node.size) + 1)
    room = room_of()
    latency, bandwidth = measured_crossing(world.comm, world.timeout_s)
    threads = job.backend.threads or world.threads()

    def chosen() -> tuple[str, Costs]:
        backends, _ = choose_backends(job, Team(threads), world.node.rank)
        costs = measured(graph, job.parallel.parts, backends, rows)
        costs = replace(costs, latency=latency, crossing=bandwidth)
        return written(forecasts(job, graph, rows, backends, costs, room, held)[0][1].setting), costs

    kept, costs = world.first(chosen)
    return read(kept), {asked: kept, COSTS: costs.dump()}


COSTS = "costs"
"""Measured costs, by their name in choices.json: `dpnn plan RUN` goes by them."""


def written(setting: Setting) -> str:
    """A setting as text."""
    placement = setting.placement
    shards = [[node, *parts] for node, parts in sorted(placement.shards.items())]
    return json.dumps([placement.parts, placement.part_of, shards, setting.microbatches])


def read(text: str) -> Setting:
    """A setting of its text."""
    parts, part_of, shards, microbatches = json.loads(text)
    return Setting(Placement(parts, tuple(part_of), {node: tuple(own) for node, *own in shards}), microbatches)
