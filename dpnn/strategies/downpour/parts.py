"""The parts of a replica. They take the same steps, so what one of them hears, all have to know after the same step.

Each part has servers of its own, and pushes and fetches by itself. One part, the one that reads the data, asks the
first server for work; the others hear its answers. In every step the parts sum a few numbers, beginning when the loss
is known: the loss, whether the run stops, how far it is.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpnn.comm.faults import duplicate, wait
from dpnn.comm.losses import Losses
from dpnn.comm.reduce import BucketReducer
from dpnn.errors import RankError

if TYPE_CHECKING:
    from mpi4py import MPI


class Note(NamedTuple):
    """What a part tells the others, and what all of them together say."""

    loss: float
    """Its share; the sum of all."""
    stop: bool
    """Whether its servers say that the run stops; whether those of any part do."""
    asked: bool
    """Whether it was asked to stop; whether any was."""
    steps: int
    """Of all replicas, as far as it knows; as the part that asks for work knows."""


class Alone:
    """The whole network on one rank: nobody else has to know."""

    asks = True
    """Whether this part asks for work."""

    def __init__(self) -> None:
        self._note = Note(0.0, False, False, 0)

    def tell(self, note: Note) -> None:
        """Begin to tell all parts."""
        self._note = note

    def hear(self) -> Note:
        """What all have told."""
        return self._note

    def share(self, letter: bytearray) -> None:
        """Fill the letter with what the part has in it that asks for work."""

    def total(self, value: float) -> float:
        """The sum over all parts."""
        return value

    def check(self) -> None:
        """RankError where one of the others has died: a replica dies whole."""


class Parts(Alone):
    """Several parts, the ranks of `model`, of which `reader` asks for work. All calls are collective."""

    def __init__(self, model: "MPI.Comm", reader: int, limit_s: float) -> None:
        self.asks = model.rank == reader
        self._reader, self._limit_s = reader, limit_s
        self._losses = Losses(model)
        self._told, self._sum = np.zeros(len(Note._fields)), np.zeros(1)
        self._telling = BucketReducer(model, self._told, limit_s, "losses of a replica's parts")
        self._summing = BucketReducer(model, self._sum, limit_s, "norms of a replica's parts")
        self._comm = duplicate(model, f"{model.size} parts to prepare their messages", limit_s)

    def tell(self, note: Note) -> None:
        """Begin to tell all parts."""
        self._told[:] = note._replace(steps=note.steps if self.asks else 0)
        self._telling.start(0, self._told.size)

    def hear(self) -> Note:
        """What all have told."""
        self._telling.finish()
        loss, stop, asked, steps = self._told.tolist()
        return Note(loss, stop > 0, asked > 0, int(steps))

    def share(self, letter: bytearray) -> None:
        """Fill the letter with what the part has in it that asks for work."""
        told = self._comm.Ibcast(letter, self._reader)
        wait(told.Test, "the part that reads to hear of work from the first server", self._limit_s)

    def total(self, value: float) -> float:
        """The sum over all parts."""
        self._sum[0] = value
        self._summing.start(0, 1)
        self._summing.finish()
        return float(self._sum[0])

    def check(self) -> None:
        """RankError where one of the others has died: a replica dies whole."""
        for part in self._losses.new():
            raise RankError(f"part {part} of this replica has died")
