"""Devices of several ranks that sum among themselves: NCCL, as CuPy brings it."""

import warnings
from contextlib import AbstractContextManager
from typing import Any

from dpnn.memory import Array


def installed() -> bool:
    """Whether it is there."""
    return bool(_nccl().available)


def ident() -> bytes:
    """A name for a new group; empty where NCCL isn't installed, or finds no network."""
    try:
        return bytes(_nccl().get_unique_id()) if installed() else b""
    except RuntimeError:
        return b""


class Ring:
    """This device in a group of them. Sums have a queue of their own, so that kernels go on meanwhile."""

    def __init__(
        self, cuda: Any, queue: Any, failing: AbstractContextManager[None], ident: bytes, size: int, rank: int
    ) -> None:
        """Collective. `cuda`: CuPy's; `queue`: the stream of this device's kernels; `failing`: names it in errors."""
        self._cuda, self._queue, self._nccl, self._failing = cuda, queue, _nccl(), failing
        self._sums = cuda.Stream(non_blocking=True)
        self._ring = self._nccl.NcclCommunicator(size, ident, rank)

    def sum(self, array: Array) -> None:
        """Sum a float32 array, contiguous, once all is computed that was asked for so far."""
        address: Any = array.data
        kind, add = self._nccl.NCCL_FLOAT32, self._nccl.NCCL_SUM
        with self._failing:
            self._after(self._sums, self._queue)
            self._ring.allReduce(address.ptr, address.ptr, array.size, kind, add, self._sums.ptr)

    def join(self) -> None:
        """Kernels from now on come after all sums."""
        with self._failing:
            self._after(self._queue, self._sums)

    def _after(self, later: Any, earlier: Any) -> None:
        event = self._cuda.Event(disable_timing=True)
        event.record(earlier)
        later.wait_event(event)


def _nccl() -> Any:
    """CuPy's module, which isn't there before it is imported; where there is no NCCL, that warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return nccl
