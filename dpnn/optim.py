"""Optimizers over flat arrays, and the learning rate of every step.

An optimizer walks the flat arrays of parameters and gradients in blocks that stay in the cache, by a table of
segments. Every number is updated by itself, in the arrays' own type, so the walk may be cut anywhere without changing
a bit: the rank's threads each take a run of it. In float32 the kernel in kernels/descend.c does the same in one pass.
With g the gradient times the scale of clipping, plus weight decay times p where the segment decays:
    sgd        p -= rate g
    momentum   m = momentum m + g;  p -= rate m                     as PyTorch's SGD
    nesterov   m = momentum m + g;  p -= rate (g + momentum m)      likewise
    adagrad    s = s + g^2;  p -= rate g / (sqrt(s) + epsilon)      Duchi, Hazan and Singer 2011, as PyTorch's Adagrad
A running statistic s of a segment is no descent: p = (1 - s) p + s g, g as it came.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn import config
from dpnn.native import Kernels
from dpnn.team import Team

Array = NDArray[Any]

_BLOCK = 1 << 15
"""Numbers that are updated at a time: five arrays of them stay in a core's own cache."""

_EPSILON = 1e-10
"""Of Adagrad: a number that never had a gradient isn't divided by 0."""

STATES: dict[str, tuple[str, ...]] = {"sgd": (), "momentum": ("momentum",), "adagrad": ("squares",)}
"""What each optimizer keeps from step to step."""


@dataclass(frozen=True)
class Segment:
    """The numbers [lo, hi) of the flat arrays that are updated in one manner.

    `decay`: weight decay applies. `statistic`: not 0 for a running statistic, and then its share of the new value.
    """

    lo: int
    hi: int
    decay: bool
    statistic: float


