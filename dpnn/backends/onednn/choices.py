"""Choices made by timing: made once for a machine, kept in a file in the user's cache folder.

The file is named after the library, the processor and the number of threads, because a choice holds for these only: so
unlike nodes that share a home have a file each. It is read when something is to be chosen that isn't known yet. A file
that can't be read or written costs the timing again, nothing else.
"""

import json
import os
import secrets
from collections.abc import Callable, Sequence
from functools import cached_property

from dpnn import caches


class Choices:
    """What was chosen, by a name for the question: `made` holds what this run asked for, the file what any run did.

    `trouble`: why it can't be kept, empty where it was.
    """

    def __init__(self, name: str, made: dict[str, str]) -> None:
        self._path = caches.folder() / f"{name}.json"
        self._timed: dict[str, str] = {}
        self.made, self.trouble = made, ""

    def fastest(self, question: str, names: Sequence[str], time: Callable[[str], float]) -> str:
        """The one of `names` that takes the least time, timed where it isn't known."""
        if self.made.get(question) in names:
            return self.made[question]
        if self._known.get(question) in names:
            self.made[question] = self._known[question]
            return self.made[question]
        times = {name: time(name) for name in names}
        self.made[question] = self._timed[question] = min(times, key=lambda name: times[name])
        self._write()
        return self.made[question]

    @cached_property
    def _known(self) -> dict[str, str]:
        return self._read()

    def _read(self) -> dict[str, str]:
        try:
            made = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return made if isinstance(made, dict) else {}

    def _write(self) -> None:
        """Together with what others have written meanwhile, whole or not at all."""
        # Processes of two nodes may have the same number.
        temporary = self._path.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps({**self._read(), **self._timed}, indent=1, sort_keys=True))
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self.trouble = f"{self._path} can't be written ({error.strerror})"
