"""Both sides of Downpour SGD on the ranks of a `Group`, as `dpnn train` builds them, without a loader.

The last rank is the server, all others are workers. Each class here is what such a rank holds; its methods are called
on all ranks at once. A turn of the workers lasts as long as they are told, then they leave, and the server's turn ends.
"""

from collections.abc import Callable, Sequence
from time import perf_counter, sleep
from typing import NamedTuple

import numpy as np
from harness import RATE

from dpnn import config, models
from dpnn.comm.faults import deadline
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.world import World, start
from dpnn.data import Batch
from dpnn.evaluate import Model, choose_backends, segments_of
from dpnn.memory import HOST, zeros
from dpnn.nn import Network, Shape
from dpnn.optim import STATES, Optimizer, Segment
from dpnn.plan import Placed
from dpnn.strategies.allreduce import Allreduce
from dpnn.strategies.downpour.host import loop
from dpnn.strategies.downpour.order import Order
from dpnn.strategies.downpour.server import Server
from dpnn.strategies.downpour.shard import Shard
from dpnn.strategies.downpour.worker import Worker
from dpnn.strategies.flats import Flats
from dpnn.team import Team

LIMIT_S = 60.0
"""How long a rank waits for another."""
WARM_UP = 3
"""Steps of a turn that aren't counted: in the first one all workers wait for the newest parameters."""
POKES = 10
"""So often a rank that sleeps in place of computing lets MPI move: about as often as between LeNet's layers."""
JOB = """
[data]
train = "random numbers"
[model]
name = "given"
[train]
steps = 1
{batch} = {rows}
[optimizer]
name = "sgd"
lr = {rate:f}
[parallel]
stall_abort_s = {limit:f}
{parallel}
[backend]
threads = 1
"""


class Turn(NamedTuple):
    """What one worker did in a turn."""

    rank: int
    rate: float
    """Steps a second."""
    waited: float
    """The share of a step spent waiting."""


class Nothing:
    """In place of an optimizer: parameters stay as they are."""

    def apply(self, lo: int, hi: int, rate: float, scale: float = 1.0, streams: bool = False) -> None:
        """Nothing."""


def asynchronous(rows: int, ahead: int) -> config.Job:
    """A job of Downpour SGD with a server; everything is pushed and fetched in every step."""
    parallel = f'strategy = "downpour"\nservers = 1\nfetch_ahead = {ahead}'
    return config.parse(JOB.format(batch="replica_batch", rows=rows, rate=RATE, limit=LIMIT_S, parallel=parallel))


def ones(n: int) -> np.ndarray:
    """As those of `dpnn train`; what was only reserved has no memory yet, and would be read from one page."""
    array = zeros(n, np.float32)
    array[:] = 1
    return array


def pause(seconds: float, poke: Callable[[], None]) -> None:
    """Sleep in place of computing; what `poke` takes comes on top."""
    slept = 0.0
    for i in range(POKES if seconds else 0):
        begin = perf_counter()
        sleep(max(0.0, seconds * (i + 1) / POKES - slept))
        slept += perf_counter() - begin
        poke()


