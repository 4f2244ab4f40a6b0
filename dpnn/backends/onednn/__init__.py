"""The CPU path: oneDNN's kernels, our own schedule around them, images channels-last; float32.

Convolutions take the fastest of three algorithms for each shape and direction (`conv`): oneDNN's own, a matrix product
over windows, Winograd's. What only passes over memory (normalisation, ReLU, additions, copies) is done in blocks that
stay in a core's cache, several layers in one pass (`mix`, `op.Tail`). A layer that isn't in the table below is left to
the next backend.
"""

from collections.abc import Callable, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from dpnn.backends.base import Group, Mode, Op, Room, Slot
from dpnn.backends.onednn import conv, dense, join, lrn, mix, pool
from dpnn.backends.onednn.choices import Choices
from dpnn.backends.onednn.conv import Kit
from dpnn.backends.onednn.direct import Direct
from dpnn.backends.onednn.fuse import fuse
from dpnn.backends.onednn.geometry import Algorithm
from dpnn.backends.onednn.library import Library
from dpnn.backends.onednn.op import Tools
from dpnn.backends.onednn.unfold import Unfold
from dpnn.backends.onednn.winograd import Winograd
from dpnn.machine import processor
from dpnn.memory import HOST, Memory
from dpnn.native import Kernels, Unavailable
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Node
from dpnn.nn.join import Concat
from dpnn.nn.layer import Layer
from dpnn.nn.norm import BatchSums, LocalResponseNorm
from dpnn.nn.pointwise import Flatten
from dpnn.nn.pool import GlobalAvgPool, MaxPool
from dpnn.team import Team

__all__ = ["OneDNN", "Unavailable"]

_OPS: dict[type[Layer], Callable[[Group, Slot, Mode, Tools], Op]] = {
    BatchSums: mix.BatchSumsOp,
    Concat: join.ConcatOp,
    Dense: dense.DenseOp,
    Flatten: join.FlattenOp,
    GlobalAvgPool: pool.GlobalAvgPoolOp,
    LocalResponseNorm: lrn.LocalResponseNormOp,
    MaxPool: pool.MaxPoolOp,
}


class OneDNN:
    """Computes in float32 on the threads of a team; Unavailable where oneDNN or our kernels are missing.

    `bfloat16`: oneDNN's convolutions round their inputs to bfloat16 and add in float32; Unavailable where the processor
    hasn't the instructions.
    """

    name = "onednn"
    dtype = np.dtype(np.float32)
    channels_last = True
    memory: Memory = HOST

    def __init__(self, team: Team, bfloat16: bool = False) -> None:
        kernels = Kernels(team.size)
        self.kernels: Kernels | None = kernels
        self.arithmetic = kernels
        self.library = Library(team.size)
        if bfloat16 and not self.library.has_bfloat16:
            raise Unavailable(
                f"this processor's {self.library.isa} has no bfloat16 that oneDNN uses (AMX has); "
                'use backend.precision = "float32"'
            )
        self._tools = Tools(kernels, team)
        threadpool_limits(1, "blas")  # the team's threads multiply matrices side by side, each its own
        library = self.library
        name = f"onednn-{library.version}-{library.isa}-{kernels.level}-{team.size}-{processor()}"
        self.choices: dict[str, str] = {}
        self.about = f"oneDNN {library.version} ({library.isa}) from {library.path}"
        algorithms: list[Algorithm] = [Direct(library, bfloat16)]
        if not bfloat16:
            algorithms += [Unfold(team), Winograd(kernels)]
        self._choices = Choices(name, self.choices)
        self._kit = Kit(self._tools, algorithms, self._choices)

    @property
    def unkept(self) -> str:
        """Why choices can't be kept for other runs; empty where they can."""
        return self._choices.trouble

    def groups(self, nodes: Sequence[Node], mode: Mode) -> list[Group]:
        """Chains of layers that one op computes."""
        return fuse(nodes, mode, self)

    def room(self, group: Group, rows: int, mode: Mode) -> Room:
        """Scratch of convolutions, what a pooling keeps, what a dense layer gathers."""
        if isinstance(group.nodes[0].layer, Conv):
            return conv.room(group, rows, mode, self._kit)
        if isinstance(group.nodes[0].layer, Dense):
            return dense.room(group, mode)
        return pool.room(group, rows, mode)

    def build(self, group: Group, slot: Slot, mode: Mode) -> Op:
        """The op of a group: its first layer says which."""
        kind = type(group.nodes[0].layer)
        if kind is Conv:
            return conv.ConvOp(group, slot, mode, self._kit)
        return _OPS.get(kind, mix.MixOp)(group, slot, mode, self._tools)
