"""What all ops here have in common: calls made once for each number of rows, and the gradient that comes in.

An op is a list of calls without arguments for each direction. They are bound to arrays once for a number of rows: for
the largest while the plan is built, for another (an epoch's last batch) when it first comes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Slot, put
from dpnn.backends.onednn.geometry import images_last
from dpnn.native import Call, Kernels
from dpnn.nn.join import Fork
from dpnn.nn.pointwise import ReLU
from dpnn.team import Team

_ZERO = np.zeros(1, np.float32)
BLOCK = 1 << 16
"""Numbers that are worth a thread of the team."""


@dataclass(frozen=True)
class Tools:
    """What ops compute with: our kernels, and the rank's threads for NumPy's matrix products."""

    kernels: Kernels
    team: Team


class Bindings(dict[int, list[Call]]):
    """The calls for each number of rows."""

    def __init__(self, bind: Callable[[int], list[Call]]) -> None:
        super().__init__()
        self._bind = bind

    def __missing__(self, rows: int) -> list[Call]:
        self[rows] = calls = self._bind(rows)
        return calls


class CallsOp(ABC):
    """An op made of calls."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        self.step, self.tools = slot.step, tools
        self.tail = Tail(group, slot, mode, tools.kernels)
        self.kept, self.room_forward, self.room_backward, self.room_weights, self.rows = slot.room(group)
        self._forward, self._backward = Bindings(self.bind_forward), Bindings(self.bind_backward)
        self._weights = Bindings(self.bind_weights)
        params = [(node, param) for node in group.nodes for param in node.params] if self.tail.trains else []
        # Without rows gradients are zero, as backward writes; those of statistics are forward's to write.
        for calls, statistics in ((self._forward, True), (self._backward, False)):
            wanted = [(node, param.role) for node, param in params if (param.spec.statistic != 0) == statistics]
            calls[0] = [partial(put, slot.d_param(node, role), _ZERO, self.step) for node, role in wanted]
        if not group.gathers:
            self._weights[0] = []

    def prepare(self, rows: int) -> None:
        """Bind for the most rows; the last thing that a constructor does."""
        self._forward[rows]
        if self.tail.trains:
            self._backward[rows]
            self._weights[rows]

    def forward(self) -> None:
        for call in self._forward[self.step.rows]:
            call()

    def backward(self) -> None:
        for call in self._backward[self.step.rows]:
            call()

    def weights(self) -> None:
        """What `backward` has left out, where the group splits."""
        for call in self._weights[self.step.rows]:
            call()

    @abstractmethod
    def bind_forward(self, rows: int) -> list[Call]:
        """The calls of forward."""

    @abstractmethod
    def bind_backward(self, rows: int) -> list[Call]:
        """The calls of backward."""

    def bind_weights(self, rows: int) -> list[Call]:
        """Those of `weights`."""
        return []


class Tail:
    """The end of a group: an optional ReLU, an optional Fork; its output, and the gradient that comes back."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, kernels: Kernels) -> None:
        self._kernels = kernels
        self.relu = any(isinstance(node.layer, ReLU) for node in group.nodes)
        last = group.nodes[-1]
        self.trains = mode == "train" and last.needs_grad
        self.y = slot.input(last) if group.forward_view else slot.output(last)
        self.dys: list[Array] = []
        if self.trains:
            self.dys = slot.d_outputs(last) if isinstance(last.layer, Fork) else [slot.d_output(last)]
        self.channels = self.y.shape[1]

    def gather(
        self,
        rows: int,
        sums: Array | None = None,
        copies: Sequence[Array] = (),
        xs: Sequence[Array] = (),
        centres: Sequence[Array] = (),
    ) -> list[Call]:
        """Into the first gradient: the sum over the readers, where the ReLU let it pass; the same into `copies`.

        `sums` (1 + len(xs), K) float64: its sums over all pixels, and those of it times each of x - centre.
        """
        first, *others = (flat(dy, rows) for dy in self.dys)
        if not (others or self.relu or copies) and sums is None:
            return []
        y = flat(self.y, rows) if self.relu else None
        work = None if sums is None else np.empty((self._kernels.threads, 2, *sums.shape))
        return [
            self._kernels.bind(
                "gather", *first.shape, first, len(others), others, y, len(copies), list(copies),
                len(xs), list(xs), list(centres), sums, self._kernels.threads, work,
            )
        ]  # fmt: skip


def flat(array: Array, rows: int) -> Array:
    """The first rows as (pixels, channels)."""
    array = array[:rows]
    return images_last(array).reshape(-1, array.shape[1]) if array.ndim == 4 else array


def copies(team: Team, target: Array, source: Array) -> Call:
    """target = source, each thread its run of the first dimension."""
    runs = team.cut(len(target), least=-(-BLOCK // max(1, target[0].size)))
    return partial(
        team.run, [[partial(np.copyto, target[run.start : run.stop], source[run.start : run.stop])] for run in runs]
    )
