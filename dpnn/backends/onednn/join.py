"""Concat, and Flatten where images lie channels-last: copies, each thread its run of pixels or samples."""

from itertools import accumulate, pairwise

from dpnn.backends.base import Group, Mode, Slot
from dpnn.backends.onednn.op import CallsOp, Tools, copies, flat
from dpnn.native import Call


class ConcatOp(CallsOp):
    """Concat, then Fork, in one."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        super().__init__(group, slot, mode, tools)
        node = group.nodes[0]
        positions = range(len(node.inputs))
        self.xs = [slot.input(node, i) for i in positions]
        self.dxs = [slot.d_input(node, i) if self.tail.trains else None for i in positions]
        bounds = pairwise(accumulate((x.shape[1] for x in self.xs), initial=0))
        self.channels = [slice(lo, hi) for lo, hi in bounds]
        self.prepare(len(self.tail.y))

    def bind_forward(self, rows: int) -> list[Call]:
        y, team = flat(self.tail.y, rows), self.tools.team
        return [copies(team, y[:, c], flat(x, rows)) for x, c in zip(self.xs, self.channels, strict=True)]

    def bind_backward(self, rows: int) -> list[Call]:
        dy, team = flat(self.tail.dys[0], rows), self.tools.team
        pairs = [(dx, c) for dx, c in zip(self.dxs, self.channels, strict=True) if dx is not None]
        return [*self.tail.gather(rows), *(copies(team, flat(dx, rows), dy[:, c]) for dx, c in pairs)]


class FlattenOp(CallsOp):
    """(N, C, H, W) as it lies -> (N, C H W) in that order."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        super().__init__(group, slot, mode, tools)
        node = group.nodes[0]
        self.x = slot.input(node)
        self.dx = slot.d_input(node) if self.tail.trains else None
        self.prepare(len(self.tail.y))

    def bind_forward(self, rows: int) -> list[Call]:
        x = self.x[:rows]
        return [copies(self.tools.team, self.tail.y[:rows].reshape(x.shape), x)]

    def bind_backward(self, rows: int) -> list[Call]:
        calls = self.tail.gather(rows)
        if self.dx is None:
            return calls
        dx = self.dx[:rows]
        return [*calls, copies(self.tools.team, dx, self.tail.dys[0][:rows].reshape(dx.shape))]
