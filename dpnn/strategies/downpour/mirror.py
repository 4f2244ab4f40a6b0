"""A shard's mirror: another server does all that changes the shard, too, and takes it over where its holder dies.

The holder begins with a snapshot and goes on with each change, in their order, without waiting. Messages are sent
synchronously: what has been sent, the mirror has. A push stays in its buffer until then, so at most as many pushes as
there are buffers are lost with the holder.
"""

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

from dpnn.comm.faults import poke
from dpnn.comm.losses import has_died
from dpnn.memory import zeros_like
from dpnn.strategies.downpour.protocol import Array, Change, Deed, Letter, Tag
from dpnn.strategies.downpour.shard import Shard

if TYPE_CHECKING:
    from mpi4py import MPI

BUFFERS = 2
"""For gradients that are on their way to a shadow."""


class Mirror:
    """The line from who holds a shard, which has that `number`, to its mirror: `rank` of `comm`."""

    def __init__(self, comm: "MPI.Comm", rank: int, number: int, shard: Shard) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self.rank = MPI, comm, rank
        self._tag = {tag: tag.of(number) for tag in Tag}
        self._died = False
        self._sends: deque[tuple[list[MPI.Request], object, Callable[[], object]]] = deque()
        """What is being sent, what it is sent from, and what is to be done then."""
        self.pushes = self.nbytes = 0
        self.seconds = 0.0
        """Pushes and bytes that were sent, and how long this process was at it."""
        told = shard.snapshot()
        arrays = [array.copy() for array in (shard.params, *shard.state.values())]
        self.tell(Change(Deed.SNAPSHOT, number=len(told)))
        sends = [self._issend(told, Tag.STATE), *[self._issend(array, Tag.CHANGED) for array in arrays]]
        self._sends.append((sends, (told, arrays), lambda: None))
        self.pushes = self.nbytes = 0

    def tell(self, change: Change, gradients: Array | None = None, then: Callable[[], object] = lambda: None) -> None:
        """Begin to tell of a change; `then` is called once the mirror has it."""
        begin, letter = perf_counter(), Letter(Change)
        letter.write(change)
        sends = [self._issend(letter.bytes, Tag.CHANGE)]
        if gradients is not None:
            sends.append(self._issend(gradients, Tag.CHANGED))
            self.pushes += 1
            self.nbytes += gradients.nbytes
        self._sends.append((sends, letter, then))
        self.seconds += perf_counter() - begin

    def turn(self) -> bool:
        """Go on with what follows from what was sent; whether there was anything."""
        moved = False
        while self._sends and self._are_sent(self._sends[0][0]):
            self._sends.popleft()[2]()
            moved = True
        return moved

    def drop(self) -> None:
        """Tell no more, as if all had been heard."""
        sends, self._sends = self._sends, deque()
        for _, _, then in sends:
            then()

    def _issend(self, what: object, tag: Tag) -> "MPI.Request":
        try:
            return self._comm.Issend(what, self.rank, self._tag[tag])
        except self._mpi.Exception as error:
            if not has_died(error):
                raise
            self._died = True
            return self._mpi.REQUEST_NULL

    def _are_sent(self, requests: "list[MPI.Request]") -> bool:
        """Whether the mirror has them. Once it has died, as will be told, it has nothing more."""
        try:
            return not self._died and self._mpi.Request.Testall(requests)
        except self._mpi.Exception as error:
            if not has_died(error):
                raise
            self._died = True
            return False


class Shadow:
    """A mirror of the shard of that `number`, which `rank` of `comm` holds.

    `shard`: made like that one, of no matter what numbers.
    """

    def __init__(self, comm: "MPI.Comm", rank: int, number: int, shard: Shard) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self.rank, self.shard = MPI, comm, rank, shard
        self._tag = {tag: tag.of(number) for tag in Tag}
        self.complete = self._ended = False
        """Whether it has all that the holder has told; whether MPI has reported that nothing more will come of it."""
        self.seconds = 0.0
        """How long it was at it."""
        self._letter = Letter(Change)
        self._next = comm.Recv_init(self._letter.bytes, rank, self._tag[Tag.CHANGE])
        self._next.Start()
        self._change: Change | None = None
        """What is to be done next; it may have to wait for numbers."""
        self._arriving: deque[tuple[Array, MPI.Request]] = deque()
        for array in (
            shard.params,
            *shard.state.values(),
            *(zeros_like(shard.params) for _ in range(BUFFERS)),
        ):
            self._receive(array)
        self._told: tuple[bytearray, MPI.Request] | None = None

    def turn(self) -> bool:
        """Do what has arrived, one thing at most; whether there was anything."""
        try:
            return not self._ended and self._turn()
        except self._mpi.Exception as error:
            if not has_died(error):
                raise
            self._ended = True  # requests that have failed would count as complete from now on
            return False

    def _turn(self) -> bool:
        if self._change is None:
            if not self._next.Test():
                return False
            self._change = self._letter.read()
        begin, change = perf_counter(), self._change
        if change.deed == Deed.SNAPSHOT:
            done = self._begin(change)
        elif change.deed == Deed.PUSH:
            done = self._push(change)
        else:
            done = True
            self.shard.do(change)
        if done:
            self._change = None
            self._next.Start()
            self.seconds += perf_counter() - begin
        return done

    def finish(self) -> Shard | None:
        """Its holder has died: the shard as it is after all that has arrived; None where that isn't a whole one."""
        poke(self._comm)
        while self.turn():
            pass
        self.close()
        return self.shard if self.complete else None

    def close(self) -> None:
        """Hear no more."""
        requests = [self._next, *(request for _, request in self._arriving), *([self._told[1]] if self._told else [])]
        for request in requests:
            try:
                request.Cancel()
                request.Test()
            except self._mpi.Exception:
                continue  # the error of who has died ends it too

    def _begin(self, change: Change) -> bool:
        """Take a snapshot, once it is there."""
        if self._told is None:
            told = bytearray(change.number)
            self._told = told, self._comm.Irecv(told, self.rank, self._tag[Tag.STATE])
        arrays = 1 + len(self.shard.state)
        if not self._told[1].Test() or not all(request.Test() for _, request in list(self._arriving)[:arrays]):
            return False
        self.shard.restore(bytes(self._told[0]))
        for _ in range(arrays):
            self._arriving.popleft()
        self.complete = True
        return True

    def _push(self, change: Change) -> bool:
        gradients, arrival = self._arriving[0]
        if not arrival.Test():
            return False
        self._arriving.popleft()
        self.shard.push(change, gradients)
        self._receive(gradients)
        return True

    def _receive(self, array: Array) -> None:
        self._arriving.append((array, self._comm.Irecv(array, self.rank, self._tag[Tag.CHANGED])))
