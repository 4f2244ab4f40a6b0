"""All ranks of a job: how they meet, agree, and end together."""

import atexit
import os
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

import numpy as np

from dpnn.comm import library
from dpnn.comm.faults import deadline, exit_code, message, tell, wait
from dpnn.errors import DpnnError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

_PATIENCE_S = 5.0
"""How long a rank that is to be ended by another waits before it ends itself."""
_READ_S = 0.25
"""How long mpirun has to read the message: Open MPI's forgets what is still in the pipe when a rank aborts."""


def start(timeout_s: float = 300.0) -> "World":
    """Initialise MPI and meet the other ranks. From here on an uncaught exception in any thread ends the whole job.

    `timeout_s`: how long a rank waits for another. JobError where there is no MPI library, or where the launcher
    doesn't belong to it (dpnn/comm/library.py).
    """
    world = World(library.load().COMM_WORLD, timeout_s)
    world.guard()
    return world


def run(command: Callable[["World"], int], timeout_s: float = 300.0) -> int:
    """What `command` returns, called on the world that all ranks meet in; they also leave together.

    Where it raises, the job ends on all ranks, as World says; a process that is alone raises.
    """
    with start(timeout_s) as world:
        return command(world)


class World:
    """A communicator of all ranks, and the ways of ending on all of them.

    `comm` is a duplicate of the one it is made of, `rank` and `size` are its; `node` joins the ranks that share this
    one's memory; `timeout_s` is how long a rank waits for another, and may be changed. `claim(message, code)` decides
    which rank may say why the job ends, where ranks fail on their own, and may keep a record of it: to begin with, one
    of each node; a job with a folder that all nodes see replaces it by one that is exact over nodes.

    As a context manager it ends the job on all ranks when the block raises, and else waits until all have left it.
    """

    def __init__(self, comm: "MPI.Comm", timeout_s: float) -> None:
        """Collective over `comm`, which has all ranks of the job."""
        from mpi4py import MPI

        self.rank, self.size, self.timeout_s = comm.rank, comm.size, timeout_s
        self.claim: Callable[[str, int], bool] = self._first_of_node
        self._claims = -1
        self._failing = threading.Lock()
        self._agreed: DpnnError | None = None
        self._closed = False
        self._hooks = sys.excepthook, threading.excepthook
        try:
            with deadline(timeout_s, f"meeting the other {self.size - 1} ranks", self.fail):
                self.comm: MPI.Comm = comm.Dup()
                self.node: MPI.Comm = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
                self._claims = self._open_claims()
                self._threads = share_of_cores(self.node.allgather(os.sched_getaffinity(0)), self.node.rank)
        except Exception as error:
            if self.size == 1:
                raise
            self.fail(error)  # the others wait for this rank

    def threads(self) -> int:
        """This rank's share of its node's cores, at least 1: a core that k ranks may run on counts as 1/k."""
        return self._threads

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank (pickled: for set-up only). Collective.

        Where `make` raises a DpnnError, every rank raises it.
        """
        value: T | None = None
        refused: DpnnError | None = None
        if self.rank == 0:
            try:
                value = make()
            except DpnnError as error:
                refused = error
        value, refused = self._broadcast((value, refused), 0, self.timeout_s)
        if refused is not None:
            self._raise_agreed(refused)
        return value

    def agree(self, error: DpnnError | None) -> None:
        """Raise the error of the lowest rank that brings one, on every rank. Collective."""
        from mpi4py import MPI

        lowest = np.array([self.size if error is None else self.rank])
        self._wait(self.comm.Iallreduce(MPI.IN_PLACE, lowest, MPI.MIN), self.timeout_s)
        if lowest[0] < self.size:
            told: DpnnError = self._broadcast(error, int(lowest[0]), self.timeout_s)
            self._raise_agreed(told if self.size == 1 else type(told)(f"rank {lowest[0]}: {told}"))

    def fail(self, error: BaseException) -> NoReturn:
        """End the job on all ranks, with one message and the error's exit code. Any thread may call it.

        An error that all ranks agreed on is told by rank 0, any other by the rank that `claim` admits; who doesn't
        speak waits to be ended by the speaker.
        """
        code = exit_code(error)
        try:
            if not self._failing.acquire(blocking=False):
                time.sleep(2 * _PATIENCE_S)  # another thread of this rank is at it
            agreed = error is self._agreed
            text = message(error, None if agreed or self.size == 1 else self.rank)
            mine = self.rank == 0 or not agreed
            if mine and (self._claim(text, code) or agreed):
                tell(text)
                time.sleep(_READ_S)
            else:
                time.sleep(_PATIENCE_S)
            self._abort(code)
        finally:
            # Whatever happened above (a second Ctrl-C, a broken claim): the process ends, and its launcher sees it.
            os._exit(code)

    def guard(self) -> None:
        """From here to `close` no thread of this rank dies in silence, and no rank leaves while others work."""
        sys.excepthook = lambda _, error, __: self.fail(error)
        threading.excepthook = self._thread_died
        atexit.register(self._leave)

    def close(self) -> None:
        """Wait until every rank is here, so that none leaves while another still counts on it. Twice is harmless."""
        if not self._closed:
            self._wait(self.comm.Ibarrier(), self.timeout_s)
            self._closed = True
            sys.excepthook, threading.excepthook = self._hooks
            atexit.unregister(self._leave)
            if self._claims >= 0:
                os.close(self._claims)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and exit_code(error) != 0:
            if self.size > 1:
                self.fail(error)
            self._claim(message(error), exit_code(error))  # alone: kept, and the exception goes its way
        self._leave()

    def _leave(self) -> None:
        try:
            self.close()
        except DpnnError as error:
            self.fail(error)

    def _thread_died(self, args: "threading.ExceptHookArgs") -> None:
        error = args.exc_value or args.exc_type()
        if exit_code(error) != 0:  # sys.exit() is a thread's way to end itself
            self.fail(error)

    def _claim(self, text: str, code: int) -> bool:
        try:
            return self.claim(text, code)
        except Exception:  # better told twice than not at all
            return True

    def _open_claims(self) -> int:
        """A file that the ranks of this node share, already without a name, so that nobody is left to remove it.

        -1 where the folder for temporary files can't be written; then every rank may speak.
        """
        name, descriptor = "", -1
        if self.node.rank == 0:
            with suppress(OSError):
                made, name = tempfile.mkstemp(prefix="dpnn-")
                os.close(made)
        name = self.node.bcast(name)
        with suppress(OSError):
            descriptor = os.open(name, os.O_RDWR | os.O_APPEND)
        self.node.barrier()
        if self.node.rank == 0:
            with suppress(OSError):
                os.unlink(name)
        return descriptor

    def _first_of_node(self, text: str, code: int) -> bool:
        """Whether no other rank of this node asked before, also one that is dead by now: who asks appends its number,
        which Linux does in one piece, and the first number is the one that counts."""
        mine = self.rank.to_bytes(4, "little")
        os.write(self._claims, mine)
        return os.pread(self._claims, 4, 0) == mine

    def _abort(self, code: int) -> None:
        from mpi4py import MPI

        mine = threading.current_thread() is threading.main_thread()
        if self.size > 1 and not MPI.Is_finalized() and (mine or MPI.Query_thread() == MPI.THREAD_MULTIPLE):
            last = threading.Timer(_PATIENCE_S, os._exit, [code])  # where MPI is too broken even to abort
            last.daemon = True
            last.start()
            MPI.COMM_WORLD.Abort(code)

    def _raise_agreed(self, error: DpnnError) -> NoReturn:
        self._agreed = error
        raise error

    def _broadcast(self, value: Any, root: int, limit_s: float) -> Any:
        """`value` of rank `root`, on every rank: the length of its pickle, then the pickle, neither blocking."""
        pickled = bytearray(pickle.dumps(value) if self.rank == root else b"")
        length = np.array([len(pickled)])
        self._wait(self.comm.Ibcast(length, root), limit_s)
        pickled = pickled or bytearray(int(length[0]))
        self._wait(self.comm.Ibcast(pickled, root), limit_s)
        return value if self.rank == root else pickle.loads(pickled)

    def _wait(self, request: "MPI.Request", limit_s: float) -> None:
        wait(request.Test, f"the other {self.size - 1} ranks", limit_s)


def share_of_cores(cores: Sequence[AbstractSet[int]], rank: int) -> int:
    """How many threads `rank` of a node gets, where cores[r] are those that rank r may run on: at least 1."""
    parts = (Fraction(1, sum(core in others for others in cores)) for core in cores[rank])
    return max(1, int(sum(parts, Fraction())))
