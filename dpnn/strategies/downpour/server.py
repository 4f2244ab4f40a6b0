"""Serving one shard: hear requests, receive announced gradients, serve who is ready, one after the other.

Each worker's requests are served in its order. Workers whose messages take long hold up nobody but themselves. Where a
worker fetches with its push, it gets the new version piece by piece, while the next piece is updated.

A worker that dies is taken off at once. What it had leased goes to others when all servers have said how much of it has
arrived (cut.py): so nothing is applied twice, and of the pushes that were on their way some shards may have none.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from dpnn import config
from dpnn.comm.faults import wait
from dpnn.comm.pulse import PULSE
from dpnn.errors import RankError
from dpnn.strategies.downpour.copies import Copy
from dpnn.strategies.downpour.lines import Client, Lines
from dpnn.strategies.downpour.mirror import Mirror
from dpnn.strategies.downpour.order import Order
from dpnn.strategies.downpour.protocol import Answer, Array, Change, Deed, Kind, Lease, Request, Tag
from dpnn.strategies.downpour.roll import Roll
from dpnn.strategies.downpour.shard import Shard

if TYPE_CHECKING:
    from mpi4py import MPI


class Server:
    """Serves `shard`, which is the one of that `number`, until no worker will ask for anything any more.

    Workers are the ranks of `comm` from 0 on; where each replica is spread over several `parts`, those with the same
    `part`.
    """

    def __init__(
        self,
        comm: "MPI.Comm",
        number: int,
        shard: Shard,
        options: config.Parallel,
        order: Order,
        asked: Callable[[], bool],
        mirrored: bool = False,
        parts: int = 1,
        part: int = 0,
    ) -> None:
        """`asked`: whether this rank was asked to stop. `mirrored`: whether it may be given a mirror."""
        self.number, self.shard, self.limit_s = number, shard, options.stall_abort_s
        self._order, self._asked = order, asked
        self._lead = options.lead
        self.clients = [Client(account.replica, account.replica * parts + part) for account in shard.accounts]
        for client, account in zip(self.clients, shard.accounts, strict=True):
            client.lost = account.lost
        self._lines = Lines(comm, number, self.clients, shard.params, order.replays, more=int(mirrored))
        self._ready: deque[int] = deque()
        self._too_far: list[int] = []
        """Who is too far ahead of the slowest to be answered."""
        self.frozen = self.parting = False
        """Whether no push is applied for a moment; whether a worker has parted: the run is over."""
        silence_s = min(options.silence_s, self.limit_s / 2)
        self._roll, self._working = Roll(comm, number, self.clients, silence_s, self.limit_s), 0
        self.mirror: Mirror | None = None
        self.over: Callable[[], bool] = lambda: shard.over
        """Whether the run is over, as this rank knows."""
        self.watch: Callable[[Change, Array | None, float, float], None] = lambda change, gradients, rate, scale: None
        """Told of every push, with the rate and the scale that it was applied at (0: not at all)."""
        self.lost: Callable[[Client], None] = lambda client: None
        """Told of every worker that has died, as soon as this server knows."""
        self.skipped: Callable[[Change], None] = lambda change: None
        """Told of every push that is lost on this shard alone."""

    def turn(self) -> bool:
        """Do what there is to do; whether there was anything."""
        working = self._look()
        passed = self.mirror is not None and self.mirror.turn()
        return working | self._hear() | self._lines.sent() | self._serve() | passed

    def do(self, change: Change, then: Callable[[], object] = lambda: None) -> None:
        """Change the shard; `then` is called once the mirror knows."""
        self.shard.do(change)
        self._pass_on(change, then)

    def _pass_on(self, change: Change, then: Callable[[], object]) -> None:
        if self.mirror is None:
            then()
        else:
            self.mirror.tell(change, then=then)

    def mirror_to(self, mirror: Mirror | None) -> None:
        """From now on that one is told of all changes. What waits for the one before goes on."""
        former, self.mirror = self.mirror, mirror
        if former is not None:
            former.drop()

    @property
    def may_close(self) -> bool:
        """Whether nobody will ask for anything any more."""
        return all(client.parted or client.lost for client in self.clients)

    def close(self, look: Callable[[], object]) -> None:
        """The run is over, and all is written: see off what is being sent, and hear no more.

        `look` is called meanwhile, and sees who has died.
        """

        def sent() -> bool:
            look()
            self._lines.sent()
            return self._lines.silent

        self._order.flush()
        self.mirror_to(None)
        wait(sent, "the workers to take their last parameters", self.limit_s)
        self._lines.close()

    def lose(self, replica: int, why: str = "its process has ended") -> None:
        """A replica has died: serve it no more. RankError where it was the last."""
        client = self.clients[replica]
        if client.lost:
            return
        client.why = why
        self._lines.hang_up(client)
        if client.parted:
            return
        if replica in self._ready:
            self._ready.remove(replica)
        self._too_far = [other for other in self._too_far if other != replica]
        self.do(Change(Deed.LOSE, replica))
        self.lost(client)
        if self.shard.speaker is None and not self.shard.written:
            raise RankError("all workers have died; go on from the last checkpoint with --resume")

    def _look(self) -> bool:
        """Now and then see who works; whether anybody does. Who is silent counts as dead, as the first server says."""
        working, silent = self._roll.call()
        self._working += working
        while self._lines.broken:
            self.lose(self._lines.broken.pop().replica)
        if self.shard.ledger is not None and self._lines.survives:
            for client, limit_s in silent:
                self.lose(client.replica, f"it said nothing for {limit_s:g} s")
        return working > 0

    def note_written(self) -> None:
        """The last checkpoint is written."""
        if not self.shard.written:
            self.do(Change(Deed.WRITTEN))

    def settle(self, replica: int, pushed: Array) -> tuple[int, int]:
        """A worker has died, and `pushed` is what has arrived of it on the servers that got the most.

        What it had leased is leased to others. Returned: its steps that this shard hasn't got, and those that nobody
        can take.
        """
        steps, samples, loss, bad = pushed.tolist()
        change = Change(Deed.SETTLE, replica, steps=int(steps), samples=int(samples), loss=loss, bad=int(bad))
        settled = self.shard.settle(change)
        self._pass_on(change, lambda: None)
        self._let_go()
        return settled

    def _hear(self) -> bool:
        """Take what has arrived."""
        if self._order.stops(not self.shard.stop and self._asked()):
            self.do(Change(Deed.STOP))
        asking, pushing = self._lines.arrived()
        self._ready.extend(client.replica for client in pushing if client.announced)
        for client in asking:
            if client.request.stop and not self.shard.stop and self._order.stops(True):
                self.do(Change(Deed.STOP))
            self._look_at(client)
        return bool(asking or pushing)

    def _look_at(self, client: Client) -> None:
        """See what a client wants: it is ready to be served, has to wait, or needs no place in the order."""
        kind, replica = client.request.kind, client.replica
        if kind == Kind.PUSH:
            self._lines.announce(client)
            if client.arrived:
                self._ready.append(replica)
        elif kind == Kind.FETCH and self._is_too_far(replica):
            self._too_far.append(replica)
        elif kind == Kind.FETCH or (kind == Kind.LEASE and not self.shard.accounts[replica].left):
            self._ready.append(replica)
        else:
            self._note(client, kind)
            self._lines.listen(client)

    def _note(self, client: Client, kind: int) -> None:
        match kind:
            case Kind.LEASE | Kind.HELLO:  # it asks whether the others have left, or what is known of itself
                self._answer(client, Tag.SAID)
            case Kind.PART:
                client.parted = self.parting = True
                self._roll.hears(client)  # said before that
                self._answer(client, Tag.SAID)
            case Kind.OVER:
                self.do(Change(Deed.OVER))
            case Kind.SKIP:
                self._skip(client)
            case Kind.LEAVE:
                self.do(Change(Deed.LEAVE, client.replica))
                self._let_go()

    def _serve(self) -> bool:
        """Serve one who is ready, if there is one."""
        ready, copies = self._ready, self.shard.copies
        if self.frozen or not ready:
            return False
        may_write = True
        if copies.newest.readers and any(self._kind(replica) == Kind.PUSH for replica in ready):
            may_write = copies.to_write() is not None
        if not may_write:  # whatever isn't an update goes on
            ready = deque(replica for replica in ready if self._kind(replica) != Kind.PUSH)
        replica = self._order.pick(ready, self._kind)
        if replica is None:
            return False
        if not may_write:
            self._ready.remove(replica)
        client, kind = self.clients[replica], self._kind(replica)
        if kind == Kind.PUSH:
            self._apply(client)
        elif kind == Kind.FETCH:
            self._send(copies.newest, lambda lo, hi: None, client)
            self._fetched(client)
            self._lines.listen(client)
        else:
            self._lease(client)
            self._order.served(replica, kind)
        return True

    def _kind(self, replica: int) -> int:
        return self.clients[replica].request.kind

    def _apply(self, client: Client) -> None:
        """Update by a push; send what comes of it to who wants it, if that is its turn."""
        push, replica = client.request, client.replica
        change, (buffer, gradients) = _change(Deed.PUSH, replica, push), self._lines.take(client)
        free = partial(self._lines.free, buffer)
        if self.mirror is not None:
            self.mirror.tell(change, gradients, free)
        fetches = bool(push.fetch) and not self._is_too_far(replica, push.steps)
        follows = fetches and self._order.follows(replica, Kind.FETCH)
        rate, scale = self.shard.push(change, gradients, partial(self._send, to=client) if follows else None)
        PULSE.step = self.shard.steps
        self.watch(change, gradients, rate, scale)
        if self.mirror is None:
            free()
        self._let_go()
        self._order.served(replica, Kind.PUSH)
        if follows:
            self._fetched(client)
        elif push.fetch:
            client.request = Request(Kind.FETCH)
            self._look_at(client)
            return
        self._lines.listen(client)

    def _skip(self, client: Client) -> None:
        """A push of which only the numbers are left."""
        change = _change(Deed.SKIP, client.replica, client.request)
        self.do(change)
        self.watch(change, None, 0.0, 0.0)
        self.skipped(change)
        self._let_go()

    def _send(self, copy: Copy, before: Callable[[int, int], None], to: Client) -> None:
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
        """Answer who asks for work, and then await what it wants next."""
        shard, replica = self.shard, client.replica
        account, ledger = shard.accounts[replica], shard.ledger
        lease = Lease.NONE
        if ledger is not None and not shard.stop:
            if client.request.number < account.leases:  # who gave it has died before saying so
                lease = Lease.LANE
            elif shard.warms_up(replica) or (ledger.open and shard.is_spare(replica)):
                lease = Lease.WAIT
            elif shard.grant(replica):
                # The mirror has to know first, or it could give the same to another.
                self._pass_on(Change(Deed.GRANT, replica), partial(self._leased, client, Lease.LANE))
                return
            elif ledger.held_by_others(replica):  # one of them may die
                lease = Lease.WAIT
                if account.joined and not ledger.held[replica]:
                    self.do(Change(Deed.REST, replica))
                    self._let_go()
        self._leased(client, lease)

    def _leased(self, client: Client, lease: Lease) -> None:
        if not client.lost:
            self._answer(client, Tag.SAID, lease)
            self._lines.listen(client)

    def _answer(self, client: Client, tag: Tag, lease: Lease = Lease.NONE) -> None:
        shard, account = self.shard, self.shard.accounts[client.replica]
        known = (shard.version, shard.steps, shard.samples, shard.loss, shard.rate(shard.steps))
        run = (shard.stop, shard.left, self._working, account.staleness, shard.discarded, shard.bad)
        given, lane = account.leased, (0, 0, 0, 0)
        if lease == Lease.LANE and given is not None:
            lane = (given.epoch, given.lanes.start, given.first, given.last)
        speaker = shard.speaker
        last = (speaker.replica if speaker else -1, shard.lost, shard.written, self.over(), account.pushes)
        self._lines.answer(client, tag, Answer(*known, *run, lease, *lane, *last))

    def _is_too_far(self, replica: int, steps: int = 0) -> bool:
        """Whether a replica is too far ahead of the slowest, after so many steps more."""
        return bool(self._lead) and not self._order.replays and self.shard.ahead(replica, steps) > self._lead

    def _let_go(self) -> None:
        """Answer those that aren't too far ahead any more."""
        for replica in self._too_far:
            if not self._is_too_far(replica):
                self._ready.append(replica)
        self._too_far = [replica for replica in self._too_far if self._is_too_far(replica)]


def _change(deed: Deed, replica: int, push: Request) -> Change:
    return Change(deed, replica, push.number, push.steps, push.samples, push.base, push.loss, push.bad)
