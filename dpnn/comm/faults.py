"""Waiting for other ranks, and what a rank says when it fails.

Every wait of dpnn is `wait`; every blocking call to MPI (set-up only) stands in `deadline`. Neither can last for ever:
a dead or silent rank becomes a RankError here, which ends the job on all ranks.
"""

import _thread
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from dpnn.comm.alarm import ALARM
from dpnn.comm.pulse import PULSE
from dpnn.errors import DpnnError, RankError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

_EAGER_S = 1e-3
"""How long a wait only gives way to other processes: most answers come within it."""
_NAP_S = 50e-6
"""Then it sleeps between two looks, so that a waiting rank leaves its core to one that computes."""
_LONG_S, _LONG_NAP_S = 1.0, 1e-3

_FRAMES = 6
"""How many frames of a traceback a failing rank shows: the innermost."""


def wait(test: Callable[[], object], whom: str, limit_s: float, naps: bool = True) -> None:
    """Call `test` until it is true (an MPI request's Test, which is also what makes MPI progress).

    `whom` completes the sentence "waited for ...". `naps`: whether it sleeps between two calls, where that takes long.
    RankError where `limit_s` seconds pass, or MPI reports an error; RankLost where a rank has died that the others can
    do without.
    """
    begin = time.monotonic()
    while not tested(test, whom):
        if time.monotonic() - begin > _EAGER_S:
            with PULSE.waiting(whom, begin):
                _wait_long(test, whom, limit_s, begin, naps)
            return
        os.sched_yield()


def _wait_long(test: Callable[[], object], whom: str, limit_s: float, begin: float, naps: bool) -> None:
    """The rest of a wait that began at `begin`."""
    while not tested(test, whom):
        waited = time.monotonic() - begin
        if waited > limit_s:
            raise given_up(limit_s, whom)
        ALARM.look()
        if naps:
            time.sleep(_NAP_S if waited < _LONG_S else _LONG_NAP_S)
        else:
            os.sched_yield()


def given_up(limit_s: float, whom: str) -> RankError:
    """What a rank raises that has waited for too long."""
    return RankError(
        f"waited {limit_s:g} s for {whom}: a rank has stopped, or is that much slower than this one; "
        "if all ranks are well, raise parallel.stall_abort_s"
    )


def within(limit_s: float, whom: str, call: Callable[[], T]) -> T:
    """What a call returns that blocks and can't be told to give up; meanwhile it runs in a thread of its own.

    RankError where it takes longer than `limit_s` seconds; `whom` completes "waited for ...".
    """
    result = started(call)
    wait(result.done, whom, limit_s)
    return result.result()


def started(call: Callable[[], T]) -> Future[T]:
    """A call that goes on in a thread of its own, which doesn't keep the process from ending."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    _thread.start_new_thread(run, ())  # Thread.start waits until the thread runs
    return result


def duplicate(comm: "MPI.Comm", whom: str, limit_s: float) -> "MPI.Comm":
    """A duplicate of a communicator. Collective; RankError where that takes longer than `limit_s` seconds.

    One at a time: Open MPI 5 hangs now and then where a rank has several on their way. All meet before, and nobody
    naps: where a rank dies between two looks at what is nearly made, Open MPI 5.0.11 ends all others by SIGSEGV.
    """
    wait(comm.Ibarrier().Test, whom, limit_s)
    copy, request = comm.Idup()
    wait(request.Test, whom, limit_s, naps=False)
    return copy


def poke(comm: "MPI.Comm") -> None:
    """Let MPI move what is under way."""
    comm.Iprobe(comm.rank)  # from any rank it would be an error where one has died


def tested(test: Callable[[], object], whom: str) -> bool:
    """One call of `test`; an error that MPI reports in it becomes a RankError."""
    try:
        return bool(test())
    except RuntimeError as error:
        _raise_named(error, f"waiting for {whom}")
        raise


@contextmanager
def reported(doing: str) -> Iterator[None]:
    """An error that MPI reports in the block becomes a RankError; `doing` completes "while ..."."""
    try:
        yield
    except RuntimeError as error:
        _raise_named(error, doing)
        raise


def _raise_named(error: RuntimeError, doing: str) -> None:
    """RankError where it is one of MPI's."""
    from mpi4py import MPI

    if isinstance(error, MPI.Exception):
        raise RankError(f"while {doing}, MPI reported: {error.Get_error_string()}") from error


@contextmanager
def deadline(limit_s: float, what: str, fail: Callable[[RankError], object]) -> Iterator[None]:
    """Bound the blocking MPI calls of the block: past `limit_s` seconds a thread calls `fail` with a RankError.

    MPI can't be told to give up a blocking call, so `fail` has to end the process, as World.fail does.
    """
    done = threading.Event()

    def watch() -> None:
        if not done.wait(limit_s):
            fail(RankError(f"{what} took more than {limit_s:g} s: a rank has stopped, or never came"))

    watcher = threading.Thread(target=watch, name="dpnn-deadline", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def exit_code(error: BaseException) -> int:
    """The code that `error` ends a process with: what dpnn/errors.py says, 130 for Ctrl-C, 1 for the unforeseen."""
    if isinstance(error, DpnnError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def message(error: BaseException, rank: int | None = None) -> str:
    """The one message of a job that ends by `error`, naming the rank that met it if it isn't None.

    An error that dpnn raised on purpose speaks for itself; any other shows its innermost frames.
    """
    frames = ""
    if isinstance(error, DpnnError):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted (SIGINT)"
    elif isinstance(error, SystemExit):
        text = f"ended by sys.exit({error.code!r}) while the job was running"
    else:
        text = "".join(traceback.format_exception_only(error)).rstrip()
        if isinstance(error, MemoryError):
            text = f"out of memory ({text}): use fewer ranks a node, a smaller batch, or more parallel.microbatches"
        frames = "\n" + "".join(traceback.format_tb(error.__traceback__, limit=-_FRAMES)).rstrip()
    return f"dpnn: {'' if rank is None else f'rank {rank}: '}{text}{frames.rstrip()}"


def tell(text: str) -> None:
    """Write `text` and a newline to stderr, after all that was printed before, in one piece: ranks share the pipe."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # a closed pipe must not keep a rank from ending the job
            stream.flush()
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))
