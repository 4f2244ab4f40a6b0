"""Optimizers over flat arrays, and the learning rate of every step.

An optimizer walks the flat arrays of parameters and gradients by a table of segments. Every number is updated by
itself, in the arrays' own type, so the walk may be cut anywhere without changing a bit. How the numbers of a segment
are updated is an `Arithmetic`'s business. With g the gradient times the scale of clipping, plus weight decay times p
where the segment decays:
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
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dpnn import config
from dpnn.native import address
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


class Arithmetic(Protocol):
    """How runs of n numbers of flat arrays are updated.

    Three have this form: `InNumPy` below in any type; in float32 the C kernels (`dpnn.native.Kernels`), and those of a
    device (`dpnn.backends.cuda.flat.Flat`). p are parameters, g gradients, m momentum (None: there is none), s squares:
        "descend", n, p, g, m, rate, scale, decay, momentum, nesterov
        "adagrad", n, p, g, s, rate, scale, decay, epsilon
        "blend", n, p, g, share                                        running statistics
    The C kernels have all three also as "descend_streamed" and so on, which store p past the caches; and as
    "descend_kept", which keep what they change: behind the other arguments stand the distance to where, the fronts, and
    how many of them there are (`Keeper`).
    """

    def bind(self, name: str, n: int, *arrays: Any) -> Callable[..., object]:
        """What updates a run of these arrays as `name` says: to be called with the numbers behind them, often."""
        ...

    def sum_of_squares(self, arrays: Iterable[Array]) -> float:
        """Of all numbers of some arrays, in float64."""
        ...


class Keeper(Protocol):
    """What keeps numbers before they are changed, to take that back (dpnn/comm/undo.py)."""

    distance: int
    fronts: Array

    def open(self, lo: int) -> None: ...
    def note(self, lo: int, hi: int) -> None: ...
    def keep(self, lo: int, hi: int) -> None: ...


class InNumPy:
    """The arithmetic in NumPy: in blocks that stay in the cache; the rank's threads each take a run of them."""

    def __init__(self, team: Team, dtype: np.dtype[Any]) -> None:
        self._team = team
        self._scratch = np.empty((team.size, 2, _BLOCK), dtype)
        self._wide = np.empty(_BLOCK, np.float64)

    def bind(self, name: str, n: int, *arrays: Any) -> Callable[..., object]:
        return partial(self._update, getattr(self, f"_{name}"), n, *arrays)

    def _update(self, update: Callable[..., None], n: int, *arguments: Any) -> None:
        runs = self._team.cut(n, least=_BLOCK)
        self._team.run([[partial(_in_blocks, update, run, self._scratch[i], arguments)] for i, run in enumerate(runs)])

    def sum_of_squares(self, arrays: Iterable[Array]) -> float:
        total = 0.0
        for array in arrays:
            for at in range(0, array.size, _BLOCK):
                wide = self._wide[: min(_BLOCK, array.size - at)]
                np.copyto(wide, array[at : at + wide.size])
                np.multiply(wide, wide, out=wide)
                total += float(np.add.reduce(wide))
        return total

    def _descend(
        self,
        scratch: Array,
        p: Array,
        g: Array,
        m: Array | None,
        rate: float,
        scale: float,
        decay: float,
        momentum: float,
        nesterov: bool,
    ) -> None:
        changed, work = scratch
        step = _scaled(p, g, scale, decay, scratch)
        if m is not None:
            np.multiply(m, momentum, out=m)
            np.add(m, step, out=m)
            if nesterov:
                np.multiply(m, momentum, out=work)
                step = np.add(step, work, out=changed)
            else:
                step = m
        np.multiply(step, rate, out=work)
        np.subtract(p, work, out=p)

    def _adagrad(
        self,
        scratch: Array,
        p: Array,
        g: Array,
        s: Array,
        rate: float,
        scale: float,
        decay: float,
        epsilon: float,
    ) -> None:
        changed, work = scratch
        step = _scaled(p, g, scale, decay, scratch)
        np.multiply(step, step, out=work)
        np.add(s, work, out=s)
        np.sqrt(s, out=work)
        np.add(work, epsilon, out=work)
        np.divide(step, work, out=changed)
        np.multiply(changed, rate, out=work)
        np.subtract(p, work, out=p)

    def _blend(self, scratch: Array, p: Array, g: Array, share: float) -> None:
        new = scratch[0]
        np.multiply(g, share, out=new)
        np.multiply(p, 1.0 - share, out=p)
        np.add(p, new, out=p)


