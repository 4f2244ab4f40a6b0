"""The sum of gradients that lie on devices, over replicas: among the devices, by MPI from there, or over the host.

Each has the calls of a GradientReducer, and tells `arrived` of what every replica then has whole: [lo, hi) of the
gradients on its own device.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dpnn.comm import library
from dpnn.comm.faults import wait, within
from dpnn.comm.node import Node
from dpnn.comm.reduce import BucketReducer, GradientReducer
from dpnn.memory import Group, Memory, Test, Wire

if TYPE_CHECKING:
    from mpi4py import MPI

Arrived = Callable[[int, int], object]
_NAME = 512
"""Bytes of a device's name, with its node's."""
_IDENT = 256
"""Bytes for the name of a group of devices."""


class Reducer(Protocol):
    """What sums gradients bucket by bucket, of whichever memory."""

    def start(self, lo: int, hi: int) -> None:
        """My grads[lo:hi] are asked for."""
        ...

    def poke(self) -> object:
        """Go on with what is under way."""
        ...

    def finish(self) -> None:
        """Return once all has arrived."""
        ...

    def settle(self) -> None:
        """Return once all replicas of the node have used what arrived."""
        ...


class Alone:
    """One replica: its gradients are the sums."""

    def __init__(self, arrived: Arrived) -> None:
        self._arrived = arrived

    def start(self, lo: int, hi: int) -> None:
        self._arrived(lo, hi)

    def poke(self) -> None: ...
    def finish(self) -> None: ...
    def settle(self) -> None: ...


class Among:
    """Devices that sum among themselves, while the next ones are computed."""

    def __init__(self, group: Group, grads: Wire, arrived: Arrived) -> None:
        self._group, self._grads, self._arrived = group, grads.array, arrived
        self._started: list[tuple[int, int]] = []

    def start(self, lo: int, hi: int) -> None:
        self._group.sum(self._grads[lo:hi])
        self._started.append((lo, hi))

    def poke(self) -> None: ...

    def finish(self) -> None:
        self._group.join()
        for lo, hi in self._started:
            self._arrived(lo, hi)
        self._started.clear()

    def settle(self) -> None: ...


class Later:
    """Starts each bucket's sum in turn, once something about it is true, and lets those go on that were started."""

    def __init__(self, reducer: BucketReducer | GradientReducer, limit_s: float) -> None:
        self._reducer, self._limit_s = reducer, limit_s
        self._waiting: deque[tuple[Test, int, int]] = deque()

    def add(self, test: Test, lo: int, hi: int) -> None:
        """One more bucket."""
        self._waiting.append((test, lo, hi))
        self.poke()

    def poke(self) -> bool:
        """Start what can be; whether all was."""
        while self._waiting and self._waiting[0][0]():
            _, lo, hi = self._waiting.popleft()
            self._reducer.start(lo, hi)
        self._reducer.poke()
        return not self._waiting

    def finish(self) -> None:
        """Start the rest, and return once all is summed."""
        if not self.poke():
            wait(self.poke, "this rank's device to compute its gradients", self._limit_s)
        self._reducer.finish()


class FromDevices:
    """MPI sums where the gradients lie: only for a library that says that it can."""

    def __init__(self, comm: "MPI.Comm", memory: Memory, grads: Wire, arrived: Arrived, limit_s: float) -> None:
        """Collective over `comm`."""
        self._memory, self._arrived = memory, arrived
        self._later = Later(BucketReducer(comm, grads.array, limit_s), limit_s)
        self._started: list[tuple[int, int]] = []

    def start(self, lo: int, hi: int) -> None:
        self._later.add(self._memory.mark(), lo, hi)
        self._started.append((lo, hi))

    def poke(self) -> None:
        self._later.poke()

    def finish(self) -> None:
        self._later.finish()
        for lo, hi in self._started:
            self._arrived(lo, hi)
        self._started.clear()

    def settle(self) -> None: ...


