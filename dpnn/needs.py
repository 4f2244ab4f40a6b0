"""How much memory the ranks of a job need, and how much their nodes let them have: seen before any of it is taken.

The kernel ends a rank that takes more than its control group may have, without a word. So a job whose network alone
can't fit is refused; what else a rank needs is known about only, and is told where it may be too much.
"""

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from dpnn import models
from dpnn.comm.faults import deadline
from dpnn.comm.lifted import devices_of
from dpnn.comm.mesh import replicas_of
from dpnn.comm.world import World
from dpnn.data import pools_nbytes
from dpnn.errors import JobError
from dpnn.evaluate import choose_backends
from dpnn.machine import Limits
from dpnn.optim import STATES
from dpnn.plan import Costs, Setting
from dpnn.planning import common, copies, forecaster_of, lasting
from dpnn.prepare import Start
from dpnn.team import Team

GB = 1e9
BESIDE = 0.1 * GB
"""Of a rank, for Python, MPI and other libraries: 0.03 to 0.045 GB that no other process shares were measured; the rest
is for what convolutions want as scratch, and for messages."""
_BUFFERS = 3
"""Batches of a loader."""
_WAY_OUT = (
    "start fewer ranks on a node, or lower train.global_batch (or replica_batch), or raise parallel.microbatches or "
    "parallel.parts"
)


@dataclass(frozen=True)
class Need:
    """Bytes that a rank needs."""

    least: float
    """For the network: parameters, gradients, optimizer, the arrays of the micro-batches."""
    about: float
    """In all, about."""
    copy: float = 0.0
    """More, on the first replica: of what a checkpoint is written from while training goes on."""


def room_of(world: World, start: Start) -> float:
    """Bytes that the network may take on any rank: the least share of all, less what a rank needs beside it.

    On GPUs what is free there. Collective.
    """
    job = start.job
    memory = choose_backends(job, Team(job.backend.threads or world.threads()), world.node.rank)[0][0].memory
    devices = devices_of(world.comm, memory, world.timeout_s)
    if memory.name:
        return world.least(memory.free() / devices.count(devices[world.rank]))
    return world.least(max(world.room.amount - beside(start, world.size), 0.0))


def check_room(world: World, start: Start) -> tuple[tuple[str, str], ...]:
    """What to tell of a job that may need more memory than a node has: an event, or none. Collective.

    JobError where the network alone needs more. Nothing is known of GPUs: they say themselves when they are full.
    """
    most = -int(world.least(-world.node.size))
    needs = world.first(lambda: needs_of(world, start, most))
    if not needs:
        return ()
    parts, servers = start.job.parallel.parts, start.job.parallel.servers
    mine = needs[-1] if world.rank >= world.size - servers else needs[world.rank % parts]
    if world.rank < parts:
        mine = Need(mine.least, mine.about + mine.copy)
    with deadline(world.timeout_s, "comparing what the ranks of a node need", world.fail):
        near: list[Need] = world.node.allgather(mine)
    told = compare(near, world.limits, world.node.rank)
    world.agree(JobError(f"{told}; {_WAY_OUT}") if told.startswith("the network") else None)
    told = world.lowest(told)
    return (("little_memory", told),) if told else ()


def compare(needs: Sequence[Need], limits: Sequence[Limits], rank: int) -> str:
    """What is too little for the ranks of a node, of the groups that `rank` is in; empty where nothing is.

    It begins with "the network" where that is certain. `needs`, `limits`: of all these ranks.
    """
    tight = ""
    for group, limit in limits[rank].items():
        inside = [need for need, others in zip(needs, limits, strict=True) if group in others]
        least, about = sum(need.least for need in inside), sum(need.about for need in inside)
        there = f"and {group} on {socket.gethostname()} lets its {len(inside)} ranks have {limit / GB:.3g} GB"
        if least > limit:
            return f"the network alone needs at least {least / GB:.3g} GB, {there}"
        if about > limit:
            tight = f"the job needs about {about / GB:.3g} GB, {there}: it may be killed"
    return tight


def needs_of(world: World, start: Start, most: int) -> list[Need]:
    """What a rank of each part needs, and last what a server does; nothing where it computes on a GPU.

    `most`: ranks that a node has at most.
    """
    job, parts = start.job, start.job.parallel.parts
    backends, _ = choose_backends(job, Team(job.backend.threads or world.threads()), world.node.rank)
    if backends[0].memory.name:
        return []
    replicas = replicas_of(world.size, parts, job.parallel.servers)
    held = 1 + lasting(job) * copies(job) / common(job, most)
    forecaster = forecaster_of(job, models.graph(job, start.network, start.shape), start.rows, backends, Costs(), held)
    micro = job.train.grains // replicas or job.parallel.microbatches
    found = forecaster.look(Setting(start.placement, micro))
    more = beside(start, world.size)
    itemsize = backends[0].dtype.itemsize
    needs = [
        Need(nbytes, nbytes + (more if part == found.placed.reader else BESIDE), n * lasting(job) * itemsize)
        for part, (nbytes, n) in enumerate(zip(found.nbytes, found.params, strict=True))
    ]
    shard = sum(found.params) * itemsize / max(job.parallel.servers, 1)
    kept, buffers = shard * (1 + len(STATES[job.optimizer.name])), 0
    if start.mirrored:
        from dpnn.strategies.downpour.mirror import BUFFERS  # with what only servers use

        kept, buffers = 2 * kept, BUFFERS
    return [*needs, Need(kept, kept + buffers * shard + BESIDE)]


def beside(start: Start, ranks: int) -> float:
    """Bytes of a rank that reads, beside the network's: libraries, windows of samples, batches; about."""
    job, train = start.job, start.train
    replicas = replicas_of(ranks, job.parallel.parts, job.parallel.servers)
    lanes = 1 if job.parallel.strategy == "downpour" else -(-start.lanes // replicas)
    sample = sum(shard.payload_bytes for shard in train.shards) / train.samples
    pools = min(pools_nbytes(train.samples, lanes, start.window, train.block, sample), job.data.window_mb * 2**20)
    return BESIDE + pools + _BUFFERS * start.rows * math.prod(start.shape) * 4
