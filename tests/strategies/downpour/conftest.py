"""Runs of Downpour SGD on this test's ranks, put together as dpnn/asynchronous.py does it, without a network: a test's
own function says what the gradient of a step is.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpnn import config
from dpnn.comm.mesh import Mesh
from dpnn.data import Run
from dpnn.optim import STATES, Optimizer, Segment, cut
from dpnn.strategies.downpour.cut import Cut
from dpnn.strategies.downpour.host import Host
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.order import Order, Replay
from dpnn.strategies.downpour.protocol import shards
from dpnn.strategies.downpour.shard import Shard
from dpnn.strategies.downpour.worker import Worker
from dpnn.team import Team

NEVER = 10**9
JOB = """
data.train = "none"
model.name = "none"
train = {steps = 1, replica_batch = 1}
optimizer = {name = "sgd", lr = 1}
parallel = {strategy = "downpour", stall_abort_s = 30}
"""


@dataclass
class Me:
    """A worker, as the test's function sees it in the middle of a step: after `begin`, before `finish`."""

    replica: int
    others: Any
    """The communicator of the workers."""
    worker: Worker
    params: np.ndarray
    """The flat array: what was fetched, and this worker's own steps since."""
    number: int = 0
    """Of the step, counted by this worker."""
    at: tuple[int, int, int] = (0, 0, 0)
    """Of the step: epoch, lane, and step of the lane."""
    log: list[Any] = field(default_factory=list)
    """What the test's function notes; all ranks get it in the end."""


@pytest.fixture
def downpour(world):
    """downpour(gradient, *settings, servers=1, n=100, lanes=[5] * 8, ...) -> what came out of a run, on every rank.

    `gradient(me)` is called on the workers in every step. `total`: steps, else one epoch; `start`: the parameters;
    `every`: steps from one checkpoint to the next; `record`, `replay`: folders; `asked()`: whether a server is asked to
    stop; `lingers_s`: how long the first worker takes from its last step to saying that it is done.
    Returned: `params`, `servers` and `workers` by their numbers, `checkpoints`, `ledgers`: their states by steps.
    """

    def run(
        gradient, *settings, servers=1, n=100, lanes=(5,) * 8, total=None, start=0.0, every=NEVER,
        record=None, replay=None, asked=lambda: False, lingers_s=0.0,
    ):  # fmt: skip
        job = config.parse(JOB, [f"parallel.servers={servers}", *settings])
        mesh, link = Mesh(world, servers=servers), world.comm.Dup()
        if mesh.server is None:
            told = work(job, mesh, link, n, gradient, lingers_s)
        else:
            order = order_of(mesh, record, replay)
            ledger = Ledger(lanes, sum(lanes) if total is None else total, mesh.replicas)
            told = serve(job, mesh, link, n, ledger, start, every, order, asked)
        link.Free()
        for comm in [mesh.crew.comm, *([mesh.data, mesh.model, mesh.node, mesh.across] if mesh.server is None else [])]:
            comm.Free()
        return outcome(world.comm.allgather(told), mesh.replicas)

    return run


def order_of(mesh: Mesh, record: Path | None, replay: Path | None) -> Order:
    name = f"server-{mesh.server}"
    return Replay(replay / name) if replay else Order(record / name if record else None)


def shard_of(job, mesh, n, number, ledger=None, start=0.0) -> Shard:
    """One of a server's, with all numbers alike."""
    lo, hi = shards(n, mesh.servers)[number]
    params = np.full(hi - lo, start, np.float64)
    state = {name: np.zeros(hi - lo) for name in STATES[job.optimizer.name]}
    segments = cut([Segment(0, n, False, 0.0)], lo, hi)

    def make(params, grads, state):
        return Optimizer(job.optimizer, segments, params, grads, Team(1), None, state)

    return Shard(params, state, make, lambda step: job.optimizer.lr, job.parallel, mesh.replicas, ledger)


