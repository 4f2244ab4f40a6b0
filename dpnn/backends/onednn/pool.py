"""Pooling: the largest number of each window (kernels/pool.c), and the mean over whole images."""

import math
from ctypes import c_int64
from functools import partial
from typing import cast

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Room, Slot
from dpnn.backends.onednn.geometry import images_last
from dpnn.backends.onednn.op import BLOCK, CallsOp, Tools
from dpnn.native import Call
from dpnn.nn.layer import pair
from dpnn.nn.pool import MaxPool


class MaxPoolOp(CallsOp):
    """MaxPool, then Fork, in one; the places of the largest numbers are kept for backward, a byte each."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        super().__init__(group, slot, mode, tools)
        self.node = group.nodes[0]
        self.x = slot.input(self.node)
        self.dx = slot.d_input(self.node) if self.tail.trains else None
        self.places = self.kept if mode == "train" else None
        self.prepare(len(self.tail.y))

    def bind_forward(self, rows: int) -> list[Call]:
        return [self.tools.kernels.bind("maxpool", self._window(rows), self.x, self.tail.y, self.places)]

    def bind_backward(self, rows: int) -> list[Call]:
        calls = self.tail.gather(rows)
        if self.dx is None:
            return calls
        dy = self.tail.dys[0]
        return [*calls, self.tools.kernels.bind("maxpool_gradient", self._window(rows), dy, self.places, self.dx)]

    def _window(self, rows: int) -> object:
        """The kernels' Window."""
        layer = cast(MaxPool, self.node.layer)
        (c, h, w), (_, p, q) = self.node.input_shapes[0], self.node.shape
        numbers = (rows, h, w, c, p, q, *pair(layer.size), *layer.step, *pair(layer.padding))
        return (c_int64 * len(numbers))(*numbers)


class GlobalAvgPoolOp(CallsOp):
    """GlobalAvgPool, then Fork, in one."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        super().__init__(group, slot, mode, tools)
        node = group.nodes[0]
        self.x = slot.input(node)
        self.dx = slot.d_input(node) if self.tail.trains else None
        self.factor = np.float32(1 / math.prod(node.input_shapes[0][1:]))
        self.prepare(len(self.tail.y))

    def bind_forward(self, rows: int) -> list[Call]:
        images, y = images_last(self.x), self.tail.y
        shares: list[list[Call]] = []
        for run in self.tools.team.cut(rows, least=self._least(images)):
            shares.append([])
            for n in run:
                shares[-1].append(partial(np.add.reduce, images[n], (0, 1), None, y[n]))
                shares[-1].append(partial(np.multiply, y[n], self.factor, y[n]))
        return [partial(self.tools.team.run, shares)]

    def bind_backward(self, rows: int) -> list[Call]:
        calls = self.tail.gather(rows)
        if self.dx is None:
            return calls
        images, dy = images_last(self.dx), self.tail.dys[0]
        shares: list[list[Call]] = []
        for run in self.tools.team.cut(rows, least=self._least(images)):
            shares.append([partial(np.multiply, dy[n], self.factor, images[n]) for n in run])
        return [*calls, partial(self.tools.team.run, shares)]

    def _least(self, images: Array) -> int:
        """Images that are worth a thread."""
        return -(-BLOCK // math.prod(images.shape[1:]))


def room(group: Group, rows: int, mode: Mode) -> Room:
    """The bytes that a maximum's places take from forward to backward."""
    node = group.nodes[0]
    wanted = mode == "train" and isinstance(node.layer, MaxPool)
    return Room(kept=rows * math.prod(node.shape) if wanted else 0)
