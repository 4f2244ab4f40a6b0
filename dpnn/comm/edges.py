"""Activations and their gradients between the parts of a replica: messages that are prepared once.

Every message has its buffer, its partner and its tag from the start, so a step only starts requests and waits for them:
nothing is packed, copied or reserved. Parts that share a broadcast or a collation have a communicator of their own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.comm.faults import duplicate, reported, wait
from dpnn.comm.mesh import Mesh

Array = NDArray[Any]
Call = Callable[[], object]


class Edges:
    """The ends of messages on this part; `nbytes` counts what was sent."""

    def __init__(self, mesh: Mesh, crews: Sequence[tuple[int, ...]], limit_s: float) -> None:
        """Collective over mesh.model, the parts of a replica. `crews`: parts with a communicator of their own."""
        from mpi4py import MPI

        model = mesh.model
        self.nbytes = 0
        self._limit_s = limit_s
        self._model = duplicate(model, f"{model.size} parts to prepare their messages", limit_s)
        self._crews: dict[tuple[int, ...], MPI.Comm] = {(): self._model}
        for crew in crews:
            self._crews[crew] = mesh.among(crew)
        self._any = MPI.ANY_SOURCE, MPI.ANY_TAG

    def send(self, crew: tuple[int, ...], part: int, tag: int, buffer: Array, what: str) -> tuple[Call, Call]:
        """The calls that start to send `buffer` to a part, and that wait until it may be written again."""
        request = self._crews[crew].Send_init(_typed(buffer), _rank(crew, part), tag)

        def start() -> None:
            with reported(f"sending {what} to part {part}"):
                request.Start()
            self.nbytes += buffer.nbytes

        return start, partial(wait, request.Test, f"part {part} to take {what}", self._limit_s)

    def receive(self, crew: tuple[int, ...], part: int, tag: int, buffer: Array, what: str) -> tuple[Call, Call]:
        """The calls that open `buffer` for what a part sends, and that wait for it."""
        request = self._crews[crew].Recv_init(_typed(buffer), _rank(crew, part), tag)

        def start() -> None:
            with reported(f"making room for {what} of part {part}"):
                request.Start()

        return start, partial(wait, request.Test, f"{what} of part {part}", self._limit_s)

    def poke(self) -> None:
        """MPI makes no progress by itself: let it move what is under way."""
        self._model.Iprobe(*self._any)


def _rank(crew: tuple[int, ...], part: int) -> int:
    """Of a part in its crew's communicator."""
    return crew.index(part) if crew else part


def _typed(buffer: Array) -> Array:
    """The buffer as MPI is to count it: in 4 bytes where that goes, since it counts to 2**31 only."""
    return buffer.view(np.int32) if buffer.nbytes % 4 == 0 else buffer
