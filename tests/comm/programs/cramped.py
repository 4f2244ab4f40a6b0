"""cramped.py FOLDER N...: sums N numbers a rank in memory that lies in FOLDER, if it has room; tells how that went."""

import os
import sys

import numpy as np

from dpnn.comm import node as module
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.reduce import GradientReducer
from dpnn.comm.world import World, run
from dpnn.native import Kernels


def main(world: World) -> int:
    module.SHARED_MEMORY = sys.argv[1]
    for n in map(int, sys.argv[2:]):
        node = Node(Mesh(world), n, np.dtype(np.float32), ("momentum",), Kernels(1), 30)
        node.params[:] = node.state["momentum"][:] = 1.0
        node.grads[:] = world.rank + 1
        reducer = GradientReducer(node, lambda lo, hi: None, 30)
        reducer.start(0, n)
        reducer.finish()
        reducer.settle()
        sums, files = set(node.sums.tolist()), os.listdir(sys.argv[1])
        world.comm.barrier()
        line = f"{n}: {node.comm.size} share, sums {sums}, files {files}, note: {node.note}\n"
        os.write(sys.stdout.fileno(), line.encode())  # in one piece: the other rank writes into the same pipe
    return 0


if __name__ == "__main__":
    sys.exit(run(main, 30))
