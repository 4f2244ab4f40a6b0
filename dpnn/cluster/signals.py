"""A request to stop: SIGTERM (the batch system), SIGUSR1 (before its time limit), SIGINT (a person)."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers, from when it is made to the end of the process, that one of the signals came.

    A second SIGINT interrupts at once. The other signals may well come twice (from the batch system and from the
    launcher, also when the run has stopped already), so they only ask again.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def settle(self) -> None:
        """How the run ends is settled: a signal that comes now can't change the exit code any more."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # Python's end gives back the default for any other handler

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
