"""What passes between workers and servers: fixed records, never pickled, and slices of flat arrays.

A worker sends a server requests, each a REQUEST, in an order that the server keeps; a push is followed by the numbers
of the server's shard. The server takes a worker's next request when it has served the last one. So who fetches after a
push finds it applied. A fetch is answered by an ANSWER and the shard, a request for work by an ANSWER.
"""

from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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
    CLOSE = 4
    """The run is over: from the first worker, when all others have left."""
    ALIVE = 5
    """I am busy with something else."""


class Tag(IntEnum):
    """Of a message."""

    REQUEST, GRADIENTS, ANSWER, PARAMS, LEASED, CUT = range(1, 7)


REQUEST = np.dtype(
    [
        ("kind", "i8"),
        ("push", "i8"),  # the number of a push, from 1
        ("steps", "i8"),  # steps whose gradients are in the push
        ("samples", "i8"),  # of those steps
        ("base", "i8"),  # the version of the shard that the first of them was computed from
        ("stop", "i8"),  # whether this rank was asked to stop
        ("loss", "f8"),  # sum over the samples
    ]
)

ANSWER = np.dtype(
    [
        ("version", "i8"),  # of the shard: updates that it has seen
        ("steps", "i8"),  # of all replicas, that have arrived
        ("samples", "i8"),  # likewise
        ("loss", "f8"),  # likewise, sum over the samples
        ("rate", "f8"),  # the learning rate at that step
        ("stop", "i8"),  # whether the run stops
        ("left", "i8"),  # replicas that have not left
        ("alive", "i8"),  # how often one has said that it is busy
        ("staleness", "i8"),  # of the last push of this worker
        ("discarded", "i8"),  # pushes, of all replicas
        ("lease", "i8"),  # a Lease
        ("epoch", "i8"),
        ("lane", "i8"),
        ("first", "i8"),
        ("last", "i8"),
    ]
)


class Lease(IntEnum):
    """What an answer says of work."""

    NONE = 0
    """There is no more."""
    WAIT = 1
    """Not yet: ask again."""
    LANE = 2
    """Steps `first` to `last` of `lane` in `epoch`."""


def record(dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """One record of a kind, and its bytes, which MPI sends and receives."""
    made = np.zeros(1, dtype)
    return made, made.view(np.uint8)


def shards(n: int, servers: int) -> list[tuple[int, int]]:
    """The slice [lo, hi) of n numbers that each server holds: equal to within 16 numbers, cut at cache lines."""
    cuts = [n * server // servers // 16 * 16 for server in range(servers)] + [n]
    return list(pairwise(cuts))