def _in_blocks(update: Callable[..., None], run: range, scratch: Array, arguments: Iterable[Any]) -> None:
    """Update the numbers of a run, a block at a time; of the arguments those that are arrays are cut."""
    for at in range(run.start, run.stop, _BLOCK):
        end = min(at + _BLOCK, run.stop)
        update(scratch[:, : end - at], *(x[at:end] if isinstance(x, np.ndarray) else x for x in arguments))


def _scaled(p: Array, g: Array, scale: float, decay: float, scratch: Array) -> Array:
    """The gradient times the scale, plus the decay times p: g itself, or in the first array of scratch."""
    changed, work = scratch
    if scale != 1.0:
        g = np.multiply(g, scale, out=changed)
    if decay:
        np.multiply(p, decay, out=work)
        g = np.add(g, work, out=changed)
    return g


class _Run(NamedTuple):
    """Numbers [lo, hi), of one segment, and what updates them: `update`, called with rate, scale and the `numbers`.

    Where they are a `statistic`, it is called with the numbers alone.
    """

    lo: int
    hi: int
    update: Callable[..., object]
    statistic: bool
    numbers: list[float]


class Optimizer:
    """Updates `params` from `grads`, two flat arrays of n numbers that `segments` cover from 0 to n.

    `kernels` compute where the arrays are float32, else NumPy does. `state` holds what is kept from step to step, flat
    arrays as long as `params`, by the names in STATES. It is made where it isn't given; where arrays are a device's it
    has to be given. `keeper` keeps what is changed, on the host.
    """

    def __init__(
        self,
        options: config.Optimizer,
        segments: Iterable[Segment],
        params: Array,
        grads: Array,
        team: Team,
        kernels: Arithmetic | None = None,
        state: dict[str, Array] | None = None,
        keeper: Keeper | None = None,
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
        self._kept = next((self.state[name] for name in STATES[options.name]), None)
        compiled = kernels if params.dtype == np.float32 else None
        self._arithmetic: Arithmetic = compiled or InNumPy(team, params.dtype)
        self._keeper, self._compiled = keeper, compiled is not None
        self._bound: dict[tuple[int, int, bool], list[_Run]] = {}

    def apply(self, lo: int, hi: int, rate: float, scale: float = 1.0, streams: bool = False) -> None:
        """Update params[lo:hi]. `scale` multiplies the gradients (clipping); they are left as they are.

        `streams`: store past the caches, if kernels compute, the host's, and nothing is kept.
        """
        keeper = self._keeper
        for run in self._runs(lo, hi, streams):
            if keeper is not None and self._compiled:
                keeper.open(run.lo)
            elif keeper is not None:
                keeper.keep(run.lo, run.hi)
            if run.statistic:
                run.update(*run.numbers)
            else:
                run.update(rate, scale, *run.numbers)
            if keeper is not None and self._compiled:
                keeper.note(run.lo, run.hi)

    def _runs(self, lo: int, hi: int, streams: bool) -> list[_Run]:
        """What updates [lo, hi), segment by segment. It is made once: that takes as long as to update 100 KB."""
        runs = self._bound.get((lo, hi, streams))
        if runs is None:
            runs = self._bound[lo, hi, streams] = [self._bind(*piece, streams) for piece in self._pieces(lo, hi)]
        return runs

    def _bind(self, segment: Segment, lo: int, hi: int, streams: bool) -> _Run:
        options, arithmetic, keeper = self._options, self._arithmetic, self._keeper
        arrays: list[Array | None] = [self._params[lo:hi], self._grads[lo:hi]]
        name, numbers = "blend", [segment.statistic]
        if not segment.statistic:
            arrays.append(None if self._kept is None else self._kept[lo:hi])
            name, numbers = "descend", [options.weight_decay if segment.decay else 0.0]
            if options.name == "adagrad":
                name, numbers = "adagrad", [*numbers, _EPSILON]
            else:
                numbers += [options.momentum, options.nesterov]
        if self._compiled and keeper is not None:
            name, numbers = f"{name}_kept", [*numbers, keeper.distance, address(keeper.fronts), keeper.fronts.size // 2]
        elif self._compiled and streams:
            name = f"{name}_streamed"
        return _Run(lo, hi, arithmetic.bind(name, hi - lo, *arrays), bool(segment.statistic), numbers)

    def sum_of_squares(self, lo: int, hi: int) -> float:
        """Of the trained gradients in [lo, hi), added up in float64."""
        trained = ((start, end) for segment, start, end in self._pieces(lo, hi) if not segment.statistic)
        return self._arithmetic.sum_of_squares(self._grads[start:end] for start, end in trained)

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
