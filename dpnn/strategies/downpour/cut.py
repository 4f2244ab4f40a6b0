"""What the servers do together: checkpoints while the run goes on, and the settling of losses.

A checkpoint: all shards are written as they are after the same pushes. Who holds the first one says when. Then all stop
applying for the moment that it takes to agree on a number of pushes of each replica: the most that any shard has had.
From there on each has a second copy (fork.py), which gets the pushes up to that number only, while the shard itself
gets all: nobody waits. When the copy has them all, a thread writes it.

A loss: a replica has died. The first server tells the others at once, and all take no more of it. Between two
checkpoints they agree on how much of it has arrived: the most that any shard got. What it had leased beyond that goes
to other replicas. A push that only some shards got is neither undone nor done again.

Where a server dies the others make a new group, without it. What they were at is begun anew.
"""

from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dpnn.comm.background import Background
from dpnn.comm.losses import has_died
from dpnn.strategies.downpour.fork import Fork
from dpnn.strategies.downpour.lines import Client
from dpnn.strategies.downpour.protocol import Array
from dpnn.strategies.downpour.server import Server

if TYPE_CHECKING:
    from mpi4py import MPI

    from dpnn.strategies.downpour.host import Host

Note = Callable[[str], object]

_CUT, _LAST, _END, _LOSS = 1, 2, 3, 4
"""What the first server says: a checkpoint; the last one; that the last one was the last; to settle a loss."""
_LOST = 1
"""The tag of words of a loss."""


class Writer(Protocol):
    """Writes checkpoints, in a thread."""

    def write(self, shard: int, steps: int, params: Array, state: dict[str, Array], note: Note) -> None:
        """A shard, after so many steps of all replicas."""

    def complete(self, steps: int, leases: dict[str, Any], note: Note) -> Path:
        """Make a checkpoint of the shards, which are all written. On the first server."""


class _State(Enum):
    IDLE, SETTLING, AGREEING, CATCHING_UP, COUNTING, WRITING, MEETING, COMPLETING, DROPPED, DONE = (
        auto() for _ in range(10)
    )


