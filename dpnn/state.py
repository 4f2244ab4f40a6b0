"""A run's arrays between its ranks and its checkpoints: each part of a network brings its own pieces."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.checkpoint import Checkpoint, Slice
from dpnn.comm.faults import wait
from dpnn.comm.mesh import Mesh
from dpnn.comm.ranks import Ranks
from dpnn.plan import Piece, fill

Array = NDArray[Any]


def sliced(pieces: Sequence[Piece], flat: Array) -> list[Slice]:
    """A flat array of some pieces, as a checkpoint takes it."""
    return [Slice(piece.name, piece.lo, piece.whole, flat[piece.offset : piece.end]) for piece in pieces]


def hand_out(
    mesh: Mesh, pieces: Sequence[Piece], arrays: Mapping[str, Array], found: Checkpoint | None, limit_s: float
) -> None:
    """Fill the flat arrays of the first replica, `arrays` by name of the state ("": parameters), from a checkpoint.

    Collective over the parts of the first replica; others return at once. `found`: on the first rank, which sends each
    part its pieces.
    """
    if mesh.replica != 0:
        return
    ranks = Ranks(mesh.model, limit_s)
    for part in range(mesh.parts):
        wanted = ranks.first(lambda: pieces, part)
        for name, flat in arrays.items():
            if found is not None:
                values = found.optimizer.get(name, {}) if name else found.params
                target = flat if part == 0 else np.empty(wanted[-1].end if wanted else 0, flat.dtype)
                fill(wanted, target, values, "the checkpoint")
                if part:
                    wait(mesh.model.Isend(target, part).Test, f"part {part} to take its parameters", limit_s)
            elif mesh.part == part:
                wait(mesh.model.Irecv(flat, 0).Test, "the first rank to send what the checkpoint holds", limit_s)
