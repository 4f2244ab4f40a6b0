"""A run's arrays between its ranks and its checkpoints: each part of a network brings its own pieces."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpnn import checkpoint
from dpnn.checkpoint import Contents, Slice
from dpnn.comm.background import Background
from dpnn.comm.mesh import Mesh
from dpnn.comm.ranks import Ranks
from dpnn.comm.share import share
from dpnn.errors import DataError, JobError
from dpnn.nn import Graph
from dpnn.plan import Piece, Store

Array = NDArray[Any]


def sliced(pieces: Sequence[Piece], flat: Array) -> list[Slice]:
    """A flat array of some pieces, as a checkpoint takes it."""
    return [Slice(piece.name, piece.lo, piece.whole, flat[piece.offset : piece.end]) for piece in pieces]


class DamagedError(DataError):
    """Reading has shown that the checkpoint at `path` is damaged; all ranks raise it."""

    def __init__(self, path: Path, told: str) -> None:
        super().__init__(told)
        self.path = path


def passing_over_damaged(attempt: Callable[[Mapping[Path, str]], int]) -> int:
    """What `attempt` returns, which is given the damaged checkpoints that are known, by path, and what is wrong.

    It is tried again, from the beginning, as long as it finds one more. Collective.
    """
    known: dict[Path, str] = {}
    while True:
        try:
            return attempt(known)
        except DamagedError as error:
            known[error.path] = str(error)


def load(ranks: Ranks, found: Contents, slices: Mapping[str, Sequence[Slice]]) -> None:
    """Read the arrays of `slices`, by name of the state ("": the parameters themselves), in place, and verify them.

    Collective. All ranks name the same states, and bring each number of the network once: who needs none brings empty
    lists, and opens no file. DamagedError, on all; RankError where the reading doesn't get on.
    """
    reading = Background(f"reading {found.path}", lambda note: checkpoint.fill(found, slices, note), ranks.timeout_s)
    try:
        crcs = reading.together(ranks)
        ranks.xor(crcs)
        checkpoint.verify(found, crcs, slices.keys())
    except DataError as error:
        raise DamagedError(found.path, str(error)) from error


class Origin(Protocol):
    """Where the parameters of a run, and what its optimizer keeps, come from."""

    def fill(self, ranks: Ranks, mesh: Mesh, store: Store, flats: Mapping[str, Array]) -> Iterable[str]:
        """Fill the arrays of the first replica; the names of those that are to be shared with the others.

        `flats`: the parameters of `store` (""), and by name what the optimizer keeps, all 0. Collective over `ranks`.
        """
        ...


@dataclass(frozen=True)
class Drawn:
    """Parameters are drawn."""

    seed: int

    def fill(self, ranks: Ranks, mesh: Mesh, store: Store, flats: Mapping[str, Array]) -> Iterable[str]:
        if mesh.replica == 0:
            store.draw(self.seed)
        return [""]


@dataclass(frozen=True)
class Saved:
    """All are in a checkpoint. DamagedError, on all, where that is."""

    found: Contents

    def fill(self, ranks: Ranks, mesh: Mesh, store: Store, flats: Mapping[str, Array]) -> Iterable[str]:
        pieces = store.pieces if mesh.replica == 0 else ()
        load(ranks, self.found, {name: sliced(pieces, flat) for name, flat in flats.items()})
        return flats


@dataclass(frozen=True)
class Held:
    """The ranks of the first replica have them in arrays like those to be filled."""

    arrays: Mapping[str, Array]

    def fill(self, ranks: Ranks, mesh: Mesh, store: Store, flats: Mapping[str, Array]) -> Iterable[str]:
        for name, array in self.arrays.items():
            np.copyto(flats[name], array)
        return flats


@dataclass(frozen=True)
class Own:
    """Each replica has its own, in arrays like those to be filled; some take those of another replica, which is ahead.

    `ahead`: that one; None: there is none. `behind`: whether this replica takes them. `state`: parallel.state of the
    job, which says whether what the optimizer keeps is each replica's own.
    """

    arrays: Mapping[str, Array]
    ahead: int | None
    behind: bool
    state: str

    def fill(self, ranks: Ranks, mesh: Mesh, store: Store, flats: Mapping[str, Array]) -> Iterable[str]:
        for name, array in self.arrays.items():
            np.copyto(flats[name], array)
        if self.ahead is not None:
            for name in flats if self.state != "keep" else [""]:
                takes = self.behind or mesh.replica == self.ahead
                share(mesh.data, flats[name] if takes else flats[name].copy(), ranks.timeout_s, self.ahead)
        return []


def check_network(found: Contents, graph: Graph, states: Sequence[str]) -> None:
    """JobError where a checkpoint is of another network than `graph`; `states` of its parameters are looked at."""
    wanted = {param.name: param.spec.shape for param in graph.params()}
    for state in states:
        held = found.shapes(state)
        for name in (*wanted, *held):
            if wanted.get(name) != held.get(name):
                raise JobError(
                    f"{name} has the shape {wanted.get(name)}, and in {found.path} {held.get(name)}: another network; "
                    "change [model] back, or start a new run"
                )
