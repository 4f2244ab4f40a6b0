"""The mesh: the world split once into replicas of the network, and each replica into its parts."""

from typing import TYPE_CHECKING

from dpnn.comm.faults import deadline
from dpnn.comm.world import World
from dpnn.errors import JobError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


class Mesh:
    """Which copy of the network this rank works on, and which piece of it.

    World ranks are dealt replica by replica, so that the parts of one replica, which exchange activations, are
    neighbours: rank = replica * parts + part.

    `data` joins the ranks with the same part over all replicas (data.rank == replica): gradients are summed there.
    `model` joins the parts of one replica (model.rank == part): activations cross there.
    `node` joins the ranks of `data` that share this one's memory; `smallest_node` and `largest_node` are their numbers
    on any node. `across` joins those that have the same rank in `node`, on all nodes; a null communicator where not
    every node has so many. `nodes` are the replicas of this part, node by node in the order of `across`.
    `limit_s`: how long to wait for another rank.
    """

    def __init__(self, world: World, parts: int = 1) -> None:
        """Collective. JobError where `parts` doesn't divide the number of ranks."""
        if not 1 <= parts <= world.size or world.size % parts:
            fits = [n for n in range(1, world.size + 1) if world.size % n == 0]
            raise JobError(
                f"{world.size} ranks can't be divided into replicas of {parts} parts; "
                f"use parts = {', '.join(map(str, fits))}, or a number of ranks that {parts} divides"
            )
        self.parts = parts
        self.replicas = world.size // parts
        self.replica, self.part = divmod(world.rank, parts)
        from mpi4py import MPI

        with deadline(world.timeout_s, "splitting the world into replicas and parts", world.fail):
            self.data: Comm = world.comm.Split(self.part, self.replica)
            self.model: Comm = world.comm.Split(self.replica, self.part)
            self.node: Comm = self.data.Split_type(MPI.COMM_TYPE_SHARED, self.replica)
            self.smallest_node = self.data.allreduce(self.node.size, MPI.MIN)
            self.largest_node = self.data.allreduce(self.node.size, MPI.MAX)
            everywhere = self.node.rank < self.smallest_node
            nodes: dict[int, list[int]] = {}
            for replica, first in enumerate(self.data.allgather(self.node.bcast(self.replica))):
                nodes.setdefault(first, []).append(replica)
            self.nodes = list(nodes.values())
            self.across: Comm = self.data.Split(self.node.rank if everywhere else MPI.UNDEFINED, self.replica)
