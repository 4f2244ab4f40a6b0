"""What the servers do together: checkpoints while the run goes on, and the settling of losses.

A checkpoint: all servers write their shard as it is after the same pushes. The first server says when. Then all stop
applying for the moment that it takes to agree on a number of pushes of each replica: the most that any server has
applied. From there on each keeps a second copy of its shard, which gets the pushes up to that number only, while the
shard itself gets all: nobody waits. When the copy has them all, a thread writes it.

A loss: a replica has died. The first server tells the others at once, and all take no more of it. Between two
checkpoints they agree on how much of it has arrived: the most that any server got. What it had leased beyond that goes
to other replicas. A push that only some servers got is neither undone nor done again.
"""

from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpnn.comm.background import Background
from dpnn.comm.faults import wait
from dpnn.optim import Optimizer
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.lines import Client
from dpnn.strategies.downpour.protocol import Array, Tag
from dpnn.strategies.downpour.server import Server

if TYPE_CHECKING:
    from mpi4py import MPI

Write = Callable[[int, Array, dict[str, Array], dict[str, Any], Callable[[str], object]], Path | None]

_CUT, _LAST, _END, _LOSS = 1, 2, 3, 4
"""What the first server says: a checkpoint; the last one; that the last one was the last; to settle a loss."""


class _State(Enum):
    IDLE, SETTLING, AGREEING, CATCHING_UP, COUNTING, WRITING, DONE = (auto() for _ in range(7))


