"""A server: one shard of the parameters, and what the optimizer keeps of it.

One loop, which never blocks: hear requests, receive announced gradients, serve who is ready, one after the other, each
worker's requests in its order. Workers whose messages take long hold up nobody but themselves. Where a worker fetches
with its push, it gets the new version piece by piece, while the next piece is updated.

A worker that dies is taken off at once. What it had leased goes to others when all servers have said how much of it has
arrived (cut.py): so nothing is applied twice, and of the pushes that were on their way some shards may have none.
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
from dpnn.data import Run
from dpnn.errors import RankError
from dpnn.optim import Optimizer
from dpnn.strategies.downpour.copies import Copies, Copy
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.life import Roll
from dpnn.strategies.downpour.lines import Client, Lines
from dpnn.strategies.downpour.order import Order
from dpnn.strategies.downpour.protocol import Answer, Array, Kind, Lease, Request, Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_EAGER_S, _NAP_SHARE, _LONGEST_NAP_S = 1e-3, 0.1, 5e-4
"""How long an idle server only gives way to other processes; then it sleeps between two looks, for a share of the time
that it has been idle."""
_BINS = 128
"""Of the histogram of staleness; the last one has all that is more."""


class Server:
    """Serves `workers` replicas, until none of them will ask for anything any more.

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
        self._options, self._order = options, order
        self.ledger, self._asked, self._rate, self.make = ledger, asked, rate, make
        self._parting, self.limit_s, self._parts = parting, limit_s, parts
        self._policy, self._bound = options.staleness.policy, options.staleness.bound
        self.state = state
        self._copies = Copies(params)
        self.clients = [Client(replica, replica * parts + part) for replica in range(workers)]
        self.left = workers
        """Workers that may still push."""
        self._lines = Lines(comm, self.clients, params, order.replays)
        self.gradients = self._lines.gradients
        self._ready: deque[int] = deque()
        self._too_far: list[int] = []
        """Who is too far ahead of the slowest to be answered."""
        self.losses: deque[Client] = deque()
        """On the first server: who has died and whose leases are still to be settled."""
        self.version = self.steps = self.samples = self.bad = self.discarded = self.alive = 0
        self.loss = 0.0
        self.stop = self.over = self.written = self.closed = self.frozen = False
        """`frozen`: nothing is served for a moment. `written`: the last checkpoint. `over`: as the speaker says."""
        self._roll = Roll(comm, self.clients, min(options.silence_s, limit_s / 2), limit_s)
        self.histogram = np.zeros(_BINS, np.int64)
        """Pushes by staleness: updates of this shard since the parameters that they were computed from."""
        self.watch: Callable[[Client, float, float], None] = lambda client, rate, scale: None
        """Told of every push, with the rate and the scale that it was applied at (0: not at all)."""
        self.lost: Callable[[Client], None] = lambda client: None
        """Told of every worker that has died, as soon as this server knows."""

    @property
    def params(self) -> Array:
        """The newest."""
        return self._copies.newest.params

    @property
    def speaker(self) -> Client | None:
        """The first worker that hasn't died: it speaks for the run."""
        return next((client for client in self.clients if not client.lost), None)

    def run(self, also: Callable[[], bool]) -> None:
        """Serve until `closed`. `also` is done in every turn too; it returns whether it has moved anything.

        RankError where no worker is heard of for `limit_s` seconds, or all have died, or MPI reports an error.
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
        return self._look() | self._hear() | self._lines.sent() | self._serve() | also()

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

    @property
    def may_close(self) -> bool:
        """Whether nobody will ask for anything any more."""
        return all(client.parted or client.lost for client in self.clients)

    def close(self) -> None:
        """The run is over, and all is written: see off what is being sent, and hear no more."""
        self._order.flush()
        self._parting(self)
        self.closed = True

        def sent() -> bool:
            for rank in self._lines.lost():
                self.lose(rank)
            self._lines.sent()
            return self._lines.silent

        wait(sent, "the workers to take their last parameters", self.limit_s)
        self._lines.close()

    def lose(self, rank: int, why: str = "its process has ended") -> None:
        """A rank has died, and with it its whole replica: serve it no more. RankError where it was a server."""
        replica = rank // self._parts
        if replica >= len(self.clients):
            raise RankError(f"rank {rank}, a server, has died, and its parameters with it")
        client = self.clients[replica]
        if client.lost:
            return
        client.why = why
        self._lines.hang_up(client)
        if replica in self._ready:
            self._ready.remove(replica)
        self._too_far = [other for other in self._too_far if other != replica]
        if self.ledger is not None:
            self.losses.append(client)
        self.lost(client)
        if self.speaker is None and self.left:
            raise RankError("all workers have died; go on from the last checkpoint with --resume")

    def _look(self) -> bool:
        """Now and then see who is alive; whether anybody is. Who is silent counts as dead, as the first server says."""
        alive, silent = self._roll.call()
        self.alive += alive
        if self.ledger is not None and self._lines.survives:
            for client, limit_s in silent:
                self.lose(client.rank, f"it said nothing for {limit_s:g} s")
        return alive > 0

    def settle(self, client: Client, pushed: Array) -> tuple[int, int]:
        """A worker has died, and `pushed` is what has arrived of it on the servers that got the most.

        What it had leased is leased to others. Returned: its steps that this shard hasn't got, and those that nobody
        can take.
        """
        steps, samples, loss, bad = (pushed - client.pushed).tolist()
        client.pushed = pushed.copy()
        self.steps, self.samples = self.steps + int(steps), self.samples + int(samples)
        self.loss, self.bad = self.loss + loss, self.bad + int(bad)
        out_of_reach = self.ledger.lose(client.replica, int(steps)) if self.ledger is not None else 0
        if not client.left:
            client.left = True
            self.left -= 1
        self._let_go()
        return int(steps), out_of_reach

    def _hear(self) -> bool:
        """Take what has arrived, and see who has died."""
        if self._order.stops(not self.stop and self._asked()):
            self.stop = True
        lost = self._lines.lost()
        for rank in lost:
            self.lose(rank)
        asking, pushing = self._lines.arrived()
        self._ready.extend(client.replica for client in pushing if client.announced)
        for client in asking:
            if client.request.stop and not self.stop and self._order.stops(True):
                self.stop = True
            self._look_at(client)
        return bool(lost or asking or pushing)

    def _look_at(self, client: Client) -> None:
        """See what a client wants: it is ready to be served, has to wait, or needs no place in the order."""
        kind, replica = client.request.kind, client.replica
        if kind == Kind.PUSH:
            self._lines.announce(client)
            if client.arrived:
                self._ready.append(replica)
        elif kind == Kind.FETCH and self._is_too_far(client):
            self._too_far.append(replica)
        elif kind == Kind.FETCH or (kind == Kind.LEASE and not client.left):
            self._ready.append(replica)
        else:
            self._note(client, kind)
            self._lines.listen(client)

    def _note(self, client: Client, kind: int) -> None:
        if kind == Kind.LEASE:  # it asks whether the others have left
            self._answer(client, Tag.LEASED)
        elif kind == Kind.PART:
            client.parted = True
            self._roll.hears(client)  # said before that
        elif kind == Kind.OVER:
            self.over = True
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
        else:
            self._lease(client)
            self._order.served(replica, kind)
        self._lines.listen(client)
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
        client.pushed += (push.steps, push.samples, push.loss, push.bad)
        self.steps += push.steps
        PULSE.step = self.steps
        self.samples += push.samples
        self.loss += push.loss
        self.bad += push.bad
        if self.ledger is not None:
            self.ledger.arrived(client.replica, push.steps)
        self.watch(client, rate, scale)
        self._lines.done(client)
        self._let_go()
        self._order.served(client.replica, Kind.PUSH)
        if to:
            self._fetched(client)
        elif push.fetch:
            client.request = Request(Kind.FETCH)
            self._look_at(client)
            return
        self._lines.listen(client)

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
            sends.append(self._lines.send_piece(piece, to))
        self._lines.sending(sends, to, copy)

    def _fetched(self, client: Client) -> None:
        """Say what the numbers are that a client was sent."""
        self._answer(client, Tag.ANSWER)
        self._order.served(client.replica, Kind.FETCH)

    def _lease(self, client: Client) -> None:
        """Answer who asks for work."""
        speaker, ledger, lease, run = self.speaker, self.ledger, Lease.NONE, None
        warms_up = self.steps < self._options.warmup_steps and speaker is not None and not speaker.left
        if ledger is not None and not self.stop:
            if (warms_up and client is not speaker) or (ledger.open and self._is_spare(client)):
                lease = Lease.WAIT
            elif run := ledger.lease(client.replica):
                lease = Lease.LANE
                if not client.joined:
                    client.joined, client.lead = True, self._slowest(client)
            elif ledger.held_by_others(client.replica):  # one of them may die
                lease = Lease.WAIT
                if client.joined and not ledger.held[client.replica]:
                    client.joined = False
                    self._let_go()
        self._answer(client, Tag.LEASED, lease, run)

    def _is_spare(self, client: Client) -> bool:
        """Whether so many before it live that it isn't needed."""
        spares = self._options.spares
        return sum(not other.lost for other in self.clients[: client.replica]) >= len(self.clients) - spares

    def _answer(self, client: Client, tag: Tag, lease: Lease = Lease.NONE, leased: Run | None = None) -> None:
        lane = (leased.epoch, leased.lanes.start, leased.first, leased.last) if leased else (0, 0, 0, 0)
        known = (self.version, self.steps, self.samples, self.loss, self._rate(self.steps))
        run = (self.stop, self.left, self.alive, client.staleness, self.discarded, self.bad)
        speaker, lost = self.speaker, sum(client.lost for client in self.clients)
        last = (speaker.replica if speaker else -1, lost, self.written, self.over)
        self._lines.answer(client, tag, Answer(*known, *run, lease, *lane, *last))

    def _slowest(self, but: Client) -> int:
        """The least that any other replica has done, of those that have joined and not left."""
        others = (client for client in self.clients if client is not but and not client.lost)
        return min((client.lead for client in others if client.joined and not client.left), default=but.lead)

    def _is_too_far(self, client: Client) -> bool:
        lead = self._options.lead
        return bool(lead) and not self._order.replays and client.lead - self._slowest(client) > lead

    def _let_go(self) -> None:
        """Answer those that aren't too far ahead any more."""
        for replica in self._too_far:
            if not self._is_too_far(self.clients[replica]):
                self._ready.append(replica)
        self._too_far = [replica for replica in self._too_far if self._is_too_far(self.clients[replica])]
