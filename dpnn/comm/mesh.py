"""The mesh: the world split once into servers and replicas of the network, and each replica into its parts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpnn.comm.alarm import ALARM
from dpnn.comm.faults import deadline
from dpnn.comm.ranks import Ranks
from dpnn.comm.world import World
from dpnn.errors import JobError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def replicas_of(ranks: int, parts: int, servers: int) -> int:
    """The copies of the network that train on so many ranks. JobError where there is none, or ranks are left over."""
    workers = ranks - servers
    if workers < 1:
        raise JobError(
            f"parallel.servers = {servers} of {ranks} ranks: at least one has to be left to train; "
            "start more ranks, or set fewer servers"
        )
    if not 1 <= parts <= workers or workers % parts:
        fits = [n for n in range(1, workers + 1) if workers % n == 0]
        raise JobError(
            f"parallel.parts = {parts}: {workers} ranks can't be divided into replicas of {parts} parts; "
            f"use parts = {', '.join(map(str, fits))}, or a number of ranks that {parts} divides"
        )
    return workers // parts


class Mesh:
    """Which copy of the network this rank works on, and which piece of it.

    World ranks are dealt replica by replica, so that the parts of one replica, which exchange activations, are
    neighbours: rank = replica * parts + part.

    `data` joins the ranks with the same part over all replicas (data.rank == replica): gradients are summed there.
    `model` joins the parts of one replica (model.rank == part): activations cross there.
    `node` joins the ranks of `data` that share this one's memory; `smallest_node` and `largest_node` are their numbers
    on any node. `across` joins those that have the same rank in `node`, on all nodes; a null communicator where not
    every node has so many. `nodes` are the replicas of this part, node by node in the order of `across`.
    The last `servers` ranks of the world are servers of parameters: `server` is such a rank's number, None on all
    others, and it has neither replica, nor part, nor any of these communicators. `crew` are all ranks of this one's
    kind: those that train, or the servers.
    """

    def __init__(self, world: World, parts: int = 1, servers: int = 0) -> None:
        """Collective. JobError where `parts` doesn't divide the number of workers, or there are none."""
        self.parts, self.servers = parts, servers
        self.replicas = replicas_of(world.size, parts, servers)
        workers = self.replicas * parts
        self.replica, self.part = divmod(world.rank, parts)
        self.server = world.rank - workers if world.rank >= workers else None
        from mpi4py import MPI

        self._world = world
        with deadline(world.timeout_s, "splitting the world into replicas and parts", world.fail):
            crew = ALARM.wakes(world.comm.Split(self.server is not None, world.rank))
            self.crew = Ranks(crew, world.timeout_s)
            if self.server is not None:
                return
            self.data: Comm = ALARM.wakes(crew.Split(self.part, self.replica))
            self.model: Comm = ALARM.wakes(crew.Split(self.replica, self.part))
            self.node: Comm = ALARM.wakes(self.data.Split_type(MPI.COMM_TYPE_SHARED, self.replica))
            self.smallest_node = self.data.allreduce(self.node.size, MPI.MIN)
            self.largest_node = self.data.allreduce(self.node.size, MPI.MAX)
            everywhere = self.node.rank < self.smallest_node
            nodes: dict[int, list[int]] = {}
            for replica, first in enumerate(self.data.allgather(self.node.bcast(self.replica))):
                nodes.setdefault(first, []).append(replica)
            self.nodes = list(nodes.values())
            self.across: Comm = self.data.Split(self.node.rank if everywhere else MPI.UNDEFINED, self.replica)

    def among(self, parts: Sequence[int]) -> "Comm":
        """Some parts of a replica, in rising order, by themselves; a null communicator on others.

        Collective over `model`.
        """
        from mpi4py import MPI

        with deadline(self._world.timeout_s, f"{self.parts} parts to make a group of {len(parts)}", self._world.fail):
            return self.model.Split(0 if self.part in parts else MPI.UNDEFINED, self.part)
