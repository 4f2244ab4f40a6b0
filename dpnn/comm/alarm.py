"""What lets a rank hear that another one has died, whatever it does, where the others can go on without that one.

MPI tells of a death those whose own messages need the dead rank. Who waits for a living one, which has heard and does
something else by now, would wait for ever: so every wait (faults.py) looks here now and then. Who is blocked in a call
of MPI's can't look: `sound` revokes what such calls are made on, and they fail.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from dpnn.comm.losses import Losses
from dpnn.errors import DpnnError, RankError, RankLost

if TYPE_CHECKING:
    from mpi4py import MPI

C = TypeVar("C", bound="MPI.Comm")

_LOOK_S = 0.01
"""From one look to the next."""
_PATIENCE_S = 1.0
"""How long after an error a death may become known that it comes from."""


class Alarm:
    """Silent until it is armed."""

    def __init__(self) -> None:
        self._world: MPI.Comm | None = None
        self._comms: list[MPI.Comm] = []
        self._due = 0.0

    def wakes(self, comm: C) -> C:
        """The same communicator, of which blocked ranks are woken."""
        self._comms.append(comm)
        return comm

    def arm(self, world: "MPI.Comm") -> None:
        """From here on the deaths of ranks of `world` are looked for."""
        self._losses, self._world, self._due = Losses(world), world, 0.0

    def look(self) -> None:
        """RankLost where a rank has died. Mostly it takes no time, so a loop may ask in every turn."""
        if self._world is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _LOOK_S
        if self._rings(self._world):
            raise RankLost("a rank has died")

    def heard(self, error: BaseException) -> bool:
        """Whether an error comes from a death.

        It may be any that nobody has foreseen: where a rank dies in a collective call of MPI's, the call may end on
        others without an error, and without all that it should have brought.
        """
        foreseen = isinstance(error, DpnnError) and not isinstance(error, RankError)
        if self._world is None or foreseen:
            return False
        until = time.monotonic() + _PATIENCE_S
        while not self._rings(self._world):
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_S)
        return True

    def sound(self) -> None:
        """Wake all who are blocked, and be silent until it is armed anew: what they were blocked on is of no use any
        more.
        """
        for comm in self._comms:
            if comm:
                comm.Revoke()
        self._comms.clear()
        self._world = None

    @contextmanager
    def outlived(self, errors: list[BaseException]) -> Iterator[None]:
        """The block ends where a rank has died; with the error in `errors`, which keeps what the block has made.

        Messages to there may still be on their way.
        """
        try:
            yield
        except Exception as error:
            if not self.heard(error):
                raise
            errors.append(error)

    def _rings(self, world: "MPI.Comm") -> bool:
        from mpi4py import MPI

        MPI.COMM_SELF.Iprobe(0)  # MPI notices while it is polled, and not on what is revoked
        self._losses.new()
        return world.Is_revoked() or self._losses.any


ALARM = Alarm()
"""This process's: it is one rank."""
