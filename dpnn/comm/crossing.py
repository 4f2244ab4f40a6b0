"""What it costs to send something to a neighbour: measured once, when a run over several parts starts."""

from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpnn.comm.faults import wait

if TYPE_CHECKING:
    from mpi4py import MPI

_SMALL, _LARGE = 1 << 10, 1 << 22
"""Bytes of the messages that latency and bandwidth are taken from."""
_TURNS = 20


def swap(comm: "MPI.Comm", sent: NDArray[Any], received: NDArray[Any], other: int, limit_s: float) -> None:
    """Send an array to a rank that sends one in turn. Both are contiguous, in memory that MPI takes."""
    requests = [comm.Irecv(received, other), comm.Isend(sent, other)]
    for request in requests:
        wait(request.Test, f"rank {other} to exchange something", limit_s)


def measured_crossing(comm: "MPI.Comm", limit_s: float) -> tuple[float, float]:
    """Seconds of a small message, and bytes a second of a large one, between neighbours: the worst pair's. Collective.

    Rank 2 i exchanges with rank 2 i + 1; (0, infinity) on one rank.
    """
    from mpi4py import MPI

    other, times = comm.rank ^ 1, np.zeros(2)
    for i, nbytes in enumerate((_SMALL, _LARGE) if other < comm.size else ()):
        sent, received = np.zeros(nbytes, np.uint8), np.empty(nbytes, np.uint8)
        turns = []
        for _ in range(_TURNS):
            begin = perf_counter()
            swap(comm, sent, received, other, limit_s)
            turns.append(perf_counter() - begin)
        times[i] = min(turns)
    wait(comm.Iallreduce(MPI.IN_PLACE, times, MPI.MAX).Test, "all ranks to time their messages", limit_s)
    latency, large = times
    return float(latency), _LARGE / max(large - latency, 1e-9) if large else float("inf")
