"""Choices made by timing: made once for a machine, kept in a file in the user's cache folder.

The file is named after the library, the processor's instructions and the number of threads, because a choice holds for
these only. A file that can't be read or written costs the timing again, nothing else.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path


class Choices:
    """What was chosen, by a name for the question: `made` holds what this run asked for, the file what any run did."""

    def __init__(self, name: str, made: dict[str, str]) -> None:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self._path = Path(folder, "dpnn", f"{name}.json")
        self._known = self._read()
        self._timed: dict[str, str] = {}
        self.made = made

    def fastest(self, question: str, names: Sequence[str], time: Callable[[str], float]) -> str:
        """The one of `names` that takes the least time, timed where it isn't known."""
        for known in (self.made, self._known):
            if known.get(question) in names:
                self.made[question] = known[question]
                return known[question]
        times = {name: time(name) for name in names}
        self.made[question] = self._timed[question] = min(times, key=lambda name: times[name])
        self._write()
        return self.made[question]

    def _read(self) -> dict[str, str]:
        try:
            made = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return made if isinstance(made, dict) else {}

    def _write(self) -> None:
        """Together with what other ranks have written meanwhile, whole or not at all."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({**self._read(), **self._timed}, indent=1, sort_keys=True))
            temporary.replace(self._path)
        except OSError:
            pass
