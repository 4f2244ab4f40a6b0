"""A server's process: the shard of its own, shadows of others', and those that it has taken over.

One loop, which never blocks: serve the workers of each shard, do as the holders of mirrored shards did, go on with what
the servers do together.

Where a server dies, the one that mirrors its shards serves them from then on; the workers find it, since who comes next
is known to all (holders.py). Each says what it has pushed, and sends again what it still has. Then the shards get new
mirrors, as long as two servers are left.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dpnn import config
from dpnn.comm.faults import deadline, reported
from dpnn.comm.losses import Losses
from dpnn.comm.pulse import PULSE
from dpnn.errors import RankError
from dpnn.strategies.downpour.holders import Holders
from dpnn.strategies.downpour.mirror import Mirror, Shadow
from dpnn.strategies.downpour.order import Order
from dpnn.strategies.downpour.protocol import Change
from dpnn.strategies.downpour.server import Server
from dpnn.strategies.downpour.shard import Shard

if TYPE_CHECKING:
    from mpi4py import MPI

    from dpnn.strategies.downpour.cut import Cut

T = TypeVar("T")

_EAGER_S, _NAP_SHARE, _LONGEST_NAP_S = 1e-3, 0.1, 5e-4
"""How long an idle server only gives way to other processes; then it sleeps between two looks, for a share of the time
that it has been idle."""
_LOOK_S = 1e-3
"""From one look for deaths to the next: a look takes as long as a turn that finds nothing to do."""


def loop(turn: Callable[[], bool], done: Callable[[], bool], limit_s: float) -> None:
    """Call `turn` until it is `done`; it returns whether there was anything to do. RankError: nothing for `limit_s`."""
    while not done():
        PULSE.beats += 1
        if not turn():
            with PULSE.waiting("a worker to ask for something", time.monotonic(), idle=True):
                _idle(turn, done, limit_s)


def _idle(turn: Callable[[], bool], done: Callable[[], bool], limit_s: float) -> None:
    """Return when there was something to do again."""
    begin = time.monotonic()
    while not turn() and not done():
        PULSE.beats += 1
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


@dataclass
class Spent:
    """On mirrors, by a server."""

    pushes: int = 0
    """That it has passed on; their bytes; seconds that it took to begin with that."""
    nbytes: int = 0
    tell_s: float = 0.0
    follow_s: float = 0.0
    """Seconds that it took to do as others did."""


class Host:
    """Server `number`, of those that are the last ranks of `comm`, with its `own` shard.

    `part_of[k]`: the part of the network, of `parts`, that shard k is of. `shard_of(k)` makes a shard like that one,
    for its mirror. `order`: of arrival, at the own one. `asked`: whether this rank was asked to stop. `mirrored`:
    whether shards are. `fail(error)` ends the job.
    """

    def __init__(
        self,
        comm: "MPI.Comm",
        number: int,
        part_of: Sequence[int],
        parts: int,
        own: Shard,
        shard_of: Callable[[int], Shard],
        options: config.Parallel,
        order: Order,
        asked: Callable[[], bool],
        mirrored: bool,
        fail: Callable[[RankError], object],
    ) -> None:
        self._comm, self.number, self._part_of, self._parts = comm, number, part_of, parts
        self._workers = comm.size - len(part_of)
        self._shard_of, self._options, self._asked, self._fail = shard_of, options, asked, fail
        self._losses, self._look_due = Losses(comm), 0.0
        self.limit_s = options.stall_abort_s
        self.holders = Holders(len(part_of), mirrored)
        self.mirrored, self.spent = mirrored, Spent()
        self.took_over: Callable[[int, list[int]], None] = lambda server, shards: None
        """Told of a server that has died, and of its shards, which this rank holds now."""
        self.skipped: Callable[[int, Change], None] = lambda shard, push: None
        """Told of a push that is lost on a shard."""
        self.servers = {number: self._serving(number, own, order)}
        """By the shards that this rank holds."""
        self.shadows: dict[int, Shadow] = {}
        self._cut: Cut | None = None

    def run(self, cut: "Cut") -> None:
        """Serve until the run is over. RankError where no worker is heard of for `limit_s` seconds, where all have
        died, or a shard is nobody's any more, or MPI reports an error.
        """
        self._cut = cut
        with reported("serving the workers"):
            PULSE.doing = "serving"
            self._mirror()
            loop(self._turn, lambda: cut.done and self.servers[self.number].may_close, self.limit_s)
            self._close(cut)

    @property
    def over(self) -> bool:
        """Whether the run is over, as far as this rank knows: a worker parts only then."""
        return any(server.shard.over or server.parting for server in self.servers.values())

    def lose(self, rank: int) -> None:
        """A rank has died, and with it a whole replica, or what a server held."""
        if rank >= self._workers:
            self.lose_server(rank - self._workers)
            return
        for server in list(self.servers.values()):
            server.lose(rank // self._parts)

    def lose_server(self, dead: int) -> None:
        """A server has died: this one takes over what it mirrors. RankError where it should, and has it not yet."""
        if dead in self.holders.dead:
            return
        left = self.holders.held_by(dead)
        self.holders.dead.add(dead)
        mine = [shard for shard in left if self.holders.of(shard) == self.number]
        over = self.over
        if over:  # servers leave, and whoever still asks for something asks those that are here
            mine = [shard for shard in mine if shard in self.shadows and self.shadows[shard].complete]
        for shard in mine:
            self._take_over(shard, dead)
        if mine and not over:
            self.took_over(dead, mine)
        self._mirror()

    def blocking(self, what: str, call: Callable[[], T]) -> T:
        """What a call returns that blocks until all others have made it. Past `limit_s` the job ends."""
        with deadline(self.limit_s, what, self._fail):
            return call()

    def _take_over(self, number: int, dead: int) -> None:
        shadow = self.shadows.pop(number, None)
        shard = shadow.finish() if shadow else None
        if shadow is None or shard is None:
            raise RankError(
                f"server {dead} has died, and shard {number} of the parameters with it, before another had a copy; "
                "go on from the last checkpoint with --resume"
            )
        self.spent.follow_s += shadow.seconds
        server = self.servers[number] = self._serving(number, shard, Order())
        if self._cut is not None:
            self._cut.adopt(server)
        own = self.servers[self.number]
        for client in own.clients:
            if client.lost and not client.parted:
                server.lose(client.replica, client.why)

    def _serving(self, number: int, shard: Shard, order: Order) -> Server:
        part = self._part_of[number]
        server = Server(self._comm, number, shard, self._options, order, self._asked, self.mirrored, self._parts, part)
        server.over = lambda: self.over
        server.skipped = lambda push: self.skipped(number, push)
        return server

    def _mirror(self) -> None:
        """See that what this rank holds has the mirror that it should have, and that it mirrors what it should."""
        holders = self.holders
        if not self.mirrored or self.over:
            return
        for number, server in self.servers.items():
            mirror = holders.mirror(number)
            rank = None if mirror is None else self._workers + mirror
            if rank != (server.mirror and server.mirror.rank):
                self._count(server)
                server.mirror_to(None if rank is None else Mirror(self._comm, rank, number, server.shard))
        for number in range(len(self._part_of)):
            if number not in self.shadows and holders.mirror(number) == self.number:
                rank = self._workers + holders.of(number)
                self.shadows[number] = Shadow(self._comm, rank, number, self._shard_of(number))

    def _count(self, server: Server) -> None:
        """Keep what a mirror has cost."""
        mirror = server.mirror
        if mirror is not None:
            self.spent.pushes += mirror.pushes
            self.spent.nbytes += mirror.nbytes
            self.spent.tell_s += mirror.seconds

    def _turn(self) -> bool:
        """Do what there is to do; whether there was anything."""
        moved = self._look()
        for server in list(self.servers.values()):
            moved |= server.turn()
        for shadow in self.shadows.values():
            moved |= shadow.turn()
        return moved | (self._cut is not None and self._cut.turn())

    def _look(self) -> bool:
        """Now and then see who has died; whether anybody."""
        now = time.monotonic()
        if now < self._look_due:
            return False
        self._look_due, lost = now + _LOOK_S, self._losses.new()
        for rank in lost:
            self.lose(rank)
        return bool(lost)

    def _close(self, cut: "Cut") -> None:
        for shadow in self.shadows.values():
            self.spent.follow_s += shadow.seconds
            shadow.close()
        for server in self.servers.values():
            self._count(server)
            server.close(self._look)
        cut.close()
