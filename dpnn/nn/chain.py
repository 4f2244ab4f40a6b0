"""The two ways of composing a network: in depth (Chain) and in width (Branches)."""

from dataclasses import dataclass

from dpnn.nn.join import Add, Concat, Heads
from dpnn.nn.layer import Layer


@dataclass(frozen=True, init=False)
class Chain:
    """Layers one after the other; an empty chain is the identity (a residual block's plain shortcut)."""

    parts: tuple["Network", ...]
    name: str

    def __init__(self, *parts: "Network", name: str = "") -> None:
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "name", name)


@dataclass(frozen=True, init=False)
class Branches:
    """Networks side by side: each gets its own copy of the input, and `join`, the master layer, collates them."""

    branches: tuple["Network", ...]
    join: Add | Concat | Heads
    name: str

    def __init__(self, *branches: "Network", join: Add | Concat | Heads | None = None, name: str = "") -> None:
        object.__setattr__(self, "branches", branches)
        object.__setattr__(self, "join", Concat() if join is None else join)
        object.__setattr__(self, "name", name)


Network = Layer | Chain | Branches
