"""A checkpoint while the run goes on: all servers write their shard as it is after the same pushes.

The first server says when. Then all stop applying for the moment that it takes to agree on a number of pushes of each
replica: the most that any server has applied. From there on each keeps a second copy of its shard, which gets the
pushes up to that number only, while the shard itself gets all: nobody waits. When the copy has them all, a thread
writes it.
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
from dpnn.strategies.downpour.protocol import Array
from dpnn.strategies.downpour.server import Client, Server

if TYPE_CHECKING:
    from mpi4py import MPI

Write = Callable[[int, Array, dict[str, Array], dict[str, Any], Callable[[str], object]], Path | None]

_CUT, _LAST, _END = 1, 2, 3
"""What the first server says: a checkpoint; the last one; that the last one was the last."""


class _State(Enum):
    IDLE, AGREEING, CATCHING_UP, WRITING, DONE = (auto() for _ in range(5))


class Cut:
    """Makes checkpoints of a server's shard, together with the servers of `crew`; `turn` is part of the server's loop.

    `write(steps, params, state, ledger, note)` writes the shard after so many steps of all replicas, in a thread
    (`Background`). On the first server, which has the ledger, it returns the path of the checkpoint once all shards are
    there; `tell(steps, path)` is then called in the server's loop. `due`: steps from one checkpoint to the next.
    """

    def __init__(
        self,
        server: Server,
        crew: "MPI.Comm",
        write: Write,
        tell: Callable[[int, Path], object],
        due: int,
    ) -> None:
        from mpi4py import MPI

        self._mpi, self._server, self._crew = MPI, server, crew
        self._write, self._tell, self._every = write, tell, due
        self._due, self._written = server.steps + due, -1
        self._state, self._last = _State.IDLE, False
        self._said = np.zeros(1, np.int64)
        self._pushes = np.zeros(len(server.clients), np.int64)
        self._target = np.zeros_like(self._pushes)
        self._request = self._listen()
        self._params: Array | None = None
        self._kept: dict[str, Array] = {}
        self._optimizers: dict[int, Optimizer] = {}
        self._steps, self._ledger = 0, server.ledger
        self._writing: Background[Path | None] | None = None
        server.watch = self._applied

    def turn(self) -> bool:
        """Go on with what there is to do; whether anything has happened. An error of the writing is raised here."""
        match self._state:
            case _State.IDLE:
                if not self._told():
                    return False
                self._begin()
            case _State.AGREEING:
                if not self._request.Test():
                    return False
                self._fork()
            case _State.CATCHING_UP:
                if (self._pushes < self._target).any():
                    return False
                self._start()
            case _State.WRITING:
                if self._writing is None or not self._writing.done():
                    return False
                self._end()
            case _State.DONE:
                if not self._server.closing:
                    return False
                self._server.close()
        return True

    def _listen(self) -> "MPI.Request":
        """The next word of the first server."""
        return self._mpi.REQUEST_NULL if self._crew.rank == 0 else self._crew.Ibcast(self._said, 0)

    def _told(self) -> bool:
        """Whether the first server has said something; on that one, whether there is anything to say."""
        if self._crew.rank:
            return bool(self._request.Test())
        server = self._server
        if server.left == 0:
            self._said[0] = _END if self._written == server.steps else _LAST
        elif server.steps >= self._due:
            self._said[0] = _CUT
        else:
            return False
        wait(self._crew.Ibcast(self._said, 0).Test, "the other servers to hear of a checkpoint", server.limit_s)
        return True

    def _begin(self) -> None:
        self._last = self._said[0] != _CUT
        if self._said[0] == _END:
            self._state = _State.DONE
            return
        self._server.frozen = True
        self._pushes[:] = [client.pushes for client in self._server.clients]
        self._request = self._crew.Iallreduce(self._pushes, self._target, self._mpi.MAX)
        self._state = _State.AGREEING

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
        steps = client.request.steps
        self._pushes[client.replica] = client.pushes
        self._steps += steps
        if self._ledger is not None:
            self._ledger.arrived(client.replica, steps)

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
        self._state = _State.DONE if self._last else _State.IDLE
        if not self._last:
            self._request = self._listen()
