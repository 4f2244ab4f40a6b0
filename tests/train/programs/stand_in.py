"""`dpnn` with a GPU for each rank that isn't there: the tests' stand-in.

STAND_IN says how such devices sum their gradients: over the "host", by "mpi" or "nccl". "nccl on the first": only the
first rank of a node has what that needs. "first": only that rank has a device. "stuck": they never end. "gpu": the GPU
that is there.
"""

import os
import sys
from pathlib import Path

from dpnn import cli, evaluate
from dpnn.backends import cuda
from dpnn.comm import library
from dpnn.native import Unavailable

sys.path.insert(0, str(Path(__file__).parents[2] / "backends" / "cuda"))
from shim import Shim


class Ring:
    """Devices that sum among themselves: by MPI, which reads their memory."""

    def __init__(self):
        from mpi4py import MPI

        self._comm, self._sum, self._in_place = MPI.COMM_WORLD.Dup(), MPI.SUM, MPI.IN_PLACE

    def sum(self, array):
        self._comm.Allreduce(self._in_place, array, self._sum)

    def join(self):
        pass


class Linked(Shim):
    """A stand-in that can form groups."""

    def __init__(self, local_rank):
        super().__init__()
        self.local_rank = local_rank
        self.about = f"{Shim.about} {os.getpid()}"

    def groups(self):
        return way == "nccl" or self.local_rank == 0

    def ident(self):
        return b"those of this job"

    def group(self, ident, size, rank):
        assert self.groups()
        assert ident == self.ident()
        return Ring()


class Stuck(Shim):
    """A stand-in that never gets to what it is asked for."""

    def mark(self):
        return lambda: False


def device_of_rank(local_rank):
    if way == "first" and local_rank > 0:
        raise Unavailable("CUDA finds no GPU")
    if "nccl" in way:
        return Linked(local_rank)
    return Stuck() if way == "stuck" else Shim()


way = os.environ["STAND_IN"]
if way != "gpu":
    library.takes_device_memory = lambda: way == "mpi"
    evaluate.has_gpu_driver = lambda: True
    cuda.device_of_rank = device_of_rank
sys.exit(cli.main())
