"""A server of an asynchronous run, from its building to its last checkpoint."""

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
from dpnn.native import denormals_flushed
from dpnn.nn.init import draw
from dpnn.observe.folder import RunFolder
from dpnn.observe.metrics import Metrics
from dpnn.optim import STATES, Optimizer, cut
from dpnn.plan import clip
from dpnn.prepare import Start
from dpnn.state import load, sliced
from dpnn.strategies.downpour.cut import Cut
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.lines import Client
from dpnn.strategies.downpour.order import Order, Replay
from dpnn.strategies.downpour.server import Server
from dpnn.team import Team


def serve(world: World, mesh: Mesh, link: Any, request: StopRequest, start: Start, watchdog: Watchdog) -> int:
    """Be a server until the run is over; the exit code."""
    job, number = start.job, mesh.server or 0
    course, folder, limit_s = Course(start), RunFolder(start.folder), job.parallel.stall_abort_s
    part, lo, hi = course.shards[number]
    whole = course.pieces[part]
    pieces, segments = clip(whole, lo, hi), cut(segments_of(whole), lo, hi)
    team = Team(job.backend.threads or world.threads())
    backends, _ = choose_backends(job, team)
    kernels = backends[0].kernels

    params = np.zeros(hi - lo, backends[0].dtype)
    state = {name: np.zeros_like(params) for name in STATES[job.optimizer.name]}
    if start.found is not None:
        load(world, start.found, {name: sliced(pieces, flat) for name, flat in {"": params, **state}.items()})
    else:
        for piece in pieces:
            flat = params[piece.offset : piece.end]
            flat[...] = draw(job.seed, piece.name, piece.spec, piece.lo, piece.hi, flat.dtype)

    ledger = None
    if number == 0:
        ledger = Ledger(course.lanes, course.total, mesh.replicas, start.train_at.owners)
        ledger.resume(course.leases)
    name = f"server-{number}-of-{mesh.servers}"
    order = (
        Replay(start.replay / "order" / name)
        if start.replay
        else Order(start.folder / "order" / name if job.parallel.record else None)
    )
    metrics = Metrics(folder.metrics)

    def parting(server: Server) -> None:
        counts = np.trim_zeros(server.histogram, "b").tolist()
        metrics.write("event", event="staleness", server=number, pushes=counts, discarded=server.discarded)
        metrics.close()

    server = Server(
        link, mesh.replicas, params, state,
        lambda params, grads, state: Optimizer(job.optimizer, segments, params, grads, team, kernels, state),
        course.rate, job.parallel, order, ledger, lambda: request.asked, parting, limit_s, mesh.parts, part,
    )  # fmt: skip
    server.steps = course.leases["steps"]

    shards = InParts(folder.checkpoints, mesh.servers, mesh.crew.first(new_mark))

    def lost(client: Client) -> None:
        metrics.write("event", event="worker_lost", rank=client.rank, replica=client.replica, reason=client.why)
        who = f"rank {client.rank} was lost ({client.why}), and replica {client.replica} with it"
        tell(f"dpnn: {who}; the others go on")
        world.lost = True

    def settled(replica: int, missing: int, gone: int) -> None:
        values = {"replica": replica, "server": number, "missing_steps": missing, "steps_out_of_reach": gone}
        if number == 0 or missing:
            metrics.write("event", event="loss_settled", **values)
        world.lost = True

    def write(steps: int, params: Array, state: dict[str, Array], leases: dict[str, Any], note: Note) -> Path | None:
        slices = {name: sliced(pieces, flat) for name, flat in state.items()}
        shards.write(course.shift + steps, number, sliced(pieces, params), slices, note)
        if number != 0:
            return None
        epoch, lane = leases["next"]
        epoch, step = min([(epoch, lane), *((run[0], 1) for run in leases["left"])])
        info = {**start.info(), "leases": leases}
        return shards.complete(course.shift + steps, epoch, step, info, job.output.keep, note)

    def written(steps: int, path: Path) -> None:
        metrics.write("event", event="checkpoint", step=course.shift + steps, path=str(path))

    every = max(1, round(job.output.checkpoint_every * course.epoch))
    with watchdog, denormals_flushed():  # as where replicas update their own
        server.run(Cut(server, mesh.crew.comm, write, written, every, lost, settled).turn)
    return Stopped.exit_code if server.stop and server.steps < course.total else 0