class Line:
    """What lies between the workers and the server of `comm`: this rank's end, over the flat arrays of a network.

    `applies`: whether the server applies what is pushed; else it does all but that.
    """

    def __init__(
        self,
        world: World,
        members: Sequence[int],
        job: config.Job,
        params: np.ndarray,
        grads: np.ndarray,
        segments: Sequence[Segment],
        applies: bool = True,
    ) -> None:
        """Collective over all ranks of the world, of which `members` are on the line."""
        with deadline(LIMIT_S, "laying a line", world.fail):
            comm = world.comm.Split(0 if world.rank in members else 1, world.rank)
        team = Team(1)
        kernels = choose_backends(job, team)[0][0].kernels

        def make(params: np.ndarray, grads: np.ndarray, state: dict[str, np.ndarray]) -> Optimizer | Nothing:
            return Optimizer(job.optimizer, segments, params, grads, team, kernels, state) if applies else Nothing()

        self._rank = world.rank
        self.worker: Worker | None = None
        self.server: Server | None = None
        if world.rank not in members:
            return
        workers = len(members) - 1
        if comm.rank == workers:
            shard = Shard(params, {}, make, lambda steps: RATE, job.parallel, workers)
            self.server = Server(comm, 0, shard, job.parallel, Order(), lambda: False)
        else:
            descent = Optimizer(job.optimizer, segments, params, grads, team, kernels)
            n_trained = sum(segment.hi - segment.lo for segment in segments if not segment.statistic)
            self.worker = Worker(comm, workers, params, grads, n_trained, descent, job)
            self.worker.rate, self.worker.samples = RATE, max(job.train.replica_batch, 1)

    def turn(self, seconds: float, step: Callable[[Worker], object]) -> Turn | None:
        """The server serves until all workers have left; a worker takes steps for so long. None: not a worker."""
        if self.server:
            self._serve(self.server)
        return self._work(self.worker, seconds, step) if self.worker else None

    def _work(self, worker: Worker, seconds: float, step: Callable[[Worker], object]) -> Turn:
        worker.join()
        steps, waited, taken = -WARM_UP, 0.0, 0.0
        begin = perf_counter()
        while steps < 1 or taken < seconds:
            step(worker)
            steps += 1
            taken = perf_counter() - begin
            if steps > 0:
                waited += worker.wait_s
            elif steps == 0:
                begin = perf_counter()
        worker.leave()
        worker.links.wait(lambda: all(map(worker.links.have_left, range(2))), "the server to take the last push")
        return Turn(self._rank, steps / taken, waited / taken)

    def _serve(self, server: Server) -> None:
        shard = server.shard
        shard.left = len(shard.accounts)
        for account in shard.accounts:
            account.left = False
        loop(server.turn, lambda: shard.left == 0, LIMIT_S)


def computing(seconds: float) -> Callable[[Worker], None]:
    """A step that sleeps so long in place of computing."""

    def step(worker: Worker) -> None:
        worker.begin()
        pause(seconds, worker.poke)
        worker.tell(1.0)
        worker.finish()

    return step


class Pair:
    """A worker and a server over `nbytes` of float32, and what MPI and a copy do with as many."""

    def __init__(self, nbytes: int) -> None:
        """Collective."""
        self._world = world = start(LIMIT_S)
        job, n = asynchronous(1, 0), nbytes // 4
        whole = [Segment(0, n, decay=True, statistic=0.0)]
        arrays = ones(n), ones(n)
        self._lines = {applies: Line(world, (0, 1), job, *arrays, whole, applies) for applies in (False, True)}
        self._peers = {False: [np.ones(n, np.float32) for _ in range(2)], True: [ones(n), ones(n)]}

    def cycle(self, applies: bool, seconds: float) -> Turn | None:
        """Pushes and fetches, one after the other, by turns."""
        return self._lines[applies].turn(seconds, computing(0.0))

    def streams(self) -> bool:
        """Whether the server found it faster, when it last tried, to store parameters past the caches."""
        server = self._lines[True].server
        return server is not None and server.shard.copies.stores.streams

    def ping_pong(self, large: bool, number: int) -> float:
        """Seconds for a message there and another one back, from arrays of NumPy's or in `large` pages."""
        comm, other = self._world.comm, 1 - self._world.rank
        source, target = self._peers[large]
        with deadline(LIMIT_S, "ping-pong", self._world.fail):
            for i in range(number + WARM_UP):
                if i == WARM_UP:
                    begin = perf_counter()
                if self._world.rank == 0:
                    comm.Send(source, other)
                    comm.Recv(target, other)
                else:
                    comm.Recv(target, other)
                    comm.Send(source, other)
        return (perf_counter() - begin) / number

    def copy(self, number: int) -> float:
        """Seconds of a copy in memory, on the server; 0 on the other rank, which does nothing meanwhile."""
        if self._world.rank == 0:
            return 0.0
        source, target = self._peers[False]
        np.copyto(target, source)
        begin = perf_counter()
        for _ in range(number):
            np.copyto(target, source)
        return (perf_counter() - begin) / number


