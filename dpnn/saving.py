"""A run's checkpoints, written while it goes on.

At a checkpoint each rank of the first replica copies what it holds to memory that is there for that alone, and goes on
training. A thread looks whether all is finite, writes the copy, reads it again, and deletes older checkpoints. Where a
replica has several parts, each writes its own file, and the first one makes a checkpoint of them once it sees all.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpnn import checkpoint
from dpnn.checkpoint import Checkpoint, InParts, Note
from dpnn.comm.background import Background
from dpnn.comm.mesh import Mesh
from dpnn.plan import Store
from dpnn.state import Array, sliced
from dpnn.team import Team

_LEAST = 1 << 20
"""Numbers of an array that are worth a thread."""


class Writing(NamedTuple):
    """A checkpoint on its way."""

    steps: int
    work: Background[Path | None]
    give_up: Callable[[], object]
    """Its other parts won't come."""


class Saver:
    """Writes checkpoints of the first replica, one at a time; on ranks of others nothing is to be done."""

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        store: Store,
        state: Mapping[str, Array],
        team: Team,
        keep: int,
        limit_s: float,
        tell: Callable[[int, Path], object],
        writing: Writing | None = None,
    ) -> None:
        """Collective. `state`: what the optimizer keeps, by name, laid out as the parameters of `store`.

        `tell(steps, path)` is called on the first rank, in its main thread, of each checkpoint that is complete.
        `limit_s`: how long the writing may stand still. `writing`: what another saver of this rank has begun.
        """
        self._folder, self._mesh, self._store, self._keep, self._limit_s = folder, mesh, store, keep, limit_s
        self._tell, self._team = tell, team
        self._parts = InParts(folder, mesh.parts, mesh.crew.first(checkpoint.new_mark))
        self.writing = writing
        """On its way, and not told of."""
        if mesh.replica == 0:
            flats = [store.params, *state.values()]
            copies = [np.empty_like(flat) for flat in flats]
            self._params, self._state = copies[0], dict(zip(state, copies[1:], strict=True))
            self._copying = [
                [
                    partial(np.copyto, copy[run.start : run.stop], flat[run.start : run.stop])
                    for copy, flat in zip(copies, flats, strict=True)
                ]
                for run in team.cut(store.size, _LEAST)
            ]
            team.run(self._copying)  # so that the system gives the memory now

    def save(self, place: tuple[int, int, int], info: dict[str, Any]) -> None:
        """Copy the run's state, and start to write that, once the checkpoint before is written.

        `place`: epoch, step, steps of the run; `info`: what JSON can hold. Collective; errors as `look`.
        """
        self.finish()
        if self._mesh.replica != 0:
            return
        self._team.run(self._copying)
        what = f"the checkpoint after step {place[2]} in {self._folder}"
        work = Background(what, lambda note: self._write(place, info, note), self._limit_s)
        self.writing = Writing(place[2], work, self._parts.give_up)

    def look(self) -> None:
        """Tell of a checkpoint that is complete by now.

        DataError where the folder or the disk doesn't take it, NotFiniteError where a number isn't finite, RankError
        where nothing moves: in the step after that happened, or later.
        """
        if self.writing is not None and self.writing.work.done():
            steps, path = self.writing.steps, self.writing.work.result()
            self.writing = None
            if path is not None:
                self._tell(steps, path)

    def finish(self) -> None:
        """Return when the last checkpoint is complete, on all ranks. Collective; errors as `look`.

        All hear now and then that it gets on: that may take longer than a rank waits for another.
        """
        while self._mesh.crew.any(self._goes_on()):
            pass

    def _goes_on(self) -> bool:
        """Whether a checkpoint is still being written, and has got on for some time."""
        if self.writing is not None and not self.writing.work.goes_on():
            self.look()
        return self.writing is not None

    def _write(self, place: tuple[int, int, int], info: dict[str, Any], note: Note) -> Path | None:
        """In a thread: write what was copied; the checkpoint's path, where it is whole."""
        epoch, step, steps = place
        mesh, store = self._mesh, self._store
        if mesh.parts == 1:
            state = {name: store.split(flat) for name, flat in self._state.items()}
            whole = Checkpoint(store.split(self._params), state, epoch, step, steps, info)
            return checkpoint.write(self._folder, whole, self._keep, note)
        slices = {name: sliced(store.pieces, flat) for name, flat in self._state.items()}
        self._parts.write(steps, mesh.part, sliced(store.pieces, self._params), slices, note)
        if mesh.part != 0:
            return None
        return self._parts.complete(steps, epoch, step, info, self._keep, note)
