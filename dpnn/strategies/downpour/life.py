"""Signs of life: every worker gives its servers one about once a second, whatever it does, also while it waits.

They have a tag of their own, so that a server hears them whatever else it has to hear of that worker first. Where MPI
doesn't tell of deaths, who gives none has died. One that lives all the same is told that it doesn't count any more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from dpnn.comm.faults import reported
from dpnn.errors import RankError
from dpnn.strategies.downpour.protocol import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

    from dpnn.strategies.downpour.lines import Client

_TICK_S = 1.0


class Life:
    """A worker's, as the ranks `servers` of `comm` see it."""

    def __init__(self, comm: "MPI.Comm", servers: Sequence[int]) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self._ticked = MPI, comm, 0.0
        self._signs: dict[int, MPI.Request] = dict.fromkeys(servers, MPI.REQUEST_NULL)
        """The last one to each server."""
        self.unserved = False
        """Whether the worker needs a server now: where it fails then, that has failed it."""

    def tick(self) -> None:
        """Give a sign, if it is time. RankError where the servers count this worker as dead."""
        now = monotonic()
        if now - self._ticked < _TICK_S:
            return
        self._ticked = now
        for server, sign in self._signs.items():
            gone = False
            with suppress(self._mpi.Exception):  # that a server has died is seen where it is needed
                if sign.Test():
                    self._signs[server] = self._comm.Isend(bytearray(), server, Tag.ALIVE)
                gone = self._comm.Iprobe(server, Tag.GONE)
            if gone:
                raise RankError("the servers count this rank as dead, since it said nothing for parallel.silence_s")

    @contextmanager
    def served(self) -> Iterator[None]:
        """The block asks MPI to reach a server. RankError where it can't."""
        self.unserved = True
        with reported("reaching a server"):
            yield
        self.unserved = False

    def end(self) -> "list[MPI.Request]":
        """Give no more signs; those that are still under way."""
        self._ticked = inf
        return list(self._signs.values())


class Roll:
    """A server's, of its `clients`: who has spoken when."""

    def __init__(self, comm: "MPI.Comm", clients: "Sequence[Client]", silence_s: float, limit_s: float) -> None:
        """`silence_s`: how long a client may say nothing; `limit_s`: before its first word, as it is getting ready."""
        from mpi4py import MPI

        self._mpi, self._comm, self._clients = MPI, comm, clients
        self._silence_s, self._limit_s = silence_s, limit_s
        self._called = 0.0

    def call(self) -> "tuple[int, list[tuple[Client, float]]]":
        """Now and then: how many live, and who is silent, for how long at least. Else 0 and nobody."""
        now = monotonic()
        if now - self._called < _TICK_S:
            return 0, []
        self._called = now
        clients = [client for client in self._clients if not client.lost and not client.parted]
        alive = sum(self.hears(client) for client in clients)
        limits = [(client, self._silence_s if client.spoke else self._limit_s) for client in clients]
        return alive, [(client, limit_s) for client, limit_s in limits if now - client.heard > limit_s]

    def hears(self, client: "Client") -> bool:
        """Whether there is a new sign."""
        new = False
        with suppress(self._mpi.Exception):  # that it has died is seen elsewhere
            while self._comm.Iprobe(client.rank, Tag.ALIVE):
                self._comm.Recv(bytearray(), client.rank, Tag.ALIVE)
                new = client.spoke = True
                client.heard = monotonic()
        return new
