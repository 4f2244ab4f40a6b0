"""Ranks that have died, where the others can go on without them.

MPI tells of them where it is fault tolerant: Open MPI 5 under `mpirun --with-ft ulfm`. Elsewhere a launcher ends the
whole job when a rank dies.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI


_TOLERANT = "OMPI_MCA_mpi_ft_enable"
"""The environment variable by which that mpirun says so to its ranks."""


def tolerant() -> bool:
    """Whether this job was started so that it can go on where a rank of it dies. Needs no MPI."""
    return os.environ.get(_TOLERANT) == "1"


def survives() -> bool:
    """Whether this job goes on where a rank of it dies."""
    from mpi4py import MPI

    return tolerant() and MPI.ERR_PROC_FAILED != MPI.ERR_UNKNOWN


def has_died(error: Exception) -> bool:
    """Whether an error of MPI says that a rank has died, or that another has found so."""
    from mpi4py import MPI

    classes = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED, MPI.ERR_IN_STATUS)
    return survives() and isinstance(error, MPI.Exception) and error.Get_error_class() in classes


class Losses:
    """The ranks of a communicator that have died, as far as MPI has noticed: it looks while messages are polled."""

    def __init__(self, comm: "MPI.Comm") -> None:
        self.tells = survives()
        self._comm, self._ranks, self._known = comm, comm.Get_group(), set[int]()

    @property
    def any(self) -> bool:
        """Whether it has noticed one so far."""
        return bool(self._known)

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
