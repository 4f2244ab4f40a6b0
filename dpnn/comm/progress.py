"""Who makes MPI move while a rank computes: the pokes between its instructions, or a thread beside them too.

MPI makes no progress by itself. Pokes cost nothing but come only as often as an instruction ends; a thread comes every
few milliseconds, and takes a little of a core each time. Which is better depends on the network that is trained, the
network between the nodes, the MPI and the cores, so a run's own first steps tell. On one node there is nothing to move:
memory is shared.
"""

import math
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

_NAP_S = 2e-3
"""Over 1 Gbit/s a tenth of it cost 6 % of a step of GoogLeNet, as each call takes the interpreter from who computes,
and hid no more: the kernel's buffers hold what arrives in some milliseconds.
"""
_TRIES = 5
"""Steps that are taken with the thread, and as many without it, before one or the other is kept."""
TRIAL_STEPS = 1 + 2 * _TRIES
"""The first step warms up."""


class Progress:
    """A thread that calls MPI now and then while it is `on`; any call moves every request of the process.

    The first steps are taken without and with it by turns; it stays where the shortest one, for its samples, was one
    with it. Each rank decides for itself: what is computed doesn't depend on it.
    """

    def __init__(self, comm: "MPI.Comm") -> None:
        """`comm`: one that is used for nothing else meanwhile, or for collectives only."""
        self._comm, self._on, self._ended = comm, threading.Event(), False
        self._tried: list[float] = []
        self.helps: bool | None = None
        """Whether the thread stays; None while it is tried."""
        self._thread = threading.Thread(target=self._run, name="dpnn-progress", daemon=True)
        self._thread.start()

    def on(self) -> None:
        """Something is under way."""
        if self.helps or (self.helps is None and self._with_thread()):
            self._on.set()

    def off(self, seconds: float, samples: int) -> None:
        """Nothing is any more: a step of so many samples is done, and took so long."""
        if self.helps is None:
            self._tried.append(seconds / samples if samples else math.inf)
            if len(self._tried) == TRIAL_STEPS:
                self.helps = min(self._tried[2::2]) < min(self._tried[1::2])
                if not self.helps:
                    self.close()
        if self.helps is not False:
            self._on.clear()

    def close(self) -> None:
        """End the thread."""
        self._ended = True
        self._on.set()
        self._thread.join()

    def _with_thread(self) -> bool:
        n = len(self._tried)
        return n > 0 and n % 2 == 0

    def _run(self) -> None:
        from mpi4py import MPI

        with suppress(MPI.Exception):  # a rank has died: the main thread hears of it, too
            while self._on.wait() and not self._ended:
                self._comm.Iprobe()
                time.sleep(_NAP_S)


def progress(comm: "MPI.Comm", nodes: int) -> Progress | None:
    """A thread to try; None where there is one node, or MPI doesn't take calls of several threads."""
    from mpi4py import MPI

    return Progress(comm) if nodes > 1 and MPI.Query_thread() == MPI.THREAD_MULTIPLE else None
