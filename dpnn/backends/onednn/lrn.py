"""Local response normalisation across channels: kernels/lrn.c (oneDNN 3.2's backward is a reference of 0.2 GB/s)."""

from typing import cast

import numpy as np

from dpnn.backends.base import Group, Mode, Slot
from dpnn.backends.onednn.op import CallsOp, Tools, flat
from dpnn.native import Call
from dpnn.nn.norm import LocalResponseNorm

_MOST_LANES = 16


class LocalResponseNormOp(CallsOp):
    """LocalResponseNorm, then Fork, in one."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        super().__init__(group, slot, mode, tools)
        node = group.nodes[0]
        layer = cast(LocalResponseNorm, node.layer)
        self.x = slot.input(node)
        self.dx = slot.d_input(node) if self.tail.trains else None
        self.numbers = (layer.size, layer.alpha, layer.beta, layer.k)
        self.work = np.empty((tools.kernels.threads, 2, self.tail.channels + layer.size + _MOST_LANES), np.float32)
        self.prepare(len(self.tail.y))

    def bind_forward(self, rows: int) -> list[Call]:
        x, y = flat(self.x, rows), flat(self.tail.y, rows)
        return [self.tools.kernels.bind("lrn", *x.shape, x, *self.numbers, y, len(self.work), self.work)]

    def bind_backward(self, rows: int) -> list[Call]:
        calls = self.tail.gather(rows)
        if self.dx is None:
            return calls
        x, dy, dx = flat(self.x, rows), flat(self.tail.dys[0], rows), flat(self.dx, rows)
        return [
            *calls,
            self.tools.kernels.bind("lrn_gradient", *x.shape, x, dy, *self.numbers, dx, len(self.work), self.work),
        ]
