"""A server of an asynchronous run, from its building to its last checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dpnn.checkpoint import InParts, Note, new_mark
from dpnn.cluster.signals import StopRequest
from dpnn.comm.faults import tell
from dpnn.comm.mesh import Mesh
from dpnn.comm.watchdog import Watchdog
from dpnn.comm.world import World
from dpnn.course import Course
from dpnn.errors import Stopped
from dpnn.evaluate import Array, choose_backends, segments_of
from dpnn.memory import zeros, zeros_like
from dpnn.native import denormals_flushed
from dpnn.nn.init import draw
from dpnn.observe.folder import RunFolder
from dpnn.observe.metrics import Metrics
from dpnn.optim import STATES, Optimizer, cut
from dpnn.prepare import Start
from dpnn.state import load, sliced
from dpnn.strategies.downpour.cut import Cut
from dpnn.strategies.downpour.host import Host
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.lines import Client
from dpnn.strategies.downpour.order import Order, Replay
from dpnn.strategies.downpour.protocol import Change
from dpnn.strategies.downpour.shard import Shard
from dpnn.team import Team


def serve(world: World, mesh: Mesh, link: Any, request: StopRequest, start: Start, watchdog: Watchdog) -> int:
    """Be a server until the run is over; the exit code."""
    job, number = start.job, mesh.server or 0
    course, folder = Course(start), RunFolder(start.folder)
    team = Team(job.backend.threads or world.threads())
    backends, _ = choose_backends(job, team)
    kernels = backends[0].kernels

    def shard_of(shard: int) -> Shard:
        """A shard, of which all but the numbers of the arrays is as when the run begins."""
        part, lo, hi = course.shards[shard]
        segments = cut(segments_of(course.pieces[part]), lo, hi)

        def make(params: Array, grads: Array, state: dict[str, Array]) -> Optimizer:
            return Optimizer(job.optimizer, segments, params, grads, team, kernels, state)

        params = zeros(hi - lo, backends[0].dtype)
        state = {name: zeros_like(params) for name in STATES[job.optimizer.name]}
        ledger = Ledger(course.lanes, course.total, mesh.replicas, start.train_at.owners) if shard == 0 else None
        if ledger is not None:
            ledger.resume(course.leases)
        made = Shard(params, state, make, course.rate, job.parallel, mesh.replicas, ledger)
        made.steps = course.leases["steps"]
        return made

    own = shard_of(number)
    pieces = course.held(number)
    if start.found is not None:
        load(world, start.found, {name: sliced(pieces, flat) for name, flat in {"": own.params, **own.state}.items()})
    else:
        for piece in pieces:
            flat = own.params[piece.offset : piece.end]
            flat[...] = draw(job.seed, piece.name, piece.spec, piece.lo, piece.hi, flat.dtype)

    name = f"server-{number}-of-{mesh.servers}"
    order = (
        Replay(start.replay / "order" / name)
        if start.replay
        else Order(start.folder / "order" / name if job.parallel.record else None)
    )
    metrics = Metrics(folder.metrics)
    host = Host(
        link, number, [shard.part for shard in course.shards], mesh.parts, own, shard_of, job.parallel, order,
        lambda: request.asked, start.mirrored, world.fail,
    )  # fmt: skip

    def lost(client: Client) -> None:
        metrics.write("event", event="worker_lost", rank=client.rank, replica=client.replica, reason=client.why)
        who = f"rank {client.rank} was lost ({client.why}), and replica {client.replica} with it"
        tell(f"dpnn: {who}; the others go on")
        world.lost = True

    def settled(shard: int, replica: int, missing: int, gone: int) -> None:
        values = {"replica": replica, "server": shard, "missing_steps": missing, "steps_out_of_reach": gone}
        if shard == 0 or missing:
            metrics.write("event", event="loss_settled", **values)
        world.lost = True

    def took_over(dead: int, held: list[int]) -> None:
        rank = world.size - mesh.servers + dead
        metrics.write("event", event="server_lost", server=dead, rank=rank, by=number, shards=held)
        tell(f"dpnn: rank {rank}, a server, was lost; server {number} has its parameters, and goes on")
        if job.parallel.record:
            told = "a server was lost: the order of arrival is not recorded from here on, and can't be replayed"
            metrics.write("event", event="record_ended", text=told)

    def skipped(shard: int, push: Change) -> None:
        values = {"replica": push.replica, "pushes": 1, "steps": push.steps, "number": push.number}
        metrics.write("event", event="update_lost", server=shard, **values)

    def written(steps: int, path: Path) -> None:
        metrics.write("event", event="checkpoint", step=course.shift + steps, path=str(path))

    host.took_over, host.skipped = took_over, skipped
    writer = Shards(start, course, mesh.servers, mesh.crew.first(new_mark))
    every = max(1, round(job.output.checkpoint_every * course.epoch))
    with watchdog, denormals_flushed():  # as where replicas update their own
        host.run(Cut(host, mesh.crew.comm, writer, written, every, lost, settled))
    world.lost = world.lost or bool(host.holders.dead)
    for shard, server in host.servers.items():
        counts = np.trim_zeros(server.shard.histogram, "b").tolist()
        metrics.write("event", event="staleness", server=shard, pushes=counts, discarded=server.shard.discarded)
    if start.mirrored:
        metrics.write("event", event="mirror", server=number, **asdict(host.spent))
    metrics.close()
    return Stopped.exit_code if own.stop and own.steps < course.total else 0


class Shards:
    """Writes the shards of a run's checkpoints."""

    def __init__(self, start: Start, course: Course, servers: int, mark: str) -> None:
        self._start, self._course = start, course
        self._parts = InParts(RunFolder(start.folder).checkpoints, servers, mark)

    def write(self, shard: int, steps: int, params: Array, state: dict[str, Array], note: Note) -> None:
        """A shard, after so many steps of all replicas."""
        pieces = self._course.held(shard)
        slices = {name: sliced(pieces, flat) for name, flat in state.items()}
        self._parts.write(self._course.shift + steps, shard, sliced(pieces, params), slices, note)

    def complete(self, steps: int, leases: dict[str, Any], note: Note) -> Path:
        """A checkpoint, of the shards that are written."""
        epoch, lane = leases["next"]
        epoch, step = min([(epoch, lane), *((run[0], 1) for run in leases["left"])])
        info = {**self._start.info(), "leases": leases}
        keep = self._start.job.output.keep
        return self._parts.complete(self._course.shift + steps, epoch, step, info, keep, note)
