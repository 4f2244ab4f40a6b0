"""The lines between a server and its workers: what MPI is asked to receive and to send. None of it blocks.

From every worker its next request is awaited, and announced gradients are received into a few buffers. Where there is a
buffer for every worker, they are received before they are announced.
"""

from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from dpnn.comm.faults import poke
from dpnn.comm.losses import Losses, outlives
from dpnn.memory import zeros_like
from dpnn.strategies.downpour.copies import Copy
from dpnn.strategies.downpour.protocol import Answer, Array, Kind, Letter, Request, Tag

if TYPE_CHECKING:
    from mpi4py import MPI

_STAGED = 4
"""Buffers for gradients that are on their way."""


class Client:
    """What a server knows of a worker as one to talk with."""

    def __init__(self, replica: int, rank: int) -> None:
        self.replica, self.rank = replica, rank
        self.letter = Letter(Request)
        self.request = Request(Kind.FETCH)
        """What it wants now."""
        self.answers = {tag: Letter(Answer) for tag in (Tag.ANSWER, Tag.SAID)}
        self.staged = -1
        """The buffer that its gradients are in."""
        self.listened = self.announced = self.arrived = False
        """Whether its next request is awaited; whether it has gradients to push; whether they are there."""
        self.heard, self.spoke = monotonic(), False
        """When it last spoke; whether it ever did."""
        self.parted = self.lost = False
        """Whether it will ask for nothing any more; has died, so that neither."""
        self.why = ""
        """How it is known to have died."""


class Lines:
    """To the `clients` of a shard, over `comm`. Each has pushes of the shape of `params`; `every`: a buffer for each.

    `more`: buffers beside those, for gradients that were applied and are still to be passed on.
    """

    def __init__(
        self, comm: "MPI.Comm", shard: int, clients: Sequence[Client], params: Array, every: bool, more: int = 0
    ) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self._clients, self._params = MPI, comm, clients, params
        self._tag = {tag: tag.of(shard) for tag in Tag}
        n = len(clients) if every else min(len(clients), _STAGED)
        self._keeps = n == len(clients)
        n += more
        self._staged = [zeros_like(params) for _ in range(n)]
        self._free = list(range(n))
        self._listens = [comm.Recv_init(client.letter.bytes, client.rank, self._tag[Tag.REQUEST]) for client in clients]
        self._requests: list[MPI.Request] = [*self._listens, *[MPI.REQUEST_NULL] * n]
        """The next request of every worker, then the gradients for every buffer."""
        self._holders = [-1] * n
        """Whose gradients a buffer is for."""
        self._wanting: deque[int] = deque()
        """Who has no buffer for gradients, and has announced some or is to have one before."""
        self._sends: list[tuple[list[MPI.Request], Client, Copy | None]] = []
        """What is being sent, to whom, and of which copy."""
        self._losses, self.survives = Losses(comm), outlives()
        """`survives`: whether the job goes on where a rank of it dies."""
        self._dead: set[int] = set()
        self.broken: list[Client] = []
        """To whom the connection has broken, where MPI doesn't tell of deaths."""
        self._farewells: list[MPI.Request] = []
        for client in clients:
            self.listen(client)
            if self._keeps and not client.lost:
                self._wanting.append(client.replica)
        self._grant()

    def take(self, client: Client) -> tuple[int, Array]:
        """What the client has pushed, and the number of its buffer, which is then to be given back by `free`."""
        buffer = client.staged
        client.staged, client.announced, client.arrived = -1, False, False
        if self._keeps:
            self._wanting.append(client.replica)
        return buffer, self._staged[buffer]

    def free(self, buffer: int) -> None:
        """The gradients in a buffer were used."""
        self._free.append(buffer)
        self._grant()

    def arrived(self) -> tuple[list[Client], list[Client]]:
        """Whose request has arrived, and whose gradients. A request is to be followed by `listen`."""
        poke(self._comm)  # MPI moves; a Testsome that finds something doesn't look for more
        asking, pushing = list[Client](), list[Client]()
        for place in self._tested():
            if place < len(self._clients):
                client = self._clients[place]
                client.request, client.listened = client.letter.read(), False
                asking.append(client)
            else:
                client = self._clients[self._holders[place - len(self._clients)]]
                client.arrived = True
                pushing.append(client)
            client.heard, client.spoke = monotonic(), True
        return asking, pushing

    def _tested(self) -> Sequence[int]:
        """The places of the requests that are complete."""
        try:
            return self._mpi.Request.Testsome(self._requests) or ()
        except self._mpi.Exception:
            if not self.survives:
                raise
        # Somebody has died, as will be told. What the others sent is complete all the same; which, isn't said.
        self._dead.update(self._losses.new())
        places = list[int]()
        for client in self._clients:
            if client.lost or client.rank in self._dead:
                continue
            try:
                if client.listened and self._listens[client.replica].Test():
                    places.append(client.replica)
                if client.staged >= 0 and not client.arrived:
                    place = len(self._clients) + client.staged
                    if self._requests[place].Test():
                        places.append(place)
            except self._mpi.Exception as error:
                self._note_broken(client, error)
        return places

    def _note_broken(self, client: Client, error: Exception) -> None:
        """MPI reports an error of a client: that it has died, where the job goes on. Else it is raised again."""
        if not self.survives:
            raise error
        if not self._losses.tells:  # else it will be told
            self.broken.append(client)

    def listen(self, client: Client) -> None:
        """Await the next request of a client."""
        if not client.lost:
            client.listened = True
            self._listens[client.replica].Start()

    def announce(self, client: Client) -> None:
        """A client has gradients to push: receive them as soon as there is a buffer."""
        client.announced = True
        if client.staged < 0 and not self._keeps:
            self._wanting.append(client.replica)
            self._grant()

    def _grant(self) -> None:
        """Receive gradients of who wants a buffer, as far as there are any."""
        while self._wanting and self._free:
            client = self._clients[self._wanting.popleft()]
            client.staged = buffer = self._free.pop()
            self._holders[buffer] = client.replica
            arrival = self._comm.Irecv(self._staged[buffer], client.rank, self._tag[Tag.GRADIENTS])
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
            return self._comm.Isend(what, client.rank, self._tag[tag])
        except self._mpi.Exception as error:
            self._note_broken(client, error)
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
        except self._mpi.Exception as error:
            self._note_broken(client, error)
        return True  # to one who has died

    def hang_up(self, client: Client) -> None:
        """A client counts as dead, and is told so: receive no more of it, and forget what is being sent to it."""
        client.lost, replica = True, client.replica
        if replica in self._wanting:
            self._wanting.remove(replica)
        self._cancel(replica)
        if client.staged >= 0:
            if self._cancel(len(self._clients) + client.staged):
                self._free.append(client.staged)
            else:  # it may still be written to: another takes its place
                self._free.append(len(self._staged))
                self._staged.append(zeros_like(self._params))
                self._holders.append(-1)
                self._requests.append(self._mpi.REQUEST_NULL)
            client.staged, client.announced, client.arrived = -1, False, False
            self._grant()
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
