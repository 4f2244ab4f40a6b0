"""A run's arrays between its ranks and its checkpoints: each part of a network brings its own pieces."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn import checkpoint
from dpnn.checkpoint import Checkpoint, Slice
from dpnn.comm.faults import wait
from dpnn.comm.mesh import Mesh
from dpnn.comm.ranks import Ranks
from dpnn.plan import Piece, Store, fill

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


def save(
    folder: Path,
    mesh: Mesh,
    store: Store,
    state: Mapping[str, Array],
    place: tuple[int, int, int],
    info: dict[str, Any],
    keep: int,
    limit_s: float,
) -> Path | None:
    """Write a checkpoint of the first replica; its path, on the first rank. `place`: epoch, step, steps of the run.

    Collective over the parts of the first replica; others return at once.
    """
    epoch, step, steps = place
    if mesh.replica != 0:
        return None
    if mesh.parts == 1:
        kept = {name: store.split(flat) for name, flat in state.items()}
        return checkpoint.write(folder, Checkpoint(store.split(store.params), kept, epoch, step, steps, info), keep)
    params = sliced(store.pieces, store.params)
    optimizer = {name: sliced(store.pieces, flat) for name, flat in state.items()}
    ranks = Ranks(mesh.model, limit_s)
    ranks.check(lambda: checkpoint.write_part(folder, steps, mesh.part, mesh.parts, params, optimizer))
    return ranks.first(lambda: checkpoint.complete(folder, steps, mesh.parts, epoch, step, info, keep))
