"""`dpnn` as watched.py has it, on ranks that seem to be on several nodes.

NODES  the node of each rank, as in "0 0 1".
"""

import os
import socket
import sys

import watched

from dpnn import cli
from dpnn.comm import world

assert watched.Loader.next is watched.watched_next
make = world.World.__init__


def make_apart(one: world.World, comm, timeout_s: float) -> None:
    from mpi4py import MPI

    node = os.environ["NODES"].split()[comm.rank]

    class Apart(MPI.Intracomm):
        """And so are all that are made of it."""

        def Split_type(self, kind: int, key: int = 0) -> MPI.Intracomm:
            return self.Split(int(node), key)

    socket.gethostname = lambda: f"node-{node}"
    make(one, Apart(comm), timeout_s)
    assert isinstance(one.comm, Apart)


world.World.__init__ = make_apart

if __name__ == "__main__":
    sys.exit(cli.main())
