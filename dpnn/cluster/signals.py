"""A request to stop: SIGTERM (the batch system), SIGUSR1 (before its time limit), SIGINT (a person)."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that one of the signals came. Used as a context manager: the handlers before it come back at the end.

    A second SIGINT interrupts at once. The other signals may well come twice (from the batch system and from the
    launcher), so they only ask again.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
