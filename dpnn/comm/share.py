"""One rank's array, on all ranks."""

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from dpnn.comm.faults import wait

if TYPE_CHECKING:
    from mpi4py import MPI

_PIECE = 1 << 24
"""Numbers in one message: MPI counts in 32 bits, and a large message needs as much memory again."""


def share(comm: "MPI.Comm", flat: NDArray[Any], limit_s: float, root: int = 0) -> None:
    """Overwrite `flat` (1-D, contiguous) by that of rank `root` of `comm`. Collective.

    RankError where a piece of it takes longer than `limit_s` seconds.
    """
    for lo in range(0, flat.size, _PIECE):
        request = comm.Ibcast(flat[lo : lo + _PIECE], root)
        wait(request.Test, f"the parameters of replica {root}", limit_s)