class OverHost:
    """Buckets are copied to the host while others are computed, summed there, and the sums copied back.

    `reducer` sums them, on `node.grads`.
    """

    def __init__(
        self, reducer: GradientReducer, node: Node, memory: Memory, grads: Wire, arrived: Arrived, limit_s: float
    ) -> None:
        self._reducer, self._grads, self._arrived, self._n = reducer, grads, arrived, node.grads.size
        self._sums = memory.couple(grads.array, node.sums)
        self._later = Later(reducer, limit_s)
        self._used = True
        """Whether the last sums were copied back."""

    def start(self, lo: int, hi: int) -> None:
        self._later.add(self._grads.pull(lo, hi), lo, hi)

    def poke(self) -> None:
        self._later.poke()

    def finish(self) -> None:
        self._later.finish()
        self._reducer.settle()  # all shares are summed
        self._sums.push()
        self._used = False
        self._arrived(0, self._n)

    def settle(self) -> None:
        if not self._used:
            self._sums.wait()
            self._reducer.settle()  # all have read them
            self._used = True


class GrainsOverHost(OverHost):
    """The same for grains: each is added on the host before the next one is computed."""

    def start(self, lo: int, hi: int) -> None:
        self._grads.pull(lo, hi)
        self._grads.wait()
        self._reducer.start(lo, hi)


def lifted(
    node: Node, memory: Memory, grads: Wire, host: Callable[[], GradientReducer], arrived: Arrived, limit_s: float
) -> tuple[Reducer, str]:
    """The best way to sum the gradients of all replicas, and its name for the log; collective over them.

    `host` makes what sums them on the host, where nothing better is there.
    """
    if node.replicas == 1:
        return Alone(arrived), ""
    group = group_of(node.data, memory, limit_s)
    if group is not None:
        return Among(group, grads, arrived), "nccl"
    if _all(node.data, library.takes_device_memory(), "all ranks to say what their MPI takes", limit_s):
        return FromDevices(node.data, memory, grads, arrived, limit_s), "mpi"
    return OverHost(host(), node, memory, grads, arrived, limit_s), "host"


def devices_of(comm: "MPI.Comm", memory: Memory, limit_s: float) -> list[str]:
    """The names of all ranks' devices, each with its node's; "" for a rank that computes on the host. Collective."""
    from mpi4py import MPI

    names, mine = np.zeros((comm.size, _NAME), np.uint8), np.zeros(_NAME, np.uint8)
    name = f"{memory.name} of {MPI.Get_processor_name()}".encode()[:_NAME] if memory.name else b""
    mine[: len(name)] = np.frombuffer(name, np.uint8)
    wait(comm.Iallgather(mine, names).Test, "all ranks to name their devices", limit_s)
    return [bytes(name).rstrip(b"\0").decode(errors="replace") for name in names]


def group_of(comm: "MPI.Comm", memory: Memory, limit_s: float) -> Group | None:
    """The group of all ranks' devices; None where two ranks share one, or they can't sum among themselves. Collective.

    Two ranks on one device might wait for each other for ever: NCCL forbids it.
    """
    names = devices_of(comm, memory, limit_s)
    if not _all(comm, memory.groups(), "all ranks to say whether their devices form groups", limit_s):
        return None
    ident = np.zeros(_IDENT, np.uint8)
    if comm.rank == 0:
        drawn = memory.ident()
        ident[: len(drawn) + 1] = np.frombuffer(bytes([len(drawn)]) + drawn, np.uint8)
    wait(comm.Ibcast(ident, 0).Test, "the first rank to name the group of devices", limit_s)
    n = int(ident[0])
    if n == 0 or "" in names or len(set(names)) < comm.size:
        return None
    meet = partial(memory.group, ident[1 : 1 + n].tobytes(), comm.size, comm.rank)
    return within(limit_s, f"the devices of {comm.size} ranks to meet", meet)


def _all(comm: "MPI.Comm", mine: bool, whom: str, limit_s: float) -> bool:
    """Whether it is true on every rank: nodes may have libraries of different builds."""
    from mpi4py import MPI

    everywhere = np.array([mine], np.int8)
    wait(comm.Iallreduce(MPI.IN_PLACE, everywhere, MPI.MIN).Test, whom, limit_s)
    return bool(everywhere[0])
