"""A server: one shard of the parameters, and what the optimizer keeps of it.

One loop, which never blocks: hear requests, receive announced gradients into a few buffers, serve who is ready, one
after the other, each worker's requests in its order. Workers whose messages take long hold up nobody but themselves.
Where a worker fetches with its push, it gets the new version piece by piece, while the next piece is updated.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dpnn import config
from dpnn.comm.faults import reported, wait
from dpnn.comm.pulse import PULSE
from dpnn.errors import RankError
from dpnn.optim import Optimizer
from dpnn.strategies.downpour.copies import Copies, Copy
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.order import Order
from dpnn.strategies.downpour.protocol import Answer, Array, Kind, Lease, Letter, Request, Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_STAGED = 4
"""Buffers for gradients that are on their way."""
_EAGER_S, _NAP_SHARE, _LONGEST_NAP_S = 1e-3, 0.1, 5e-4
"""How long an idle server only gives way to other processes; then it sleeps between two looks, for a share of the time
that it has been idle."""
_BINS = 128
"""Of the histogram of staleness; the last one has all that is more."""


class Client:
    """What a server knows of a worker."""

    def __init__(self, replica: int, rank: int) -> None:
        self.replica, self.rank = replica, rank
        self.letter = Letter(Request)
        self.request = Request(Kind.ALIVE)
        """What it wants now."""
        self.answers = {tag: Letter(Answer) for tag in (Tag.ANSWER, Tag.LEASED)}
        self.staged = -1
        """The buffer that its gradients are in."""
        self.announced = self.arrived = False
        """Whether it has said so; whether they are."""
        self.pushes = self.staleness = self.lead = 0
        """Pushes that were applied; the staleness of the last one; steps, as far as `parallel.lead` counts them."""
        self.joined = self.left = False


class Server:
    """Serves `workers` replicas, until the first of them says that the run is over.

    They are the ranks of `comm` from 0 on; where each is spread over several `parts`, those with the same `part`.
    """

    def __init__(
        self,
        comm: "MPI.Comm",
        workers: int,
        params: Array,
        state: dict[str, Array],
        make: Callable[[Array, Array, dict[str, Array]], Optimizer],
        rate: Callable[[int], float],
        options: config.Parallel,
        order: Order,
        ledger: Ledger | None,
        asked: Callable[[], bool],
        parting: Callable[["Server"], None],
        limit_s: float,
        parts: int = 1,
        part: int = 0,
    ) -> None:
        """`params`, `state`: of this shard. `make(params, grads, state)`: an optimizer over such arrays.

        `rate`: the learning rate by the number of steps of all replicas. `ledger`: on the first server. `asked`:
        whether this rank was asked to stop. `parting` is called when the run is over.
        """
        from mpi4py import MPI

        self._mpi, self._comm, self._options, self._order = MPI, comm, options, order
        self.ledger, self._asked, self._rate, self.make = ledger, asked, rate, make
        self._parting, self.limit_s = parting, limit_s
        self._policy, self._bound = options.staleness.policy, options.staleness.bound
        self.state = state
        self._copies = Copies(params)
        n = workers if order.replays else min(workers, _STAGED)
        self._staged = [np.empty_like(params) for _ in range(n)]
        self._free = list(range(n))
        self.clients = [Client(replica, replica * parts + part) for replica in range(workers)]
        self.left = workers
        """Workers that may still push."""
        self._listens = [comm.Recv_init(client.letter.bytes, client.rank, Tag.REQUEST) for client in self.clients]
        self._requests: list[MPI.Request] = [*self._listens, *[MPI.REQUEST_NULL] * n]
        """The next request of every worker, then the gradients for every buffer."""
        self._holders = [-1] * n
        """Whose gradients a buffer is for."""
        self._keeps = n == workers
        """Whether there is a buffer for every worker: then gradients are received before they are announced."""
        self._announced: deque[int] = deque()
        """Who has gradients for which there is no buffer yet."""
        self._ready: deque[int] = deque()
        self._too_far: list[int] = []
        """Who is too far ahead of the slowest to be answered."""
        self._sends: list[tuple[list[MPI.Request], Copy | None]] = []
        """What is being sent, and of which copy."""
        self.version = self.steps = self.samples = self.bad = self.discarded = self.alive = 0
        self.loss = 0.0
        self.stop = self.closing = self.closed = self.frozen = False
        """`frozen`: nothing is served for a moment. `closing`: the first worker wants to close."""
        self.histogram = np.zeros(_BINS, np.int64)
        """Pushes by staleness: updates of this shard since the parameters that they were computed from."""
        self.watch: Callable[[Client, float, float], None] = lambda client, rate, scale: None
        """Told of every push, with the rate and the scale that it was applied at (0: not at all)."""
        for client, listen in zip(self.clients, self._listens, strict=True):
            listen.Start()
            if self._keeps:
                self._grant(client)

    @property
    def params(self) -> Array:
        """The newest."""
        return self._copies.newest.params

    def run(self, also: Callable[[], bool]) -> None:
        """Serve until `closed`. `also` is done in every turn too; it returns whether it has moved anything.

        RankError where no worker is heard of for `limit_s` seconds, or MPI reports an error.
        """
        with reported("serving the workers"):
            self._run(also)

    def _run(self, also: Callable[[], bool]) -> None:
        PULSE.doing = "serving"
        while not self.closed:
            if not self._turn(also):
                with PULSE.waiting("a worker to ask for something", time.monotonic(), idle=True):
                    self._idle(also)

    def _turn(self, also: Callable[[], bool]) -> bool:
        """Do what there is to do; whether there was anything."""
        PULSE.beats += 1
        return self._hear() | self._sent() | self._serve() | also()

    def _idle(self, also: Callable[[], bool]) -> None:
        """Return when there was something to do again."""
        begin, limit_s = time.monotonic(), self.limit_s
        while not self._turn(also):
            idle = time.monotonic() - begin
            if idle > limit_s:
                raise RankError(
                    f"a server has heard of no worker for {limit_s:g} s: they have stopped, or a step takes longer; "
                    "if all ranks are well, raise parallel.stall_abort_s"
                )
            if idle < _EAGER_S:
                os.sched_yield()
            else:
                time.sleep(min(_NAP_SHARE * idle, _LONGEST_NAP_S))

    def gradients(self, client: Client) -> Array:
        """What the client has pushed and is being applied."""
        return self._staged[client.staged]

    def close(self) -> None:
        """The run is over, and all is written: say so, see off what is being sent, and hear no more."""
        self._order.flush()
        self._parting(self)
        self._answer(self.clients[0], Tag.LEASED)
        self.closed = True

        def sent() -> bool:
            self._sent()
            return not self._sends

        wait(sent, "the workers to take their last parameters", self.limit_s)
        for request in self._requests:
            if request != self._mpi.REQUEST_NULL:
                request.Cancel()
                request.Wait()
        for listen in self._listens:
            listen.Free()

    def _hear(self) -> bool:
        """Take what has arrived; give buffers to gradients that were announced."""
        if self._order.stops(not self.stop and self._asked()):
            self.stop = True
        self._comm.Iprobe()  # MPI moves; a Testsome that finds something doesn't look for more
        arrived = self._mpi.Request.Testsome(self._requests) or ()
        for place in arrived:
            if place >= len(self.clients):
                client = self.clients[self._holders[place - len(self.clients)]]
                client.arrived = True
                if client.announced:
                    self._ready.append(client.replica)
                continue
            client = self.clients[place]
            client.request = client.letter.read()
            if client.request.stop and not self.stop and self._order.stops(True):
                self.stop = True
            self._look_at(client)
        while self._announced and self._free:
            self._grant(self.clients[self._announced.popleft()])
        return bool(arrived)

    def _grant(self, client: Client) -> None:
        """Receive its next gradients."""
        client.staged = buffer = self._free.pop()
        self._holders[buffer] = client.replica
        arrival = self._comm.Irecv(self._staged[buffer], client.rank, Tag.GRADIENTS)
        self._requests[len(self.clients) + buffer] = arrival

    def _look_at(self, client: Client) -> None:
        """See what a client wants: it is ready to be served, has to wait, or needs no place in the order."""
        kind, replica = client.request.kind, client.replica
        if kind == Kind.PUSH:
            client.announced = True
            if client.arrived:
                self._ready.append(replica)
            elif client.staged < 0:
                self._announced.append(replica)
        elif kind == Kind.FETCH and self._is_too_far(client):
            self._too_far.append(replica)
        elif kind == Kind.FETCH or (kind == Kind.LEASE and not client.left):
            self._ready.append(replica)
        else:
            self._note(client, kind)
            self._listens[replica].Start()

    def _note(self, client: Client, kind: int) -> None:
        if kind == Kind.ALIVE:
            self.alive += 1
        elif kind == Kind.LEASE:  # it asks whether the others have left
            self._answer(client, Tag.LEASED)
        elif kind == Kind.CLOSE:
            self.closing = True
        else:
            client.left = True
            self.left -= 1
            self._let_go()

    def _serve(self) -> bool:
        """Serve one who is ready, if there is one."""
        ready = self._ready
        if self.frozen or not ready:
            return False
        copy: Copy | None = self._copies.newest
        if self._copies.newest.readers and any(self._kind(replica) == Kind.PUSH for replica in ready):
            copy = self._copies.to_write()
        if copy is None:  # whatever isn't an update goes on
            ready = deque(replica for replica in ready if self._kind(replica) != Kind.PUSH)
        replica = self._order.pick(ready, self._kind)
        if replica is None:
            return False
        if copy is None:
            self._ready.remove(replica)
        client, kind = self.clients[replica], self._kind(replica)
        if kind == Kind.PUSH and copy is not None:
            self._apply(client, copy)
            return True
        if kind == Kind.FETCH:
            self._send(self._copies.newest, client)
            self._fetched(client)
        elif self._lease(client):
            self._order.served(replica, kind)
        self._listens[replica].Start()
        return True

    def _kind(self, replica: int) -> int:
        return self.clients[replica].request.kind

    def _apply(self, client: Client, copy: Copy) -> None:
        """Update by a push, unless it is too stale; send what comes of it to who wants it, if that is its turn."""
        push = client.request
        policy, bound = self._policy, self._bound
        client.staleness = self.version - push.base
        scale = 1.0 / client.staleness if policy == "scale" and client.staleness > 1 else 1.0
        rate = self._rate(self.steps)
        client.pushes += 1
        client.lead += push.steps
        fetches = bool(push.fetch) and not self._is_too_far(client)
        to = client if fetches and self._order.follows(client.replica, Kind.FETCH) else None
        if policy == "discard" and client.staleness > bound:
            self.discarded += 1
            scale = 0.0
            if to:
                self._send(self._copies.newest, to)
        else:
            self._update(client, copy, rate, scale, to)
        self.histogram[min(client.staleness, _BINS - 1)] += 1
        self.steps += push.steps
        PULSE.step = self.steps
        self.samples += push.samples
        self.loss += push.loss
        self.bad += push.bad
        if self.ledger is not None:
            self.ledger.arrived(client.replica, push.steps)
        self.watch(client, rate, scale)
        self._free.append(client.staged)
        client.staged, client.announced, client.arrived = -1, False, False
        if self._keeps:
            self._grant(client)
        self._let_go()
        self._order.served(client.replica, Kind.PUSH)
        if to:
            self._fetched(client)
        elif push.fetch:
            client.request = Request(Kind.FETCH)
            self._look_at(client)
            return
        self._listens[client.replica].Start()

    def _update(self, client: Client, copy: Copy, rate: float, scale: float, to: Client | None) -> None:
        """Write the next version into a copy, and send it piece by piece."""
        optimizer = copy.optimizers.get(client.staged)
        if optimizer is None:
            optimizer = self.make(copy.params, self.gradients(client), self.state)
            copy.optimizers[client.staged] = optimizer
        old = self._copies.newest
        if to is None:
            copy.update(0, copy.params.size, old, optimizer, rate, scale)
        else:
            self._send(copy, to, lambda lo, hi: copy.update(lo, hi, old, optimizer, rate, scale))
        self._copies.newest = copy
        self.version += 1

    def _send(self, copy: Copy, to: Client, before: Callable[[int, int], None] = lambda lo, hi: None) -> None:
        """Send a copy, which isn't written before it has been sent. `before` is called before each slice leaves."""
        sends = []
        for lo, hi, piece in copy.pieces:
            before(lo, hi)
            sends.append(self._comm.Isend(piece, to.rank, Tag.PARAMS))
        copy.readers += 1
        self._sends.append((sends, copy))

    def _fetched(self, client: Client) -> None:
        """Say what the numbers are that a client was sent."""
        self._answer(client, Tag.ANSWER)
        self._order.served(client.replica, Kind.FETCH)

    def _sent(self) -> bool:
        """Forget what has been sent."""
        sends, self._sends = self._sends, []
        for requests, copy in sends:
            if not self._mpi.Request.Testall(requests):
                self._sends.append((requests, copy))
            elif copy:
                copy.readers -= 1
        return len(self._sends) < len(sends)

    def _lease(self, client: Client) -> bool:
        """Answer who asks for work; whether the answer stands: it may have to ask again."""
        others_wait = self.steps < self._options.warmup_steps and not self.clients[0].left
        if self.ledger is None or self.stop:
            self._answer(client, Tag.LEASED)
            return True
        if client.replica and others_wait and not self._order.replays:
            self._answer(client, Tag.LEASED, Lease.WAIT)
            return False
        run = self.ledger.lease(client.replica)
        if run is None:
            self._answer(client, Tag.LEASED)
            return True
        if not client.joined:
            client.joined = True
            client.lead = self._slowest(client)
        self._answer(client, Tag.LEASED, Lease.LANE, (run.epoch, run.lanes.start, run.first, run.last))
        return True

    def _answer(
        self, client: Client, tag: Tag, lease: Lease = Lease.NONE, lane: tuple[int, int, int, int] = (0, 0, 0, 0)
    ) -> None:
        letter = client.answers[tag]
        known = (self.version, self.steps, self.samples, self.loss, self._rate(self.steps))
        run = (self.stop, self.left, self.alive, client.staleness, self.discarded, self.bad)
        letter.write(Answer(*known, *run, lease, *lane))
        self._sends.append(([self._comm.Isend(letter.bytes, client.rank, tag)], None))

    def _slowest(self, but: Client) -> int:
        """The least that any other replica has done, of those that have joined and not left."""
        steps = [client.lead for client in self.clients if client.joined and not client.left and client is not but]
        return min(steps, default=but.lead)

    def _is_too_far(self, client: Client) -> bool:
        lead = self._options.lead
        return bool(lead) and not self._order.replays and client.lead - self._slowest(client) > lead

    def _let_go(self) -> None:
        """Answer those that aren't too far ahead any more."""
        for replica in self._too_far:
            if not self._is_too_far(self.clients[replica]):
                self._ready.append(replica)
        self._too_far = [replica for replica in self._too_far if self._is_too_far(self.clients[replica])]
