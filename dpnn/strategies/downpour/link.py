"""A worker's side of the lines to who holds a shard: what MPI is asked to send and to receive. None of it blocks.

Where that one has died, messages that were under way count as not there; `connect` makes lines to who holds it now.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpnn.comm.losses import has_died, left_alone
from dpnn.strategies.downpour.protocol import Answer, Array, Letter, Request, Tag, pieces

if TYPE_CHECKING:
    from mpi4py import MPI

_KEPT = 1024
"""Pushes whose numbers are remembered."""


class Link:
    """To who holds numbers [lo, hi) of `params`, as shard `number`. Pushes are sent from one of `sets` of gradients."""

    def __init__(
        self, comm: "MPI.Comm", number: int, rank: int, lo: int, hi: int, params: Array, sets: Sequence[Array]
    ) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self.number = MPI, comm, number
        self._tag = {tag: tag.of(number) for tag in Tag}
        self._params, self._sets = params[lo:hi], [gradients[lo:hi] for gradients in sets]
        self._letters = [Letter(Request) for _ in sets]
        self._answer, self.said = Letter(Answer), Letter(Answer)
        self.history: deque[Request] = deque(maxlen=_KEPT)
        """The last pushes."""
        self.coming = False
        """Whether parameters were asked for that haven't arrived."""
        self._hears: MPI.Request = MPI.REQUEST_NULL
        self._sign: MPI.Request = MPI.REQUEST_NULL
        self._works = bytearray(1)
        """The last sign of life, and what it says."""
        self.connect(rank)

    def connect(self, rank: int) -> None:
        """From now on `rank` holds the shard."""
        mpi, comm, tag = self._mpi, self._comm, self._tag
        self.rank, self.dead = rank, False
        """`dead`: whether MPI has reported that it has died, who holds the shard."""
        self._arrivals = [comm.Recv_init(self._answer.bytes, rank, tag[Tag.ANSWER])]
        cuts = pieces(self._params.size)
        self._arrivals += [comm.Recv_init(self._params[lo:hi], rank, tag[Tag.PARAMS]) for lo, hi in cuts]
        self._pushes: list[list[MPI.Prequest]] = []
        for letter, gradients in zip(self._letters, self._sets, strict=True):
            request = comm.Send_init(letter.bytes, rank, tag[Tag.REQUEST])
            self._pushes.append([request, comm.Send_init(gradients, rank, tag[Tag.GRADIENTS])])
        self._asks: list[tuple[MPI.Request, Letter[Request]]] = []
        self._hears = self._sign = mpi.REQUEST_NULL

    def hang_up(self) -> None:
        """Who holds the shard has died: nothing more arrives from it."""
        for request in (self._hears, *self._arrivals, *(request for push in self._pushes for request in push)):
            try:
                if not request.Test():
                    request.Cancel()
                    request.Test()
            except self._mpi.Exception:
                continue  # the error of who has died ends it too

    def push(self, which: int, request: Request) -> None:
        """Send the gradients of one of the sets."""
        self._letters[which].write(request)
        self._tried(lambda: self._mpi.Prequest.Startall(self._pushes[which]))

    def has_left(self, which: int) -> bool:
        """Whether what was pushed from a set has been sent."""
        return self._tested(self._pushes[which])

    def expect(self) -> None:
        """Receive the parameters that are being asked for."""
        self.coming = True

        def start() -> None:
            for arrival in self._arrivals:  # one by one: pieces of a shard are told apart by their order alone
                arrival.Start()

        self._tried(start)

    def has_come(self) -> bool:
        """Whether parameters that were asked for are there."""
        if self.coming and self._tested(self._arrivals):
            self.coming = False
        return not self.coming

    @property
    def answer(self) -> Answer:
        """What was said of the last parameters."""
        return self._answer.read()

    def ask(self, request: Request) -> None:
        """Send a request without numbers behind it."""
        letter = Letter(Request)
        letter.write(request)
        self._asks = [ask for ask in self._asks if not self._tested([ask[0]])]

        def send() -> None:
            self._asks.append((self._comm.Isend(letter.bytes, self.rank, self._tag[Tag.REQUEST]), letter))

        self._tried(send)

    def ask_to_hear(self, request: Request) -> None:
        """Send a request that is answered by something that is `said`."""

        def listen() -> None:
            self._hears = self._comm.Irecv(self.said.bytes, self.rank, self._tag[Tag.SAID])

        self._tried(listen)
        self.ask(request)

    def hears(self) -> bool:
        """Whether it was said."""
        return self._tested([self._hears])

    def live(self, works: bool) -> bool:
        """Give a sign of life, and whether this rank works; False where it counts as dead all the same."""
        gone = False

        def sign() -> None:
            nonlocal gone
            gone = self._comm.Iprobe(self.rank, self._tag[Tag.GONE])
            if self._sign.Test():
                self._works[0] = works
                self._sign = self._comm.Isend(self._works, self.rank, self._tag[Tag.ALIVE])

        self._tried(sign)
        return not gone

    @property
    def silent(self) -> bool:
        """Whether all that was asked has been sent."""
        return self._tested([request for request, _ in self._asks])

    def _tested(self, requests: "Sequence[MPI.Request]") -> bool:
        """Whether all are complete; never, where one of them has failed since its other end has died."""
        done = False

        def test() -> None:
            nonlocal done
            done = self._mpi.Request.Testall(requests)

        self._tried(test)
        return done and not self.dead

    def _tried(self, call: Callable[[], object]) -> None:
        """Call it, and note where it tells that who holds the shard has died."""
        try:
            call()
        except self._mpi.Exception as error:
            if not (has_died(error) or left_alone()):
                raise
            self.dead = True
