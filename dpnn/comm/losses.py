"""Ranks that have died, where the others can go on without them.

MPI tells of them where it is fault tolerant: Open MPI 5 under `mpirun --with-ft ulfm`. Any other doesn't: where it runs
under `srun --mpi=pmi2` that was told to let the others live, who is silent for too long has died. Elsewhere a launcher
ends the whole job when a rank dies.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI


_TOLERANT = "OMPI_MCA_mpi_ft_enable"
"""The environment variable by which that mpirun says so to its ranks."""
LENIENT = {"SLURM_KILL_BAD_EXIT": "0", "SLURM_NO_KILL": "set", "SLURM_WAIT": "0"}
"""The environment that makes srun leave the others alone where a rank, or its node, dies. Ranks find it in theirs;
srun's options, which mean the same, leave no trace there."""
PLUGIN = "pmi2"
"""The plugin of srun that leaves them alone too: pmix ends them all."""


def tells() -> bool:
    """Whether MPI tells of ranks that have died."""
    from mpi4py import MPI

    return os.environ.get(_TOLERANT) == "1" and MPI.ERR_PROC_FAILED != MPI.ERR_UNKNOWN


def survives() -> bool:
    """Whether this job goes on where a rank of it dies."""
    return tells() or is_left_alone()


def is_left_alone() -> bool:
    """Whether srun started this rank so that it leaves it alone where another, or its node, dies."""
    lenient = {"SLURM_MPI_TYPE": PLUGIN, **LENIENT}
    return all(os.environ.get(name) == value for name, value in lenient.items())


class Losses:
    """The ranks of a communicator that have died, as far as MPI tells: it looks while messages are polled."""

    def __init__(self, comm: "MPI.Comm") -> None:
        self.tells = tells()
        self._comm, self._ranks, self._known = comm, comm.Get_group(), set[int]()

    def new(self) -> list[int]:
        """Those that it has noticed since the last call. Takes no time, so a loop may ask in every turn."""
        if not self.tells:
            return []
        failed = self._comm.Get_failed()
        ranks = failed.Translate_ranks(None, self._ranks) if failed.size > len(self._known) else ()
        failed.Free()
        new = [rank for rank in ranks if rank not in self._known]
        self._known.update(new)
        return new
