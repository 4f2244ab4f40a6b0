"""The fully connected layer: y = x weight^T + bias. Each thread makes its own run of units, and of inputs backward.

For few rows, and for small layers, it is made by kernels/dense.c, which packs nothing; else by NumPy's products.
"""

from functools import partial

import numpy as np

from dpnn.backends.base import Array, Group, Mode, Room, Slot, put
from dpnn.backends.onednn.op import Bindings, CallsOp, Tools
from dpnn.native import Call

_FEW, _SMALL = 32, 1 << 26
"""Rows, and multiply-adds, up to which our kernel is faster."""
_LEAST = 1 << 16
"""Numbers of the weights that are worth a thread."""


class DenseOp(CallsOp):
    """Dense, then ReLU and Fork, in one."""

    def __init__(self, group: Group, slot: Slot, mode: Mode, tools: Tools) -> None:
        super().__init__(group, slot, mode, tools)
        node = group.nodes[0]
        self.x, self.w = slot.input(node), slot.param(node, "weight")
        biased = "bias" in {param.role for param in node.params}
        self.bias = slot.param(node, "bias") if biased else None
        if self.tail.trains:
            self.dx, self.dw = slot.d_input(node), slot.d_param(node, "weight")
            if biased:
                self.d_bias, self.total = slot.d_param(node, "bias"), np.empty((1, node.shape[0]))
            k, c = self.w.shape
            rows = self.rows.view(np.float32).reshape(-1, k + c)
            self.gathers, self.xs, self.dys = group.gathers, rows[:, :c], rows[:, c:]
            self._of_all = Bindings(lambda rows: [self._product(self.xs[:rows], self.dys[:rows])])
        self.prepare(len(self.tail.y))

    def bind_forward(self, rows: int) -> list[Call]:
        k, c = self.w.shape
        x, y = self.x[:rows], self.tail.y[:rows]
        if rows <= _FEW or rows * c * k <= _SMALL:
            return [self.tools.kernels.bind("dense", rows, c, k, x, self.w, self.bias, self.tail.relu, y)]
        shares = []
        for run in self.tools.team.cut(k, least=-(-_LEAST // c)):
            mine = slice(run.start, run.stop)
            calls: list[Call] = [partial(np.matmul, x, self.w[mine].T, y[:, mine])]
            if self.bias is not None:
                calls.append(partial(np.add, y[:, mine], self.bias[mine], y[:, mine]))
            if self.tail.relu:
                calls.append(partial(np.maximum, y[:, mine], np.float32(0), out=y[:, mine]))
            shares.append(calls)
        return [partial(self.tools.team.run, shares)]

    def bind_backward(self, rows: int) -> list[Call]:
        k, c = self.w.shape
        dy = self.tail.dys[0][:rows]
        calls = self.tail.gather(rows, self.total if self.bias is not None else None)
        if self.bias is not None:
            calls.append(partial(put, self.d_bias, self.total[0], self.step))
        if self.dx is not None:
            shares = []
            for run in self.tools.team.cut(c, least=-(-_LEAST // k)):
                mine = slice(run.start, run.stop)
                shares.append([partial(np.matmul, dy, self.w[:, mine], self.dx[:rows, mine])])
            calls.append(partial(self.tools.team.run, shares))
        return calls

    def bind_weights(self, rows: int) -> list[Call]:
        x, dy = self.x[:rows], self.tail.dys[0][:rows]
        if self.gathers:
            return [partial(self._gather, x, dy, self._product(x, dy))]
        shares = []
        for mine in self._runs():
            dw = self.dw[mine]
            part = np.empty_like(dw[: max(1, _LEAST // dw.shape[1])])
            shares.append([partial(self._add, dy[:, mine].T, x, dw, part)])
        return [partial(self.tools.team.run, shares)]

    def _gather(self, x: Array, dy: Array, alone: Call) -> None:
        """Keep the rows of a micro-batch, and make the product of all in the last one; of a single one at once."""
        step = self.step
        if step.first and step.last:
            alone()
            return
        rows = step.before + len(x)
        np.copyto(self.xs[step.before : rows], x)
        np.copyto(self.dys[step.before : rows], dy)
        if step.last:
            for call in self._of_all[rows]:
                call()

    def _runs(self) -> list[slice]:
        """The units of each thread."""
        runs = self.tools.team.cut(len(self.w), least=-(-_LEAST // self.w.shape[1]))
        return [slice(run.start, run.stop) for run in runs]

    def _product(self, x: Array, dy: Array) -> Call:
        """dw = dy x."""
        shares = [[partial(np.matmul, dy[:, mine].T, x, out=self.dw[mine])] for mine in self._runs()]
        return partial(self.tools.team.run, shares)

    def _add(self, dy: Array, x: Array, dw: Array, part: Array) -> None:
        """dw = dy x; in a later micro-batch some rows at a time are made and added."""
        if self.step.first:
            np.matmul(dy, x, out=dw)
            return
        for lo in range(0, len(dw), len(part)):
            rows = dw[lo : lo + len(part)]
            np.matmul(dy[lo : lo + len(part)], x, out=part[: len(rows)])
            np.add(rows, part[: len(rows)], out=rows)


def room(group: Group, mode: Mode) -> Room:
    """Of each sample what `weights` reads, where that waits for all."""
    return Room(row=4 * sum(group.nodes[0].params[0].spec.shape) if mode == "train" and group.gathers else 0)
