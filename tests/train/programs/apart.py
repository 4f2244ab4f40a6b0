"""`dpnn` as watched.py has it, on ranks that seem to be on nodes with disks of their own.

NODES  the node of each rank, as in "0 0 1".
DISKS  a folder with a folder for each node, NODE-0 and so on: the current folder of its ranks.
"""

import os
import socket
import sys

import watched

from dpnn import cli

assert watched.Loader.next is watched.watched_next
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK", "0"))
node = f"node-{os.environ['NODES'].split()[rank]}"
socket.gethostname = lambda: node
os.chdir(os.path.join(os.environ["DISKS"], node))

if __name__ == "__main__":
    sys.exit(cli.main())
