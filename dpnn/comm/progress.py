"""Who makes MPI move while a rank computes: the pokes between its instructions, or a thread beside them.

MPI makes no progress by itself. Pokes cost nothing but come only as often as an instruction ends; a thread comes every
fraction of a millisecond, and takes a little of a core each time. Which is better depends on the network, the MPI and
the cores, so it is measured when a run starts. On one node there is nothing to move: memory is shared.
"""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dpnn.comm.faults import wait
from dpnn.comm.node import Node
from dpnn.comm.reduce import GradientReducer

if TYPE_CHECKING:
    from mpi4py import MPI

_NAP_S = 2e-4
_PIECE_S = 0.01
"""Seconds of computing between two pokes, about what an instruction of a large network takes."""
_NBYTES = 1 << 24
"""Of gradients whose sum is timed."""


class Progress:
    """A thread that calls MPI now and then while it is `on`; any call moves every request of the process."""

    def __init__(self, comm: "MPI.Comm") -> None:
        """`comm`: one that is used for nothing else meanwhile, or for collectives only."""
        self._comm, self._on, self._ended = comm, threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="dpnn-progress", daemon=True)
        self._thread.start()

    def on(self) -> None:
        """Something is under way."""
        self._on.set()

    def off(self) -> None:
        """Nothing is."""
        self._on.clear()

    def close(self) -> None:
        """End the thread."""
        self._ended = True
        self._on.set()
        self._thread.join()

    def _run(self) -> None:
        while self._on.wait() and not self._ended:
            self._comm.Iprobe()
            time.sleep(_NAP_S)


def measured_progress(node: Node, limit_s: float) -> bool:
    """Whether a thread hides more of a sum over the nodes behind computing than pokes do. Collective over the replicas.

    False where there is one node, or where MPI doesn't take calls of several threads.
    """
    from mpi4py import MPI

    several = len(node.groups) > 1 and MPI.Query_thread() == MPI.THREAD_MULTIPLE
    if not several:
        return False
    times = np.zeros(2)
    reducer = GradientReducer(node, lambda lo, hi: None, limit_s)
    a = np.ones((256, 256), np.float32)
    n = min(node.grads.size, _NBYTES // 4)

    def compute() -> None:
        end = time.perf_counter() + _PIECE_S
        while time.perf_counter() < end:
            a @ a

    def seconds(poke: Callable[[], object], number: int) -> float:
        begin = time.perf_counter()
        reducer.start(0, n)
        for _ in range(number):
            compute()
            poke()
        reducer.finish()
        reducer.settle()
        return time.perf_counter() - begin

    alone = min(seconds(lambda: None, 0) for _ in range(2))
    count = np.array([alone / _PIECE_S])
    wait(node.data.Iallreduce(MPI.IN_PLACE, count, MPI.MAX).Test, "the other replicas", limit_s)
    pieces = min(max(1, round(float(count[0]))), 100)
    times[0] = min(seconds(reducer.poke, pieces) for _ in range(3))
    progress = Progress(node.data)
    progress.on()
    times[1] = min(seconds(reducer.poke, pieces) for _ in range(3))
    progress.close()
    wait(node.data.Iallreduce(MPI.IN_PLACE, times, MPI.MAX).Test, "the other replicas", limit_s)
    reducer.close()
    return bool(times[1] < times[0])
