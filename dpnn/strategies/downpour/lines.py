"""The lines between a server and its workers: what MPI is asked to receive and to send. None of it blocks.

From every worker its next request is awaited, and announced gradients are received into a few buffers. Where there is a
buffer for every worker, they are received before they are announced.
"""

from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np

from dpnn.comm.faults import poke
from dpnn.comm.losses import Losses, survives
from dpnn.strategies.downpour.copies import Copy
from dpnn.strategies.downpour.protocol import Answer, Array, Kind, Letter, Request, Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_STAGED = 4
"""Buffers for gradients that are on their way."""


class Client:
    """What a server knows of a worker."""

    def __init__(self, replica: int, rank: int) -> None:
        self.replica, self.rank = replica, rank
        self.letter = Letter(Request)
        self.request = Request(Kind.FETCH)
        """What it wants now."""
        self.answers = {tag: Letter(Answer) for tag in (Tag.ANSWER, Tag.LEASED)}
        self.staged = -1
        """The buffer that its gradients are in."""
        self.announced = self.arrived = False
        """Whether it has said so; whether they are."""
        self.pushes = self.staleness = self.lead = 0
        """Pushes that were applied; the staleness of the last one; steps, as far as `parallel.lead` counts them."""
        self.heard, self.spoke = monotonic(), False
        """When it last spoke; whether it ever did."""
        self.pushed = np.zeros(4)
        """Steps, samples, loss and bad samples of its pushes."""
        self.joined = self.left = self.parted = self.lost = False
        """Whether it takes part; will push no more; will ask for nothing any more; has died, so that neither."""
        self.why = ""
        """How it is known to have died."""