class Memory:
    """Checkpoints that are kept there."""

    def __init__(self) -> None:
        self.written, self.ledgers = {}, {}

    def write(self, shard, steps, params, state, note) -> None:
        self.written[steps] = params.copy(), {name: array.copy() for name, array in state.items()}

    def complete(self, steps, leases, note) -> Path:
        self.ledgers[steps] = leases
        return Path(str(steps))


def serve(job, mesh, link, n, ledger, start, every, order, asked) -> SimpleNamespace:
    """Be a server to the end; what is known of it then."""
    own = shard_of(job, mesh, n, mesh.server, ledger if mesh.server == 0 else None, start)
    memory, told = Memory(), []
    host = Host(
        link, mesh.server, [0] * mesh.servers, 1, own, lambda number: shard_of(job, mesh, n, number), job.parallel,
        order, asked, mirrored=job.parallel.mirror and mesh.servers > 1, fail=pytest.fail,
    )  # fmt: skip
    host.run(Cut(host, mesh.crew.comm, memory, lambda steps, path: told.append((steps, path)), every))
    assert told == ([(steps, Path(str(steps))) for steps in memory.written] if mesh.server == 0 else [])
    return SimpleNamespace(
        params=own.params, state=own.state, written=memory.written, ledgers=memory.ledgers, version=own.version,
        steps=own.steps, samples=own.samples, loss=own.loss, discarded=own.discarded,
        histogram=np.trim_zeros(own.histogram, "b").tolist(), pushes=[account.pushes for account in own.accounts],
    )  # fmt: skip


def work(job, mesh, link, n, gradient, lingers_s) -> SimpleNamespace:
    """Be a worker to the end; what is known of it then."""
    params, grads = np.full(n, np.nan), np.full(n, np.nan)
    local = Optimizer(job.optimizer, [Segment(0, n, False, 0.0)], params, grads, Team(1))
    if job.optimizer.name != "sgd":
        plain = config.Optimizer(name="sgd", lr=job.optimizer.lr)
        local = Optimizer(plain, [Segment(0, n, False, 0.0)], params, grads, Team(1))
    worker = Worker(link, mesh.replicas, params, grads, n, local, job)
    me = Me(mesh.replica, mesh.crew.comm, worker, params)
    taken = []
    run = worker.lease()
    if run is not None:
        worker.join()
    while run is not None and not worker.stop:
        taken += take(run, me, grads, gradient)
        run = None if worker.stop else worker.lease()
    time.sleep(lingers_s if mesh.replica == 0 else 0.0)
    worker.leave()
    worker.await_others()
    worker.join()
    if not worker.await_end(mesh.replica).over:
        worker.await_checkpoint()
        worker.end()
    worker.part()
    return SimpleNamespace(params=params, log=me.log, taken=taken, stop=worker.stop)


def take(run: Run, me: Me, grads: np.ndarray, gradient) -> list[tuple[int, int, int]]:
    """The steps of a lease, up to where the run stops."""
    taken, worker = [], me.worker
    for step in range(run.first, run.last + 1):
        me.at = (run.epoch, run.lanes.start, step)
        worker.samples, worker.rate = 1, worker.known.rate
        worker.begin()
        grads[:] = gradient(me)
        worker.tell(1.0)
        worker.finish()
        me.number += 1
        taken.append(me.at)
        if worker.stop:
            break
    return taken


def outcome(told: list[SimpleNamespace], workers: int) -> SimpleNamespace:
    """Of all ranks, put together: whole parameters, whole checkpoints."""
    servers = told[workers:]
    steps = servers[0].written.keys()
    assert all(server.written.keys() == steps for server in servers)
    return SimpleNamespace(
        workers=told[:workers],
        servers=servers,
        params=np.concatenate([server.params for server in servers]),
        ledgers=servers[0].ledgers,
        checkpoints={step: np.concatenate([server.written[step][0] for server in servers]) for step in steps},
    )