class Training:
    """Workers that train a network, `rows` random samples each, and a server."""

    def __init__(self, network: Network, shape: Shape, rows: int) -> None:
        """Collective."""
        world = start(LIMIT_S)
        mesh = Mesh(world, servers=1)
        job = asynchronous(rows, 1)
        model = Model(job, Placed.whole(models.graph(job, network, shape)), 0, 1)
        store = model.store
        store.draw(job.seed)
        segments = segments_of(store.pieces)
        self._line = Line(world, range(world.size), job, store.params, store.grads, segments)
        if mesh.server is not None:
            return
        layout = model.lay_out(mesh.crew, lambda: model.training(rows))
        self._executor = model.executor(layout, strategy=self._line.worker)
        rng = np.random.default_rng(mesh.replica)
        (classes,) = model.graph.nodes[model.graph.output].shape
        x, labels = rng.standard_normal((rows, *shape), np.float32), rng.integers(0, classes, rows, np.int32)
        ids = np.arange(rows, dtype=np.uint64) + mesh.replica * rows
        self._step = (Batch(x, labels, ids, rows, 0, 0, None), [(rows, rows)], rows)

    def turn(self, seconds: float) -> Turn | None:
        """Steps over the batch."""
        return self._line.turn(seconds, lambda worker: self._executor.run(*self._step))


class Sleeping:
    """Workers that sleep in place of computing, and a server, over `n` numbers.

    `groups`: numbers of workers, for each of which there is a line; on each the server is the last rank of all.
    """

    def __init__(self, n: int, rows: int, groups: Sequence[int]) -> None:
        """Collective."""
        self._world = world = start(LIMIT_S)
        job, whole = asynchronous(rows, 1), [Segment(0, n, decay=True, statistic=0.0)]
        params, grads = ones(n), ones(n)
        server = world.size - 1
        self._lines = {k: Line(world, (*range(k), server), job, params, grads, whole) for k in groups}

    def turn(self, workers: int, seconds: float, sleeps_s: Sequence[float]) -> Turn | None:
        """So many workers; worker i sleeps sleeps_s[i] a step, the last of them if there are more workers."""
        own_s = sleeps_s[min(self._world.rank, len(sleeps_s) - 1)]
        return self._lines[workers].turn(seconds, computing(own_s))


class Together:
    """Synchronous training, all ranks of it, over `n` numbers: they sleep in place of computing."""

    def __init__(self, n: int, rows: int) -> None:
        """Collective."""
        world = start(LIMIT_S)
        mesh = Mesh(world)
        job = config.parse(JOB.format(batch="replica_batch", rows=rows, rate=RATE, limit=LIMIT_S, parallel=""))
        team = Team(1)
        kernels = choose_backends(job, team)[0][0].kernels
        node = Node(mesh, n, np.dtype(np.float32), STATES[job.optimizer.name], kernels, LIMIT_S)
        whole = [Segment(0, n, decay=True, statistic=0.0)]
        flats = Flats.of(HOST, node)
        optimizer = flats.optimizer(job.optimizer, whole, node.sums, team, kernels)
        self._strategy = Allreduce(mesh, node, flats, optimizer, job)
        self._strategy.rate, self._strategy.samples = RATE, rows
        self._n, self._world = n, world

    def turn(self, steps: int, sleeps_s: Sequence[float]) -> Turn:
        """So many steps, after those that warm up; rank i sleeps sleeps_s[i] in each."""
        strategy, own_s, waited = self._strategy, sleeps_s[min(self._world.rank, len(sleeps_s) - 1)], 0.0
        for i in range(WARM_UP + steps):
            if i == WARM_UP:
                begin, waited = perf_counter(), 0.0
            strategy.begin()
            strategy.open(0, self._n)
            pause(own_s, strategy.poke)
            strategy.tell(1.0)
            strategy.ready(0, self._n)
            strategy.finish()
            waited += strategy.wait_s
        taken = perf_counter() - begin
        return Turn(self._world.rank, steps / taken, waited / taken)