def merge(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """The segments with neighbours of one kind made one, empty ones left out.

    ValueError where they don't follow on one another.
    """
    merged: list[Segment] = []
    for segment in segments:
        if merged and segment.lo != merged[-1].hi:
            raise ValueError(f"a segment starts at {segment.lo}, the one before it ends at {merged[-1].hi}")
        if merged and replace(segment, lo=merged[-1].lo) == replace(merged[-1], hi=segment.hi):
            merged[-1] = replace(merged[-1], hi=segment.hi)
        elif segment.lo < segment.hi:
            merged.append(segment)
    return tuple(merged)


def cut(segments: Iterable[Segment], lo: int, hi: int) -> tuple[Segment, ...]:
    """The segments of the slice [lo, hi) of the flat arrays, counted from lo: for who holds only that slice."""
    inside = (segment for segment in segments if max(lo, segment.lo) < min(hi, segment.hi))
    return tuple(replace(segment, lo=max(lo, segment.lo) - lo, hi=min(hi, segment.hi) - lo) for segment in inside)


class Optimizer:
    """Updates `params` from `grads`, two flat arrays of n numbers that `segments` cover from 0 to n.

    `state` holds what is kept from step to step, flat arrays as long as `params`, by the names in STATES. It is made
    where it isn't given.
    """

    def __init__(
        self,
        options: config.Optimizer,
        segments: Iterable[Segment],
        params: Array,
        grads: Array,
        team: Team,
        kernels: Kernels | None = None,
        state: dict[str, Array] | None = None,
    ) -> None:
        # Without weight decay a decaying segment is like any other: fewer, longer segments are faster.
        decays = options.weight_decay != 0
        self._segments = merge(replace(segment, decay=segment.decay and decays) for segment in segments)
        bounds = (self._segments[0].lo, self._segments[-1].hi) if self._segments else (0, 0)
        if bounds != (0, params.size) or params.shape != grads.shape:
            raise ValueError(f"segments over {bounds}, {params.size} parameters and {grads.size} gradients don't fit")
        self._ends = [segment.hi for segment in self._segments]
        self._options = options
        self._params, self._grads = params, grads
        self.state = state if state is not None else {name: np.zeros_like(params) for name in STATES[options.name]}
        self._momentum, self._squares = self.state.get("momentum"), self.state.get("squares")
        self._team = team
        self._kernels = kernels if params.dtype == np.float32 else None
        kept = self._momentum if self._squares is None else self._squares
        self._addresses = [None if array is None else array.ctypes.data for array in (params, grads, kept)]
        self._scratch = np.empty((team.size, 2, _BLOCK), params.dtype)
        self._wide = np.empty(_BLOCK, np.float64)

    def apply(self, lo: int, hi: int, rate: float, scale: float = 1.0) -> None:
        """Update params[lo:hi]. `scale` multiplies the gradients (clipping); they are left as they are."""
        if self._kernels is not None:
            self._apply(lo, hi, rate, scale, 0)
            return
        runs = self._team.cut(hi - lo, least=_BLOCK)
        self._team.run(
            [[partial(self._apply, lo + run.start, lo + run.stop, rate, scale, i)] for i, run in enumerate(runs)]
        )

    def _apply(self, lo: int, hi: int, rate: float, scale: float, thread: int) -> None:
        scratch = self._scratch[thread]
        for segment, start, end in self._pieces(lo, hi):
            if segment.statistic:
                self._average(start, end, segment.statistic, scratch)
            else:
                self._descend(start, end, rate, scale, segment.decay, scratch)

    def sum_of_squares(self, lo: int, hi: int) -> float:
        """Of the trained gradients in [lo, hi), added up in float64."""
        total = 0.0
        for segment, start, end in self._pieces(lo, hi):
            if self._kernels is not None:
                piece = self._grads.ctypes.data + 4 * start
                total += 0.0 if segment.statistic else self._kernels.call("squares", end - start, piece)
                continue
            for at in range(start, 0 if segment.statistic else end, _BLOCK):
                wide = self._wide[: min(_BLOCK, end - at)]
                np.copyto(wide, self._grads[at : at + wide.size])
                np.multiply(wide, wide, out=wide)
                total += float(np.add.reduce(wide))
        return total

    def clip_scale(self, sum_of_squares: float) -> float:
        """What the gradients are multiplied by, so that their norm is at most `clip`."""
        norm, limit = math.sqrt(sum_of_squares), self._options.clip
        return limit / norm if 0 < limit < norm else 1.0

    def _pieces(self, lo: int, hi: int) -> Iterable[tuple[Segment, int, int]]:
        """The segments that meet [lo, hi), each with its part of it."""
        for segment in self._segments[bisect_right(self._ends, lo) :]:
            if segment.lo >= hi:
                break
            yield segment, max(lo, segment.lo), min(hi, segment.hi)

    def _average(self, lo: int, hi: int, share: float, scratch: Array) -> None:
        for at in range(lo, hi, _BLOCK):
            p, new = self._params[at : min(at + _BLOCK, hi)], scratch[0, : min(_BLOCK, hi - at)]
            np.multiply(self._grads[at : at + new.size], share, out=new)
            np.multiply(p, 1.0 - share, out=p)
            np.add(p, new, out=p)

    def _descend(self, lo: int, hi: int, rate: float, scale: float, decay: bool, scratch: Array) -> None:
        options = self._options
        if self._kernels is not None:
            arrays = [None if base is None else base + 4 * lo for base in self._addresses]
            numbers = (rate, scale, options.weight_decay if decay else 0.0)
            if self._squares is not None:
                self._kernels.call("adagrad", hi - lo, *arrays, *numbers, _EPSILON)
            else:
                self._kernels.call("descend", hi - lo, *arrays, *numbers, options.momentum, options.nesterov)
            return
        for at in range(lo, hi, _BLOCK):
            end = min(at + _BLOCK, hi)
            p, g = self._params[at:end], self._grads[at:end]
            changed, work = scratch[:, : end - at]
            if scale != 1.0:
                g = np.multiply(g, scale, out=changed)
            if decay:
                np.multiply(p, options.weight_decay, out=work)
                g = np.add(g, work, out=changed)
            if self._squares is not None:
                s = self._squares[at:end]
                np.multiply(g, g, out=work)
                np.add(s, work, out=s)
                np.sqrt(s, out=work)
                np.add(work, _EPSILON, out=work)
                g = np.divide(g, work, out=changed)
            if self._momentum is not None:
                m = self._momentum[at:end]
                np.multiply(m, options.momentum, out=m)
                np.add(m, g, out=m)
                if options.nesterov:
                    np.multiply(m, options.momentum, out=work)
                    g = np.add(g, work, out=changed)
                else:
                    g = m
            np.multiply(g, rate, out=work)
            np.subtract(p, work, out=p)


def schedule(options: config.Schedule, lr: float, steps_per_epoch: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step's number alone, from 0.

    It rises in a line to `lr` over the warm-up (Goyal et al. 2017, section 2.2); "cosine" (Loshchilov and Hutter 2017,
    without restarts) and "poly" fall from there to 0 at `total_steps`, "step" multiplies by `factor` at each milestone.
    """
    warm = options.warmup_epochs * steps_per_epoch
    milestones = [epochs * steps_per_epoch for epochs in options.milestones]

    def left(step: int) -> float:
        """The share of the steps after the warm-up that is still to come."""
        return min(1.0, max(0.0, (total_steps - step) / (total_steps - warm))) if total_steps > warm else 1.0

    curves: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "step": lambda step: options.factor ** bisect_right(milestones, step),
        "cosine": lambda step: 0.5 * (1.0 - math.cos(math.pi * left(step))),
        "poly": lambda step: left(step) ** options.power,
    }
    curve = curves[options.name]
    return lambda step: lr * curve(step) * (min(1.0, (step + 1) / warm) if warm else 1.0)
