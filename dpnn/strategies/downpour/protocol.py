"""What passes between workers and servers: fixed records, never pickled, and slices of flat arrays.

A worker sends a server requests in an order that the server keeps; with a push come the numbers of the server's shard.
So who fetches with or after a push finds it applied. A fetch is answered by the shard, in pieces, and an Answer; a
request for work by an Answer. A server tells the mirror of its shard of every change, in their order.

One rank may hold several shards, so each shard has tags of its own.
"""

from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from struct import Struct
from typing import Any, Generic, NamedTuple, TypeVar

from numpy.typing import NDArray

Array = NDArray[Any]

_PIECES, _LEAST_PIECE = 4, 1 << 17
"""Of the numbers of a shard."""


class Kind(IntEnum):
    """Of a request."""

    PUSH = 0
    """Gradients of so many steps and samples, computed from the parameters of version `base`."""
    FETCH = 1
    """The parameters, please."""
    LEASE = 2
    """Something to do, please. To the first server only."""
    LEAVE = 3
    """I have pushed all that I will push."""
    OVER = 4
    """The run is over: from the replica that speaks for it, to the first server."""
    PART = 5
    """I will ask you for nothing any more."""
    HELLO = 6
    """You hold this shard now: which of my pushes do you know of?"""
    SKIP = 7
    """A push that is lost on this shard: it counts, but its gradients are gone."""


class Tag(IntEnum):
    """Of a message about a shard."""

    REQUEST, GRADIENTS, ANSWER, PARAMS, SAID, CHANGE, CHANGED, STATE, ALIVE, GONE = range(10)
    """ALIVE: a worker's sign of life. GONE: to a worker that counts as dead."""

    def of(self, shard: int) -> int:
        """This tag, for the messages of a shard, by its number."""
        return int(self) + shard * len(Tag)


class Lease(IntEnum):
    """What an answer says of work."""

    NONE = 0
    """There is no more."""
    WAIT = 1
    """Not yet: ask again."""
    LANE = 2
    """Steps `first` to `last` of `lane` in `epoch`."""


class Request(NamedTuple):
    """What a worker asks for."""

    kind: int
    steps: int = 0
    """Of a push: steps whose gradients are in it."""
    samples: int = 0
    """Of those steps."""
    fetch: int = 0
    """Whether a push is a fetch too, of what comes of it."""
    base: int = 0
    """The version of the shard that the first of them was computed from."""
    stop: int = 0
    """Whether this rank was asked to stop."""
    loss: float = 0.0
    """Sum over the samples."""
    bad: int = 0
    """Of a push: bad samples that were skipped."""
    number: int = 0
    """Of a push: which one of this worker it is, from 1 on. Of who asks for work: leases that it has been given."""


class Answer(NamedTuple):
    """What a server says of its shard and of the run."""

    version: int = 0
    """Of the shard: updates that it has seen."""
    steps: int = 0
    """Of all replicas, that have arrived; samples, loss and bad samples likewise."""
    samples: int = 0
    loss: float = 0.0
    """Sum over the samples."""
    rate: float = 0.0
    """The learning rate at that step."""
    stop: int = 0
    """Whether the run stops."""
    left: int = 0
    """Replicas that have not left."""
    alive: int = 0
    """How often one has said that it is busy."""
    staleness: int = 0
    """Of the last push of this worker."""
    discarded: int = 0
    """Pushes, of all replicas."""
    bad: int = 0
    lease: int = Lease.NONE
    epoch: int = 0
    """Of the lease; so are `lane`, `first` and `last`, its steps."""
    lane: int = 0
    first: int = 0
    last: int = 0
    speaker: int = 0
    """The replica that speaks for the run: the first that hasn't died."""
    lost: int = 0
    """Replicas that have died."""
    written: int = 0
    """Whether the last checkpoint is written; `over`: whether the speaker has said that the run is over."""
    over: int = 0
    pushes: int = 0
    """Of this worker, that have arrived."""


class Deed(IntEnum):
    """What changes a shard, beside its parameters: what a server does, and its mirror after it."""

    PUSH, SKIP, GRANT, REST, LEAVE, LOSE, SETTLE, STOP, OVER, WRITTEN, SNAPSHOT = range(11)


class Change(NamedTuple):
    """Of a shard."""

    deed: int
    replica: int = 0
    number: int = 0
    """Of a push, as in its request; so are all below. Of a snapshot: bytes of what comes beside the arrays."""
    steps: int = 0
    """Where a loss is settled: all that have arrived of the replica; samples, loss and bad samples likewise."""
    samples: int = 0
    base: int = 0
    loss: float = 0.0
    bad: int = 0


Record = TypeVar("Record", bound=Request | Answer | Change)


class Letter(Generic[Record]):
    """A place for one record: its bytes, which MPI sends and receives."""

    def __init__(self, kind: type[Record]) -> None:
        self._kind: type[Record] = kind
        self._layout = Struct("=" + "".join("d" if type is float else "q" for type in kind.__annotations__.values()))
        self.bytes = bytearray(self._layout.size)

    def write(self, record: Record) -> None:
        """Put a record there."""
        self._layout.pack_into(self.bytes, 0, *record)

    def read(self) -> Record:
        """The record that is there."""
        return self._kind(*self._layout.unpack(self.bytes))


def pieces(n: int) -> list[tuple[int, int]]:
    """The slices [lo, hi) in which a server sends its n numbers: a few, each worth a message.

    Where a worker fetches with its push, the first are on their way while the server updates the last.
    """
    length = max(_LEAST_PIECE, -(-n // _PIECES))
    return [(lo, min(lo + length, n)) for lo in range(0, n, length)]


class Shard(NamedTuple):
    """What a server holds: numbers [lo, hi) of the flat arrays of a part of the network."""

    part: int
    lo: int
    hi: int


def deal(sizes: Sequence[int], servers: int, first: int = 0) -> list[Shard]:
    """The shard of each server, where the flat arrays of part p have sizes[p] numbers.

    Every part has servers of its own, at least one, and more where it has more numbers. Those of part `first` come
    first. ValueError where there are fewer servers than parts.
    """
    if servers < len(sizes):
        raise ValueError(f"{servers} servers for {len(sizes)} parts")
    shares = [1] * len(sizes)
    for _ in range(servers - len(sizes)):
        shares[max(range(len(sizes)), key=lambda part: sizes[part] / shares[part])] += 1
    order = sorted(range(len(sizes)), key=lambda part: part != first)
    return [Shard(part, lo, hi) for part in order for lo, hi in shards(sizes[part], shares[part])]


def shards(n: int, servers: int) -> list[tuple[int, int]]:
    """The slice [lo, hi) of n numbers that each server holds: equal to within 16 numbers, cut at cache lines."""
    cuts = [n * server // servers // 16 * 16 for server in range(servers)] + [n]
    return list(pairwise(cuts))