class Cut:
    """Makes checkpoints of the shards that `host` holds, together with the servers of `crew`; `turn` is in its loop.

    `tell(steps, path)` is called on the first server once a checkpoint is whole. `due`: steps from one to the next.
    `lost(client)` is called there when a worker has died; `settled(shard, replica, missing, gone)` on all, later: so
    many of its steps are missing on this shard, and so many can't be taken by anybody.
    """

    def __init__(
        self,
        host: "Host",
        crew: "MPI.Comm",
        writer: Writer,
        tell: Callable[[int, Path], object],
        due: int,
        lost: Callable[[Client], None] = lambda client: None,
        settled: Callable[[int, int, int, int], None] = lambda shard, replica, missing, gone: None,
    ) -> None:
        from mpi4py import MPI

        self._mpi, self._host, self._crew = MPI, host, crew
        self._writer, self._tell, self._every = writer, tell, due
        self._tell_lost, self._settled = lost, settled
        self._members = list(range(crew.size))
        """The servers of `crew`. The first of them holds the first shard."""
        self._forks: dict[int, Fork] = {}
        self._writing: Background[Path | None] | None = None
        self._due, self._written, self._last = host.servers[host.number].shard.steps + due, -1, False
        self._leases: dict[str, Any] = {}
        self._steps = 0
        self._left_behind: list[object] = []
        """What a former group may still write to."""
        self._begin_anew()
        for server in host.servers.values():
            self.adopt(server)

    def adopt(self, server: Server) -> None:
        """One more shard is held by this rank."""
        fork = self._forks[server.number] = Fork(server)
        server.watch = fork.follow
        server.lost = partial(self._lost, server.number)

    def turn(self) -> bool:
        """Go on with what there is to do; whether anything has happened. An error of the writing is raised here."""
        if self._is_broken():
            self._go_on_without()
        try:
            return self._go_on()
        except self._mpi.Exception as error:
            if not has_died(error):
                raise
        if self.done:
            self._word = self._mpi.REQUEST_NULL
            return False
        self._go_on_without()
        return True

    def _is_broken(self) -> bool:
        """Whether the servers have to make a new group. At the end only who can't say that the last checkpoint is
        written begins with that, and the others follow.
        """
        host = self._host
        if host.holders.dead.isdisjoint(self._members):
            return False
        if not self.done:
            return True
        first = host.servers.get(0)
        return not host.over and (self._crew.Is_revoked() or (first is not None and not first.shard.written))

    @property
    def done(self) -> bool:
        """Whether the last checkpoint is written."""
        return self._state == _State.DONE

    def close(self) -> None:
        """Hear no more."""
        try:
            if self._word != self._mpi.REQUEST_NULL:
                self._word.Cancel()
                self._word.Test()
        except self._mpi.Exception as error:
            if not has_died(error):
                raise

    def _begin_anew(self) -> None:
        """With a new group: nothing is under way."""
        replicas = len(self._host.servers[self._host.number].shard.accounts)
        self._said = np.zeros(2, np.int64)
        """What, and of a loss the replica."""
        self._most, self._agreed = np.zeros(replicas, np.int64), np.zeros(replicas, np.int64)
        """Of each replica: what this rank has at most, and what any has."""
        self._pushed, self._all_pushed = np.zeros(4), np.zeros(4)
        self._lost_rank = np.zeros(1, np.int64)
        self._tellings: list[object] = []
        self._word = self._mpi.REQUEST_NULL
        """The next word of a loss."""
        if self._crew.rank > 0:
            self._word = self._crew.Irecv(self._lost_rank, 0, _LOST)
        self._request: MPI.Request = self._mpi.REQUEST_NULL
        self._listen()

    def _go_on_without(self) -> None:
        """A server has died: the others go on as a group of their own."""
        host = self._host
        if host.over:  # nothing is left to be done together
            self._state, self._word = _State.DONE, self._mpi.REQUEST_NULL
            return
        former, members = self._crew, self._members
        former.Revoke()
        crew = host.blocking("the servers to go on without one that has died", former.Shrink)
        places = crew.Get_group().Translate_ranks(None, former.Get_group())
        self._crew, self._members = crew, [members[place] for place in places]
        for server in members:
            if server not in self._members:
                host.lose_server(server)
        held = (former, self._said, self._most, self._agreed, self._pushed, self._all_pushed, self._lost_rank)
        self._left_behind.append((*held, self._tellings, self._word, self._request))
        if self._state not in (_State.IDLE, _State.SETTLING):
            self._due = 0  # a checkpoint is dropped
        for fork in self._forks.values():
            fork.drop()
            fork.server.frozen = False
        self._begin_anew()
        if self._writing is not None:
            self._state = _State.DROPPED
        first = host.servers.get(0)
        if first is not None and crew.rank == 0:
            for account in first.shard.accounts:
                if account.lost:
                    self._pass_on(first.clients[account.replica].rank)

    def _go_on(self) -> bool:
        if self._word != self._mpi.REQUEST_NULL and self._word.Test():
            self._host.lose(int(self._lost_rank[0]))
            self._word = self._crew.Irecv(self._lost_rank, 0, _LOST)
        match self._state:
            case _State.IDLE:
                return self._hear()
            case _State.CATCHING_UP:
                if not all(fork.complete for fork in self._forks.values()):
                    return False
                self._most[:] = np.max([fork.taken for fork in self._forks.values()], axis=0)
                self._request = self._crew.Iallreduce(self._most, self._agreed, self._mpi.MAX)
                self._state = _State.COUNTING
                return True
            case _State.WRITING | _State.COMPLETING | _State.DROPPED:
                return self._write_on()
            case _State.DONE:
                return False
        if not self._request.Test():
            return False
        match self._state:
            case _State.SETTLING:
                self._settle()
            case _State.AGREEING:
                self._fork()
            case _State.COUNTING:
                self._write()
            case _State.MEETING:
                self._meet()
        return True

    def _listen(self) -> None:
        """For the next word of the first server."""
        self._state = _State.IDLE
        if self._crew.rank > 0:
            self._request = self._crew.Ibcast(self._said, 0)

    def _hear(self) -> bool:
        """Begin with what the first server says, which is this one perhaps."""
        if self._crew.rank == 0 and self._request == self._mpi.REQUEST_NULL:
            if not self._has_to_say():
                return False
            self._request = self._crew.Ibcast(self._said, 0)
        if not self._request.Test():
            return False
        what, replica = self._said.tolist()
        self._last = what == _LAST
        if what == _LOSS:
            self._begin_to_settle(replica)
        elif what == _END:
            self._be_done()
        else:
            self._begin_to_cut()
        return True

    def _has_to_say(self) -> bool:
        """Whether the first server has, and what."""
        shard = self._host.servers[0].shard
        if shard.losses:
            self._said[:] = _LOSS, shard.losses[0]
        elif shard.left == 0:
            self._said[0] = _END if shard.written or self._written == shard.steps else _LAST
        elif shard.steps >= self._due:
            self._said[0] = _CUT
        else:
            return False
        return True

    def _begin_to_settle(self, replica: int) -> None:
        servers = self._host.servers.values()
        for server in list(servers):
            self._host.lose(server.clients[replica].rank)
        self._pushed[:] = np.max([server.shard.accounts[replica].pushed for server in servers], axis=0)
        self._request = self._crew.Iallreduce(self._pushed, self._all_pushed, self._mpi.MAX)
        self._state = _State.SETTLING

    def _settle(self) -> None:
        replica = int(self._said[1])
        for number, server in self._host.servers.items():
            self._settled(number, replica, *server.settle(replica, self._all_pushed))
        self._listen()

    def _begin_to_cut(self) -> None:
        servers = self._host.servers.values()
        for server in servers:
            server.frozen = True
        pushes = [[account.pushes for account in server.shard.accounts] for server in servers]
        self._most[:] = np.max(pushes, axis=0)
        self._request = self._crew.Iallreduce(self._most, self._agreed, self._mpi.MAX)
        self._state = _State.AGREEING

    def _fork(self) -> None:
        for fork in self._forks.values():
            fork.begin(self._agreed)
            fork.server.frozen = False
        self._due = self._host.servers[self._host.number].shard.steps + self._every
        self._state = _State.CATCHING_UP

    def _write(self) -> None:
        """The copies are alike."""
        forks = sorted(self._forks.values(), key=lambda fork: fork.number)
        leases = [fork.end(self._agreed) for fork in forks]
        self._steps, self._leases = forks[0].steps, leases[0]

        def write(note: Note) -> None:
            for fork in forks:
                self._writer.write(fork.number, fork.steps, fork.params, fork.state, note)

        self._writing = Background("a server's checkpoint", write, self._host.limit_s)
        self._state = _State.WRITING

    def _write_on(self) -> bool:
        """Go on when a thread has done its part."""
        if self._writing is None or not self._writing.done():
            return False
        path, self._writing = self._writing.result(), None
        if path is not None:
            self._tell(self._steps, path)
        if self._state == _State.WRITING:
            self._request = self._crew.Ibarrier()
            self._state = _State.MEETING
        elif self._state == _State.COMPLETING:
            self._end()
        else:
            self._state = _State.IDLE
        return True

    def _meet(self) -> None:
        """All shards are written."""
        if self._crew.rank > 0:
            self._end()
            return
        complete = partial(self._writer.complete, self._steps, self._leases)
        self._writing = Background("a checkpoint", complete, self._host.limit_s)
        self._state = _State.COMPLETING

    def _end(self) -> None:
        if self._crew.rank == 0:  # the others can't know whether it is complete: who follows the first one asks again
            self._written = self._steps
        if self._last:
            self._be_done()
        else:
            self._listen()

    def _be_done(self) -> None:
        self._state = _State.DONE
        first = self._host.servers.get(0)
        if first is not None:
            first.note_written()

    def _lost(self, shard: int, client: Client) -> None:
        """A worker has died: the other servers have to know, also in the middle of a checkpoint."""
        if shard == 0:
            self._tell_lost(client)
            if self._crew.rank == 0:
                self._pass_on(client.rank)

    def _pass_on(self, rank: int) -> None:
        letter = np.array([rank])
        try:
            sends = [self._crew.Isend(letter, other, _LOST) for other in range(1, self._crew.size)]
            self._tellings.append((letter, sends))
        except self._mpi.Exception as error:
            if not has_died(error):  # else the next group is told
                raise
