"""Where the flat arrays of parameters and gradients lie: in memory that the replicas of a node share, if possible.

A node then has its parameters, and what the optimizer keeps, once, where all its replicas have the same; every replica
has gradients of its own, which all others of the node see, so that they are summed where they are. The memory is a file
in the node's shared-memory file system that loses its name at once: whatever ends the job, nothing stays. Its room is
reserved before it is used: memory that isn't there would end a rank by SIGBUS in the middle of a step.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpnn.comm.faults import wait
from dpnn.comm.mesh import Mesh
from dpnn.comm.share import share
from dpnn.comm.undo import Undo, log_nbytes
from dpnn.native import Call, Kernels

if TYPE_CHECKING:
    from mpi4py import MPI

Array = NDArray[Any]

SHARED_MEMORY = "/dev/shm"
_COUNTERS = 2
_LINE = 128
"""Bytes that each counter has for itself: two cache lines, which processors fetch together."""


class Node:
    """The replicas that share memory with this one, and the arrays of `n` numbers that they hold.

    `params` and `state` (by name) are the node's, or this replica's where `together` is false; `grads` is this
    replica's, `all_grads` are those of all replicas of the node, and `partials` their arrays for partial sums, by place
    in `comm`. `comm` joins the replicas of the node (this one alone where memory isn't shared). The first `owners` of
    them each own a share of every array: they are as many on every node. `across` joins the owners of one share on all
    nodes; None where there is one node, or on a rank that owns nothing. `groups` are the replicas node by node, in the
    order of `across`. `note` says why memory isn't shared, "" where it is or where no two replicas are on one node.
    `undo` takes back what a step has done to `params` and `state`, where that was asked for.
    """

    def __init__(
        self,
        mesh: Mesh,
        n: int,
        dtype: np.dtype[Any],
        states: Sequence[str],
        kernels: Kernels | None,
        limit_s: float,
        together: bool = True,
        partials: int = 0,
        updates: int = 0,
    ) -> None:
        """Collective over mesh.data.

        `together`: whether all replicas always have the same parameters. `partials`: arrays that each replica has for
        partial sums of gradients. `updates`: those that each replica may make in a step, if they may have to be taken
        back.
        """
        from mpi4py import MPI

        self.kernels, self._limit_s, self._together, self.note = kernels, limit_s, together, ""
        self.data, self.replica, self.replicas = mesh.data, mesh.replica, mesh.replicas
        page = mmap.PAGESIZE
        each = -(-n * dtype.itemsize // page) * page
        log = -(-log_nbytes(updates) // page) * page if updates else 0
        n_common, own = (1 + len(states)) * (2 if updates else 1), page + log + (1 + partials) * each
        common = n_common * each if together else 0
        block = None
        if mesh.largest_node > 1:
            block, self.note = self._map(mesh, common, own, kernels)
        shared = block is not None
        self.comm: MPI.Comm = mesh.node if shared else MPI.COMM_SELF
        self.owners = mesh.smallest_node if shared else 1
        self.groups = mesh.nodes if shared else [[replica] for replica in range(mesh.replicas)]
        across = mesh.across if shared else mesh.data
        self.across: MPI.Comm | None = across if across != MPI.COMM_NULL and across.size > 1 else None

        size = self.comm.size
        memory: Any = np.zeros(common + own, np.uint8) if block is None else block
        mine: Any = memory if together else np.zeros(n_common * each, np.uint8)
        kept = [np.frombuffer(mine, dtype, n, i * each) for i in range(n_common)]
        self.params, self.state = kept[0], dict(zip(states, kept[1:], strict=False))
        bases = [common + rank * own + page for rank in range(size)]
        self.undo: Undo | None = None
        if updates:
            logs = [np.frombuffer(memory, np.int64, log // 8, base) for base in bases]
            lasting = 1 + len(states)
            mine_only = slice(None) if together else slice(self.comm.rank, self.comm.rank + 1)
            self.undo = Undo(kept[:lasting], kept[lasting:], logs[mine_only], self.comm.rank if together else 0)
        arrays = [
            [np.frombuffer(memory, dtype, n, base + log + i * each) for i in range(1 + partials)] for base in bases
        ]
        self.all_grads, self.partials = [own[0] for own in arrays], [own[1:] for own in arrays]
        self.grads = self.all_grads[self.comm.rank]
        self._counts = [0] * _COUNTERS
        self._publish: list[Callable[[int], object]] = []
        self._least: list[Callable[[], Any]] = []
        """Of each counter: set mine, the least of all; empty where there is nobody else."""
        if kernels is not None and size > 1:
            stride = own // 8
            for i in range(_COUNTERS):
                all_of_it = np.frombuffer(memory, np.int64, (size - 1) * stride + 1, common + i * _LINE)
                self._publish.append(kernels.bind("publish", all_of_it[self.comm.rank * stride :]))
                self._least.append(kernels.bind("least", all_of_it, size, stride))

    @property
    def sums(self) -> Array:
        """Where the sums of gradients lie: in an array of the node's first replica."""
        return self.partials[0][0] if self.partials[0] else self.all_grads[0]

    def adds(self, arrays: Sequence[Array]) -> Call:
        """The call that adds up arrays in their order, into the first."""
        if self.kernels is not None:
            return self.kernels.bind("add", arrays[0].size, len(arrays), list(arrays), arrays[0])
        return partial(_add, arrays)

    def mine(self, lo: int, hi: int) -> tuple[int, int]:
        """My share of [lo, hi), cut at cache lines; empty for who owns nothing."""
        rank = self.comm.rank
        if rank >= self.owners:
            return lo, lo
        a, b = (max(lo, (lo + (hi - lo) * i // self.owners) // 16 * 16) for i in (rank, rank + 1))
        return a, hi if rank == self.owners - 1 else b

    def share(self, flat: Array) -> None:
        """`params` or one of `state` as on the first replica, on all. Collective."""
        if not self._together:
            share(self.data, flat, self._limit_s)
        elif self.across is not None and self.comm.rank == 0:
            share(self.across, flat, self._limit_s)
        wait(self.comm.Ibarrier().Test, "the parameters of the first replica", self._limit_s)

    def advance(self, counter: int) -> int:
        """Add 1 to one of my counters; its new value. Who sees that also sees what I wrote before."""
        self._counts[counter] += 1
        if self._publish:
            self._publish[counter](self._counts[counter])
        return self._counts[counter]

    def least(self, counter: int) -> int:
        """The least that a counter stands at, on any replica of the node."""
        return int(self._least[counter]()) if self._least else self._counts[counter]

    def _map(self, mesh: Mesh, common: int, own: int, kernels: Kernels | None) -> tuple[mmap.mmap | None, str]:
        """`common` bytes of the node, then `own` of each replica, mapped; or, on all alike, None and the reason."""
        page, node = mmap.PAGESIZE, mesh.node
        total = common + node.size * own
        name = np.zeros(64, np.uint8)
        descriptor, mapped, note = -1, None, ""
        try:
            if node.rank == 0:
                try:
                    descriptor, path = tempfile.mkstemp(prefix="dpnn-", dir=SHARED_MEMORY)
                    os.ftruncate(descriptor, total)
                    name[: len(path)] = np.frombuffer(path.encode(), np.uint8)
                except OSError as error:
                    note = f"{SHARED_MEMORY} can't be written: {error.strerror}"
                    if descriptor >= 0:
                        os.unlink(path)
            wait(node.Ibcast(name, 0).Test, "the other replicas of this node", self._limit_s)
            path = bytes(name).rstrip(b"\0").decode()
            try:
                if kernels is None:
                    raise OSError("the backend has no compiled kernels in float32")
                if not path:
                    raise OSError(note or f"{SHARED_MEMORY} can't be written")
                if descriptor < 0:
                    descriptor = os.open(path, os.O_RDWR)
                # Each reserves a run of the common memory too: it lies near the cores of all.
                lo, hi = (common // page * i // node.size * page for i in (node.rank, node.rank + 1))
                if hi > lo:
                    os.posix_fallocate(descriptor, lo, hi - lo)
                os.posix_fallocate(descriptor, common + node.rank * own, own)
                mapped = mmap.mmap(descriptor, total)
            except OSError as error:
                note = note or f"{total / 2**20:,.0f} MiB in {SHARED_MEMORY}: {error.strerror or error}"
            everywhere = np.array([mapped is not None], np.int8)
            wait(self._all_agree(everywhere).Test, "the other replicas to reserve memory", self._limit_s)
            if not everywhere[0]:
                return None, note or "another rank or node has no room for it"
            return mapped, ""
        finally:
            if node.rank == 0 and name[0]:
                with suppress(OSError):
                    os.unlink(bytes(name).rstrip(b"\0"))
            if descriptor >= 0:
                os.close(descriptor)

    def _all_agree(self, ok: Array) -> "MPI.Request":
        from mpi4py import MPI

        return self.data.Iallreduce(MPI.IN_PLACE, ok, MPI.MIN)


def _add(arrays: Sequence[Array]) -> None:
    for array in arrays[1:]:
        np.add(arrays[0], array, out=arrays[0])