class Lines:
    """To the `clients`, over `comm`. Each has pushes of the shape of `params`; `every`: with a buffer for each."""

    def __init__(self, comm: "MPI.Comm", clients: Sequence[Client], params: Array, every: bool) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self._clients, self._params = MPI, comm, clients, params
        n = len(clients) if every else min(len(clients), _STAGED)
        self._staged = [np.empty_like(params) for _ in range(n)]
        self._free = list(range(n))
        self._keeps = n == len(clients)
        self._listens = [comm.Recv_init(client.letter.bytes, client.rank, Tag.REQUEST) for client in clients]
        self._requests: list[MPI.Request] = [*self._listens, *[MPI.REQUEST_NULL] * n]
        """The next request of every worker, then the gradients for every buffer."""
        self._holders = [-1] * n
        """Whose gradients a buffer is for."""
        self._announced: deque[int] = deque()
        """Who has gradients for which there is no buffer yet."""
        self._sends: list[tuple[list[MPI.Request], Client, Copy | None]] = []
        """What is being sent, to whom, and of which copy."""
        self._losses, self.survives = Losses(comm), survives()
        """`survives`: whether the job goes on where a rank of it dies."""
        self._broken: list[int] = []
        """To whom the connection has broken."""
        self._farewells: list[MPI.Request] = []
        self._statuses = [MPI.Status() for _ in self._requests] if self.survives else None
        self._client_of = {client.rank: client for client in clients}
        for client, listen in zip(clients, self._listens, strict=True):
            listen.Start()
            if self._keeps:
                self._grant(client)

    def gradients(self, client: Client) -> Array:
        """What the client has pushed."""
        return self._staged[client.staged]

    def lost(self) -> list[int]:
        """Ranks that are known to have died since the last call. Where MPI doesn't tell, a silent one may have too."""
        broken, self._broken = self._broken, []
        return [*self._losses.new(), *broken]

    def arrived(self) -> tuple[list[Client], list[Client]]:
        """Whose request has arrived, and whose gradients. A request is to be followed by `listen`."""
        poke(self._comm)  # MPI moves; a Testsome that finds something doesn't look for more
        asking, pushing = list[Client](), list[Client]()
        for place in self._tested():
            if place < len(self._clients):
                client = self._clients[place]
                client.request = client.letter.read()
                asking.append(client)
            else:
                client = self._clients[self._holders[place - len(self._clients)]]
                client.arrived = True
                pushing.append(client)
            client.heard, client.spoke = monotonic(), True
        while self._announced and self._free:
            self._grant(self._clients[self._announced.popleft()])
        return asking, pushing

    def _tested(self) -> Sequence[int]:
        """The places of the requests that are complete."""
        try:
            return self._mpi.Request.Testsome(self._requests, self._statuses) or ()
        except self._mpi.Exception:
            if self._statuses is None:
                raise
        # Somebody has died, as `lost` or silence will tell. What is complete is known by its source and tag.
        places = []
        for status in self._statuses:
            client = self._client_of.get(status.source)
            if client is None or status.error or client.lost:
                continue
            if status.tag == Tag.REQUEST:
                places.append(client.replica)
            elif status.tag == Tag.GRADIENTS:
                places.append(len(self._clients) + client.staged)
        return places

    def listen(self, client: Client) -> None:
        """Await the next request of a client."""
        if not client.lost:
            self._listens[client.replica].Start()

    def announce(self, client: Client) -> None:
        """A client has gradients to push: receive them as soon as there is a buffer."""
        client.announced = True
        if client.staged < 0:
            self._announced.append(client.replica)

    def done(self, client: Client) -> None:
        """The client's gradients were used."""
        self._free.append(client.staged)
        client.staged, client.announced, client.arrived = -1, False, False
        if self._keeps:
            self._grant(client)

    def _grant(self, client: Client) -> None:
        """Receive its next gradients."""
        client.staged = buffer = self._free.pop()
        self._holders[buffer] = client.replica
        arrival = self._comm.Irecv(self._staged[buffer], client.rank, Tag.GRADIENTS)
        self._requests[len(self._clients) + buffer] = arrival

    def send_piece(self, piece: Array, client: Client) -> "MPI.Request":
        """Begin to send some of the parameters."""
        return self._begun(piece, client, Tag.PARAMS)

    def sending(self, requests: "list[MPI.Request]", client: Client, copy: Copy) -> None:
        """A copy is being sent, and isn't written before it has been."""
        copy.readers += 1
        self._sends.append((requests, client, copy))

    def answer(self, client: Client, tag: Tag, answer: Answer) -> None:
        """Send an answer."""
        letter = client.answers[tag]
        letter.write(answer)
        self._sends.append(([self._begun(letter.bytes, client, tag)], client, None))

    def _begun(self, what: Array | bytearray, client: Client, tag: Tag) -> "MPI.Request":
        """Begin to send."""
        try:
            return self._comm.Isend(what, client.rank, tag)
        except self._mpi.Exception:
            if not self.survives:
                raise
            self._broken.append(client.rank)
            return self._mpi.REQUEST_NULL

    def sent(self) -> bool:
        """Forget what has been sent; whether there was any."""
        sends, self._sends = self._sends, []
        for requests, client, copy in sends:
            if not client.lost and not self._are_sent(requests, client):
                self._sends.append((requests, client, copy))
            elif copy:
                copy.readers -= 1
        return len(self._sends) < len(sends)

    @property
    def silent(self) -> bool:
        """Whether nothing is being sent."""
        return not self._sends

    def _are_sent(self, requests: "list[MPI.Request]", client: Client) -> bool:
        try:
            return self._mpi.Request.Testall(requests)
        except self._mpi.Exception:
            if not self.survives:
                raise
            self._broken.append(client.rank)
            return True

    def hang_up(self, client: Client) -> None:
        """A client counts as dead, and is told so: receive no more of it, and forget what is being sent to it."""
        client.lost, replica = True, client.replica
        if replica in self._announced:
            self._announced.remove(replica)
        self._cancel(replica)
        if client.staged >= 0:
            if self._cancel(len(self._clients) + client.staged):
                self._free.append(client.staged)
            else:  # it may still be written to: another takes its place
                self._free.append(len(self._staged))
                self._staged.append(np.empty_like(self._params))
                self._holders.append(-1)
                self._requests.append(self._mpi.REQUEST_NULL)
            client.staged, client.announced, client.arrived = -1, False, False
        self._farewells.append(self._begun(bytearray(), client, Tag.GONE))

    def _cancel(self, place: int) -> bool:
        """End a request; whether MPI is done with its memory."""
        request, self._requests[place] = self._requests[place], self._mpi.REQUEST_NULL
        if request == self._mpi.REQUEST_NULL:
            return True
        try:
            request.Cancel()
            return request.Test()
        except self._mpi.Exception:
            return True  # the error of who has died ends it too

    def close(self) -> None:
        """Hear no more."""
        for place in range(len(self._requests)):
            self._cancel(place)
        for listen, client in zip(self._listens, self._clients, strict=True):
            if not client.lost:
                listen.Free()
