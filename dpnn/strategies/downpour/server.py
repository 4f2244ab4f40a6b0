"""A server: one shard of the parameters, and what the optimizer keeps of it.

One loop, which never blocks: hear requests, receive announced gradients into a few buffers, serve who is ready, one
after the other, each worker's requests in its order. Workers whose messages take long hold up nobody but themselves.
An update never changes numbers that are being sent: it writes another copy then, so everyone gets one version, whole.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dpnn import config
from dpnn.comm.faults import wait
from dpnn.comm.reduce import blocks
from dpnn.errors import RankError
from dpnn.optim import Optimizer
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.order import Order
from dpnn.strategies.downpour.protocol import ANSWER, REQUEST, Array, Kind, Lease, Tag, record

if TYPE_CHECKING:
    from mpi4py import MPI

_STAGED, _VERSIONS = 4, 3
"""Buffers for gradients that are on their way, and copies of the parameters: one is the newest, others may be being
sent."""
_EAGER_S, _NAP_SHARE, _LONGEST_NAP_S = 1e-3, 0.1, 5e-4
"""How long an idle server only gives way to other processes; then it sleeps between two looks, for a share of the time
that it has been idle."""
_BINS = 128
"""Of the histogram of staleness; the last one has all that is more."""


class Client:
    """What a server knows of a worker."""

    def __init__(self, replica: int) -> None:
        self.replica = replica
        self.request, self.heard = record(REQUEST)
        self.answers = {tag: record(ANSWER) for tag in (Tag.ANSWER, Tag.LEASED)}
        self.staged = -1
        """The buffer that its gradients are in."""
        self.pushes = self.staleness = self.lead = 0
        """Pushes that were applied; the staleness of the last one; steps, as far as `parallel.lead` counts them."""
        self.joined = self.left = False


class Server:
    """Serves `workers` ranks of `comm`, the ranks from 0 on, until the first of them says that the run is over."""

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
    ) -> None:
        """`params`, `state`: of this shard. `make(params, grads, state)`: an optimizer over such arrays.

        `rate`: the learning rate by the number of steps of all replicas. `ledger`: on the first server. `asked`:
        whether this rank was asked to stop. `parting` is called when the run is over.
        """
        from mpi4py import MPI

        self._mpi, self._comm, self._options, self._order = MPI, comm, options, order
        self.ledger, self._asked, self._rate, self.make = ledger, asked, rate, make
        self._parting, self.limit_s = parting, limit_s
        self.state = state
        self._versions = [params]
        self._readers = [0]
        self._at = 0
        """Which copy is the newest."""
        n = workers if order.replays else min(workers, _STAGED)
        self._staged = [np.empty_like(params) for _ in range(n)]
        self._free = list(range(n))
        self._optimizers: dict[tuple[int, int], Optimizer] = {}
        self.clients = [Client(replica) for replica in range(workers)]
        self.left = workers
        """Workers that may still push."""
        self._requests: list[MPI.Request] = [MPI.REQUEST_NULL] * workers
        self._announced: deque[int] = deque()
        """Who has gradients for which there is no buffer yet."""
        self._ready: deque[int] = deque()
        self._too_far: list[int] = []
        """Who is too far ahead of the slowest to be answered."""
        self._sends: list[tuple[MPI.Request, int]] = []
        """What is being sent, and of which copy; -1: of none."""
        self.version = self.steps = self.samples = self.discarded = self.alive = 0
        self.loss = 0.0
        self.stop = self.closing = self.closed = self.frozen = False
        """`frozen`: nothing is served for a moment. `closing`: the first worker wants to close."""
        self.histogram = np.zeros(_BINS, np.int64)
        """Pushes by staleness: updates of this shard since the parameters that they were computed from."""
        self.watch: Callable[[Client, float, float], None] = lambda client, rate, scale: None
        """Told of every push, with the rate and the scale that it was applied at (0: not at all)."""
        for client in self.clients:
            self._listen(client)

    @property
    def params(self) -> Array:
        """The newest."""
        return self._versions[self._at]

    def run(self, also: Callable[[], bool]) -> None:
        """Serve until `closed`. `also` is done in every turn too; it returns whether it has moved anything.

        RankError where no worker is heard of for `limit_s` seconds.
        """
        busy, limit_s = time.monotonic(), self.limit_s
        while not self.closed:
            moved = self._hear() | self._serve() | self._sent()
            if also() or moved:
                busy = time.monotonic()
                continue
            idle = time.monotonic() - busy
            if idle > limit_s:
                raise RankError(
                    f"a server has heard of no worker for {limit_s:g} s: they have stopped, or a step takes longer; "
                    "if all ranks are well, raise parallel.timeout_s"
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
        self._answer(self.clients[0], Tag.LEASED, Lease.NONE)
        self.closed = True

        def sent() -> bool:
            self._sent()
            return not self._sends

        wait(sent, "the workers to take their last parameters", self.limit_s)
        for request in self._requests:
            if request != self._mpi.REQUEST_NULL:
                request.Cancel()
                request.Wait()

    def _listen(self, client: Client) -> None:
        self._requests[client.replica] = self._comm.Irecv(client.heard, client.replica, Tag.REQUEST)

    def _hear(self) -> bool:
        """Take what has arrived; give buffers to gradients that were announced."""
        if self._order.stops(not self.stop and self._asked()):
            self.stop = True
        arrived = self._mpi.Request.Testsome(self._requests) or []
        for replica in arrived:
            client = self.clients[replica]
            kind = self._kind(replica)
            if client.request["stop"][0] and not self.stop and self._order.stops(True):
                self.stop = True
            if kind == Kind.PUSH and client.staged < 0:
                self._announced.append(replica)
            elif kind == Kind.FETCH and self._is_too_far(client):
                self._too_far.append(replica)
            elif kind in (Kind.LEAVE, Kind.CLOSE):
                self._leaves(client, kind)
            elif kind == Kind.ALIVE:
                self.alive += 1
                self._listen(client)
            elif kind == Kind.LEASE and client.left:  # it asks whether the others have left: no part of the order
                self._answer(client, Tag.LEASED, Lease.NONE)
                self._listen(client)
            else:
                self._ready.append(replica)
        while self._announced and self._free:
            client = self.clients[self._announced.popleft()]
            client.staged = self._free.pop()
            self._requests[client.replica] = self._comm.Irecv(
                self._staged[client.staged], client.replica, Tag.GRADIENTS
            )
        return bool(arrived)

    def _serve(self) -> bool:
        """Serve one who is ready, if there is one."""
        if self.frozen:
            return False
        ready = self._ready
        updates = any(self._kind(replica) == Kind.PUSH for replica in ready)
        copy = self._copy_to_write() if updates else self._at
        if copy is None:  # whatever isn't an update goes on
            ready = deque(replica for replica in ready if self._kind(replica) != Kind.PUSH)
        replica = self._order.pick(ready, self._kind)
        if replica is None:
            return False
        if copy is None:
            self._ready.remove(replica)
        client, kind, served = self.clients[replica], self._kind(replica), True
        if kind == Kind.PUSH and copy is not None:
            self._apply(client, copy)
        elif kind == Kind.FETCH:
            self._send(client)
        else:
            served = self._lease(client)
        if served:
            self._order.served(replica, kind)
        self._listen(client)
        return True

    def _kind(self, replica: int) -> int:
        return int(self.clients[replica].request["kind"][0])

    def _copy_to_write(self) -> int | None:
        """The copy that the next update goes into: the newest where nobody reads it. None: all are being sent."""
        if not self._readers[self._at]:
            return self._at
        for copy, readers in enumerate(self._readers):
            if not readers:
                return copy
        if len(self._versions) < _VERSIONS:
            self._versions.append(np.empty_like(self.params))
            self._readers.append(0)
            return len(self._versions) - 1
        return None

    def _apply(self, client: Client, copy: int) -> None:
        """Update by a push, unless it is too stale."""
        push = client.request[0]
        client.staleness = int(self.version - push["base"])
        self.histogram[min(client.staleness, _BINS - 1)] += 1
        policy, bound = self._options.staleness.policy, self._options.staleness.bound
        scale = 1.0 / client.staleness if policy == "scale" and client.staleness > 1 else 1.0
        rate = self._rate(self.steps)
        client.pushes += 1
        client.lead += int(push["steps"])
        if policy == "discard" and client.staleness > bound:
            self.discarded += 1
            scale = 0.0
        else:
            self._update(client, copy, rate, scale)
        self.steps += int(push["steps"])
        self.samples += int(push["samples"])
        self.loss += float(push["loss"])
        if self.ledger is not None:
            self.ledger.arrived(client.replica, int(push["steps"]))
        self.watch(client, rate, scale)
        self._free.append(client.staged)
        client.staged = -1
        self._let_go()

    def _update(self, client: Client, copy: int, rate: float, scale: float) -> None:
        optimizer = self._optimizer(copy, client.staged)
        if copy == self._at:
            optimizer.apply(0, self.params.size, rate, scale)
        else:
            old, new = self.params, self._versions[copy]
            for lo, hi in blocks(0, old.size):
                np.copyto(new[lo:hi], old[lo:hi])
                optimizer.apply(lo, hi, rate, scale)
            self._at = copy
        self.version += 1

    def _optimizer(self, copy: int, staged: int) -> Optimizer:
        if (copy, staged) not in self._optimizers:
            self._optimizers[copy, staged] = self.make(self._versions[copy], self._staged[staged], self.state)
        return self._optimizers[copy, staged]

    def _send(self, client: Client) -> None:
        """Answer a fetch: the newest version, which isn't written before it has been sent."""
        self._answer(client, Tag.ANSWER, Lease.NONE)
        request = self._comm.Isend(self.params, client.replica, Tag.PARAMS)
        self._readers[self._at] += 1
        self._sends.append((request, self._at))

    def _sent(self) -> bool:
        """Forget what has been sent."""
        done = [place for place, (request, _) in enumerate(self._sends) if request.Test()]
        for place in reversed(done):
            _, copy = self._sends.pop(place)
            if copy >= 0:
                self._readers[copy] -= 1
        return bool(done)

    def _lease(self, client: Client) -> bool:
        """Answer who asks for work; whether the answer stands: it may have to ask again."""
        others_wait = self.steps < self._options.warmup_steps and not self.clients[0].left
        if self.ledger is None or self.stop:
            self._answer(client, Tag.LEASED, Lease.NONE)
            return True
        if client.replica and others_wait and not self._order.replays:
            self._answer(client, Tag.LEASED, Lease.WAIT)
            return False
        run = self.ledger.lease(client.replica)
        if run is None:
            self._answer(client, Tag.LEASED, Lease.NONE)
            return True
        if not client.joined:
            client.joined = True
            client.lead = self._slowest(client)
        answer, _ = client.answers[Tag.LEASED]
        answer["epoch"], answer["lane"], answer["first"], answer["last"] = (
            run.epoch,
            run.lanes.start,
            run.first,
            run.last,
        )
        self._answer(client, Tag.LEASED, Lease.LANE)
        return True

    def _answer(self, client: Client, tag: Tag, lease: Lease) -> None:
        answer, told = client.answers[tag]
        answer["version"], answer["steps"], answer["samples"], answer["loss"] = (
            self.version, self.steps, self.samples, self.loss,
        )  # fmt: skip
        answer["rate"], answer["stop"], answer["left"] = self._rate(self.steps), self.stop, self.left
        answer["alive"] = self.alive
        answer["staleness"], answer["discarded"], answer["lease"] = client.staleness, self.discarded, lease
        self._sends.append((self._comm.Isend(told, client.replica, tag), -1))

    def _leaves(self, client: Client, kind: int) -> None:
        if kind == Kind.CLOSE:
            self.closing = True
            return
        client.left = True
        self.left -= 1
        self._listen(client)
        self._let_go()

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
