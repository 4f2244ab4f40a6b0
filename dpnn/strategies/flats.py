"""A run's flat arrays between the host and where the backend computes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpnn import config
from dpnn.comm.node import Node
from dpnn.memory import Array, Memory, Wire
from dpnn.optim import Keeper, Optimizer, Segment
from dpnn.team import Team


@dataclass(frozen=True)
class Flats:
    """Parameters, gradients, and what the optimizer keeps, by name: each in `memory` and on the host."""

    memory: Memory
    params: Wire
    grads: Wire
    state: Mapping[str, Wire]

    @classmethod
    def of(cls, memory: Memory, node: Node) -> "Flats":
        """Those of a node, lifted to `memory`; nothing is copied yet."""
        state = {name: memory.lift(flat) for name, flat in node.state.items()}
        return cls(memory, memory.lift(node.params), memory.lift(node.grads), state)

    @property
    def lifted(self) -> bool:
        """Whether the backend computes elsewhere than on the host."""
        return bool(self.memory.name)

    @property
    def kept(self) -> list[Wire]:
        """What lasts from step to step: parameters, then state."""
        return [self.params, *self.state.values()]

    def optimizer(
        self,
        options: config.Optimizer,
        segments: Iterable[Segment],
        sums: Array,
        team: Team,
        arithmetic: Any,
        keeper: Keeper | None = None,
    ) -> Optimizer:
        """What updates them where the backend computes; on the host by `sums`, where gradients are summed there.

        `keeper` keeps what it changes.
        """
        grads = self.grads.array if self.lifted else sums
        state = {name: wire.array for name, wire in self.state.items()}
        return Optimizer(options, segments, self.params.array, grads, team, arithmetic, state, keeper)

    def pull(self) -> None:
        """Bring what is kept to the host."""
        for wire in self.kept:
            wire.pull()
        for wire in self.kept:
            wire.wait()

    def push(self) -> None:
        """Bring what is kept to where the backend computes."""
        for wire in self.kept:
            wire.push()
