"""A server's roll of its workers: who has spoken when.

Every worker gives its servers a sign of life about once a second, whatever it does, also while it waits: the sign says
so, for who waits for the others mustn't count as one of those that get on. Signs have a tag of their own, so that a
server hears them whatever else it has to hear of that worker first. Where MPI doesn't tell of deaths, who gives none
has died.
"""

from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from dpnn.strategies.downpour.lines import Client
from dpnn.strategies.downpour.protocol import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_CALL_S = 1.0


class Roll:
    """Of the `clients` of a shard."""

    def __init__(
        self, comm: "MPI.Comm", shard: int, clients: Sequence[Client], silence_s: float, limit_s: float
    ) -> None:
        """`silence_s`: how long a client may say nothing; `limit_s`: before its first word, as it is getting ready."""
        from mpi4py import MPI

        self._mpi, self._comm, self._clients, self._tag = MPI, comm, clients, Tag.ALIVE.of(shard)
        self._silence_s, self._limit_s = silence_s, limit_s
        self._called, self._works = 0.0, bytearray(1)

    def call(self) -> tuple[int, list[tuple[Client, float]]]:
        """Now and then: how many work, and who is silent, for how long at least. Else 0 and nobody."""
        now = monotonic()
        if now - self._called < _CALL_S:
            return 0, []
        self._called = now
        clients = [client for client in self._clients if not client.lost and not client.parted]
        working = sum(self.hears(client) for client in clients)
        limits = [(client, self._silence_s if client.spoke else self._limit_s) for client in clients]
        return working, [(client, limit_s) for client, limit_s in limits if now - client.heard > limit_s]

    def hears(self, client: Client) -> bool:
        """Whether there is a new sign, and it works."""
        works = False
        with suppress(self._mpi.Exception):  # that it has died is seen elsewhere
            while self._comm.Iprobe(client.rank, self._tag):
                self._comm.Recv(self._works, client.rank, self._tag)
                client.spoke, client.heard = True, monotonic()
                works = bool(self._works[0])
        return works
