"""`dpnn` as watched.py has it, on ranks that seem to be on several nodes.

NODES  the node of each rank, as in "0 0 1".
"""

import os
import socket
import sys

import watched

from dpnn import cli
from dpnn.comm import world
from dpnn.comm.slots import shared_file

assert watched.Loader.next is watched.watched_next
make = world.World.__init__


def make_apart(one: world.World, *args) -> None:
    make(one, *args)
    node = os.environ["NODES"].split()[one.rank]
    socket.gethostname = lambda: f"node-{node}"
    one.node = one.comm.Split(int(node), one.rank)
    one._claims = shared_file(one.node, os.O_RDWR | os.O_APPEND)


world.World.__init__ = make_apart

if __name__ == "__main__":
    sys.exit(cli.main())
