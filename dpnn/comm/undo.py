"""What takes back the updates of a step that not all ranks could end.

Before numbers are changed, they are kept in a shadow, a few at a time while they are in the cache (kernels/descend.c);
what is kept is noted in a log. Both lie where the arrays do, so that others of the node can take back what a dead rank
has done. A rank may be killed between any two writes: what it has changed is always noted, and what is noted is always
whole in the shadow.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.native import address

Array = NDArray[Any]
Log = NDArray[np.int64]

FRONTS = 256
"""The most threads that a run is changed by."""
_STEP, _LENGTH, _BACK, _BEGIN, _HEAD = range(5)
"""A log: the step that it is of, how many runs [lo, hi) it has, whether they are being taken back, where the run begins
that is being changed, how far: for each thread [lo, hi), counted from there, is kept; and the runs."""
_RUNS = _HEAD + 2 * FRONTS


def log_nbytes(entries: int) -> int:
    """Bytes of a log."""
    return (_RUNS + 2 * entries) * 8


class Undo:
    """`arrays` and their shadows; the logs of all ranks that change them, of which `rank` is mine.

    In a step every rank notes at most as many runs as its log has room for. ValueError where not every shadow is as far
    from its array as the others.
    """

    def __init__(self, arrays: Sequence[Array], shadows: Sequence[Array], logs: Sequence[Log], rank: int) -> None:
        self._pairs, self._logs, self._log = list(zip(arrays, shadows, strict=True)), logs, logs[rank]
        self._step, self._length = -1, 0
        apart = {address(shadow) - address(array) for array, shadow in self._pairs}
        if len(apart) != 1:
            raise ValueError(f"shadows are {sorted(apart)} bytes from their arrays, and not all as far")
        self.distance = apart.pop() // arrays[0].itemsize
        """From an array to its shadow, in numbers."""
        self.fronts = self._log[_HEAD:_RUNS]
        """For each thread two numbers, which a kernel that keeps what it changes writes."""

    def begin(self, step: int) -> None:
        """What I change from now on belongs to this step: no rank has an earlier one to take back."""
        if step != self._step:
            self._log[_LENGTH] = self._log[_BACK] = self._length = 0
            self.fronts[:] = 0
            self._log[_STEP] = self._step = step

    def open(self, lo: int) -> None:
        """A kernel changes numbers from there on next, which I haven't changed in this step, and keeps them itself."""
        self.fronts[:] = 0
        self._log[_BEGIN] = lo

    def note(self, lo: int, hi: int) -> None:
        """[lo, hi) of all arrays is kept."""
        at = _RUNS + 2 * self._length
        self._log[at : at + 2] = lo, hi
        self._length += 1
        self._log[_LENGTH] = self._length

    def keep(self, lo: int, hi: int) -> None:
        """I change [lo, hi) of all arrays next, which I haven't in this step."""
        for array, shadow in self._pairs:
            np.copyto(shadow[lo:hi], array[lo:hi])
        self.note(lo, hi)

    def back(self, step: int) -> bool:
        """Whether a rank of the node has begun to take this step back, of all."""
        return bool(self._log[_STEP] == step and self._log[_BACK])

    def take_back(self, step: int) -> None:
        """The arrays as they were before a step; as long as no rank changes them. Twice is harmless."""
        logs = [log for log in self._logs if log[_STEP] == step]
        for log in logs:
            log[_BACK] = 1
        for log in logs:
            runs = log[_RUNS : _RUNS + 2 * int(log[_LENGTH])].reshape(-1, 2)
            for lo, hi in (*runs, *(log[_BEGIN] + log[_HEAD:_RUNS].reshape(-1, 2))):
                for array, shadow in self._pairs:
                    np.copyto(array[lo:hi], shadow[lo:hi])