class Cut:
    """Makes checkpoints of a server's shard, together with the servers of `crew`; `turn` is part of the server's loop.

    `write(steps, params, state, ledger, note)` writes the shard after so many steps of all replicas, in a thread
    (`Background`). On the first server, which has the ledger, it returns the path of the checkpoint once all shards are
    there; `tell(steps, path)` is then called in the server's loop. `due`: steps from one checkpoint to the next.
    `lost(client)` is called on the first server when a worker has died; `settled(replica, missing, gone)` on all,
    later: so many of its steps are missing on this shard, and so many can't be taken by anybody.
    """

    def __init__(
        self,
        server: Server,
        crew: "MPI.Comm",
        write: Write,
        tell: Callable[[int, Path], object],
        due: int,
        lost: Callable[[Client], None] = lambda client: None,
        settled: Callable[[int, int, int], None] = lambda replica, missing, gone: None,
    ) -> None:
        from mpi4py import MPI

        self._mpi, self._server, self._crew = MPI, server, crew
        self._write, self._tell, self._every = write, tell, due
        self._tell_lost, self._settled = lost, settled
        self._due, self._written = server.steps + due, -1
        self._state, self._last = _State.IDLE, False
        self._said = np.zeros(2, np.int64)
        """What, and of a loss the replica."""
        self._pushes = np.zeros(len(server.clients), np.int64)
        self._target = np.zeros_like(self._pushes)
        self._taken = np.zeros_like(self._pushes)
        """Steps of each replica in the copy."""
        self._agreed = np.zeros_like(self._pushes)
        self._pushed = np.zeros(4)
        self._told_of = np.zeros(1, np.int64)
        self._tellings: list[MPI.Request] = []
        self._word = MPI.REQUEST_NULL if crew.rank == 0 else crew.Irecv(self._told_of, 0, Tag.LOST)
        """The next word of a loss."""
        self._request = self._listen()
        self._params: Array | None = None
        self._kept: dict[str, Array] = {}
        self._optimizers: dict[int, Optimizer] = {}
        self._steps, self._ledger = 0, server.ledger
        self._writing: Background[Path | None] | None = None
        server.watch = self._applied
        server.lost = self._lost

    def turn(self) -> bool:
        """Go on with what there is to do; whether anything has happened. An error of the writing is raised here."""
        if self._word != self._mpi.REQUEST_NULL and self._word.Test():
            self._server.lose(int(self._told_of[0]))
            self._word = self._crew.Irecv(self._told_of, 0, Tag.LOST)
        match self._state:
            case _State.IDLE:
                if not self._told():
                    return False
                self._begin()
            case _State.SETTLING:
                if not self._request.Test():
                    return False
                self._settle()
            case _State.AGREEING:
                if not self._request.Test():
                    return False
                self._fork()
            case _State.CATCHING_UP:
                clients = self._server.clients
                if any(self._pushes[c.replica] < self._target[c.replica] and not c.lost for c in clients):
                    return False
                self._request = self._crew.Iallreduce(self._taken, self._agreed, self._mpi.MAX)
                self._state = _State.COUNTING
            case _State.COUNTING:
                if not self._request.Test():
                    return False
                self._count()
                self._start()
            case _State.WRITING:
                if self._writing is None or not self._writing.done():
                    return False
                self._end()
            case _State.DONE:
                if not self._server.may_close:
                    return False
                self._close()
        return True

    def _listen(self) -> "MPI.Request":
        """The next word of the first server."""
        return self._mpi.REQUEST_NULL if self._crew.rank == 0 else self._crew.Ibcast(self._said, 0)

    def _told(self) -> bool:
        """Whether the first server has said something; on that one, whether there is anything to say."""
        if self._crew.rank:
            return bool(self._request.Test())
        server = self._server
        if server.losses:
            self._said[:] = _LOSS, server.losses.popleft().replica
        elif server.left == 0:
            self._said[0] = _END if self._written == server.steps else _LAST
        elif server.steps >= self._due:
            self._said[0] = _CUT
        else:
            return False
        wait(self._crew.Ibcast(self._said, 0).Test, "the other servers to hear of a checkpoint", server.limit_s)
        return True

    def _begin(self) -> None:
        server, (what, replica) = self._server, self._said.tolist()
        if what == _LOSS:
            client = server.clients[replica]
            server.lose(client.rank)
            self._request = self._crew.Iallreduce(client.pushed, self._pushed, self._mpi.MAX)
            self._state = _State.SETTLING
            return
        self._last = what != _CUT
        if what == _END:
            self._be_done()
            return
        server.frozen = True
        self._pushes[:] = [client.pushes for client in server.clients]
        self._request = self._crew.Iallreduce(self._pushes, self._target, self._mpi.MAX)
        self._state = _State.AGREEING

    def _lost(self, client: Client) -> None:
        """A worker has died: the other servers have to know, also in the middle of a checkpoint."""
        if self._crew.rank == 0:
            self._tell_lost(client)
            letter = np.array([client.rank])
            self._tellings += [self._crew.Isend(letter, server, Tag.LOST) for server in range(1, self._crew.size)]

    def _settle(self) -> None:
        replica = int(self._said[1])
        self._settled(replica, *self._server.settle(self._server.clients[replica], self._pushed))
        self._go_on()

    def _fork(self) -> None:
        """The copy, as the shard is now."""
        server = self._server
        if self._params is None:
            self._params = np.empty_like(server.params)
            self._kept = {name: np.empty_like(array) for name, array in server.state.items()}
        np.copyto(self._params, server.params)
        for name, array in server.state.items():
            np.copyto(self._kept[name], array)
        self._steps = server.steps
        self._taken[:] = [client.pushed[0] for client in server.clients]
        self._ledger = server.ledger and server.ledger.copy()
        self._due = server.steps + self._every
        self._state = _State.CATCHING_UP
        server.frozen = False

    def _applied(self, client: Client, rate: float, scale: float) -> None:
        """The server has applied a push: the copy gets it too, if it belongs to the checkpoint."""
        if self._state != _State.CATCHING_UP or client.pushes > self._target[client.replica]:
            return
        if scale and self._params is not None:
            if client.staged not in self._optimizers:
                gradients = self._server.gradients(client)
                self._optimizers[client.staged] = self._server.make(self._params, gradients, self._kept)
            self._optimizers[client.staged].apply(0, self._params.size, rate, scale)
        self._pushes[client.replica] = client.pushes
        self._take(client.replica, client.request.steps)

    def _take(self, replica: int, steps: int) -> None:
        """So many steps more of a replica count as being in the copies."""
        self._steps += steps
        self._taken[replica] += steps
        if self._ledger is not None:
            self._ledger.arrived(replica, steps)

    def _count(self) -> None:
        """The copies are alike, but for the last pushes of who has died meanwhile: what one has of it counts."""
        for replica, steps in enumerate((self._agreed - self._taken).tolist()):
            if steps:
                self._take(replica, steps)

    def _start(self) -> None:
        """Write the copy."""
        if self._params is not None:
            ledger = self._ledger.state() if isinstance(self._ledger, Ledger) else {}
            write = partial(self._write, self._steps, self._params, self._kept, ledger)
            self._writing = Background("a server's checkpoint", write, self._server.limit_s)
        self._state = _State.WRITING

    def _end(self) -> None:
        self._written = self._steps
        path = self._writing.result() if self._writing else None
        if path:
            self._tell(self._steps, path)
        if self._last:
            self._be_done()
        else:
            self._go_on()

    def _be_done(self) -> None:
        self._state, self._server.written = _State.DONE, True

    def _go_on(self) -> None:
        self._state = _State.IDLE
        self._request = self._listen()

    def _close(self) -> None:
        self._server.close()
        if self._word != self._mpi.REQUEST_NULL:
            self._word.Cancel()
            self._word.Wait()
