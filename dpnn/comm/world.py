"""All ranks of a job: how they meet, agree, and end together."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from fractions import Fraction
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from dpnn.comm import library
from dpnn.comm.alarm import ALARM
from dpnn.comm.faults import deadline, exit_code, message, started, tell
from dpnn.comm.losses import survives
from dpnn.comm.ranks import Ranks
from dpnn.comm.slots import shared_file
from dpnn.errors import DpnnError, RankError
from dpnn.machine import Limits, Share, core_limits, memory_limits, share

if TYPE_CHECKING:
    from mpi4py import MPI

_PATIENCE_S = 5.0
"""How long a rank that is to be ended by another waits before it ends itself."""
_CLAIM_S = 1.0
"""How long the file system may take to record why the job ends."""
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


class World(Ranks):
    """A communicator of all ranks, and the ways of ending on all of them.

    `comm` is a duplicate of the one it is made of, `rank` and `size` are its; `node` joins the ranks that share this
    one's memory, `limits` are what its ranks may take of it, `room` is this rank's share, in bytes. `claim(message,
    code)` decides which rank may say why the job ends, where ranks fail on their own, and may keep a record of it: to
    begin with, one of each node; a job with a folder that all nodes see replaces it by one that is exact over nodes.
    `numbers` are those that its ranks had when the job started.
    `post_mortem` is told beneath that where a rank failed: what the others were doing.

    As a context manager it ends the job on all ranks when the block raises, and else waits until all have left it.
    """

    def __init__(self, comm: "MPI.Comm", timeout_s: float) -> None:
        """Collective over `comm`, which has all ranks of the job."""
        super().__init__(comm, timeout_s)
        self.numbers = list(range(self.size))
        self.claim: Callable[[str, int], bool] = self._first_of_node
        self.lost = False
        """Whether a rank has died that the others do without."""
        self.post_mortem: Callable[[], str] | None = None
        self._claims = -1
        self._failing = threading.Lock()
        self._closed = False
        self._hooks = sys.excepthook, threading.excepthook
        try:
            self._gather(comm)
        except Exception as error:
            if self.size == 1:
                raise
            self.fail(error)  # the others wait for this rank

    def go_on(self, comm: "MPI.Comm", numbers: list[int]) -> None:
        """From here on the world is that of `comm`: other ranks of it have died. Collective over `comm`.

        `numbers`: of its ranks, as they were when the job started.
        """
        self.rank, self.size, self.numbers, self.lost = comm.rank, comm.size, numbers, True
        if self._claims >= 0:
            os.close(self._claims)
            self._claims = -1
        self._gather(comm)

    @property
    def number(self) -> int:
        """This rank's when the job started: messages call it so."""
        return self.numbers[self.rank]

    def _gather(self, comm: "MPI.Comm") -> None:
        """Meet all ranks of `comm`, and know what they may take of their node."""
        from mpi4py import MPI

        with deadline(self.timeout_s, f"meeting the other {self.size - 1} ranks", self.fail):
            self.comm = ALARM.wakes(comm.Dup())
            self.node: MPI.Comm = ALARM.wakes(self.comm.Split_type(MPI.COMM_TYPE_SHARED))
            self._claims = shared_file(self.node, os.O_RDWR | os.O_APPEND)
            mine = os.sched_getaffinity(0), core_limits(), memory_limits()
            cores, at_once, memory = zip(*self.node.allgather(mine), strict=True)
            self.limits: tuple[Limits, ...] = memory
            self.room: Share = share(memory, self.node.rank)
            own, busy = share_of_cores(cores, self.node.rank), share(at_once, self.node.rank).amount
            self._threads = max(1, int(min(own, busy)))

    def threads(self) -> int:
        """This rank's share of its node's cores, at least 1: a core that k ranks may run on counts as 1/k.

        Where a control group may keep fewer cores busy (a container's --cpus), its share of these.
        """
        return self._threads

    def fail(self, error: BaseException) -> NoReturn:
        """End the job on all ranks, with one message and the error's exit code. Any thread may call it.

        An error that all ranks agreed on is told by rank 0, any other by the rank that `claim` admits; who doesn't
        speak waits to be ended by the speaker.
        """
        code = exit_code(error)
        try:
            if not self._failing.acquire(blocking=False):
                time.sleep(2 * _PATIENCE_S)  # another thread of this rank is at it
            agreed = isinstance(error, DpnnError) and error.agreed
            text = message(error, None if agreed or self.size == 1 else self.number)
            mine = self.rank == 0 or not agreed
            if mine and (self._claim(text, code) or agreed):
                tell(text)
                if isinstance(error, RankError) and not agreed and self.post_mortem is not None:
                    with suppress(Exception):  # it mustn't keep this rank from ending the job
                        tell(self.post_mortem())
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
        """Wait until every rank is here, so that none leaves while another still counts on it. Twice is harmless.

        Where a rank has died that the others do without, this ends the process: MPI can't be left in good order.
        """
        if not self._closed:
            for stream in (sys.stdout, sys.stderr):  # where one dies meanwhile, all may be ended
                with suppress(Exception):
                    stream.flush()
            if self.lost or not self._meets():
                os._exit(0)  # any other code would make the launcher end those who aren't here yet
            self._closed = True
            sys.excepthook, threading.excepthook = self._hooks
            atexit.unregister(self._leave)
            if self._claims >= 0:
                os.close(self._claims)

    def _meets(self) -> bool:
        """Whether all have come here; False where one has died that the others do without."""
        try:
            self.meet()
        except RankError:
            if not survives():
                raise
            self.comm.Revoke()  # so that nobody waits for those who know
            return False
        return True

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
        """Ask `claim`; where it fails, or a dead file system holds it, the node. Better told twice than not at all."""
        for claim in (self.claim, self._first_of_node):
            with suppress(Exception):
                return started(partial(claim, text, code)).result(_CLAIM_S)
        return True

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


def share_of_cores(cores: Sequence[AbstractSet[int]], rank: int) -> int:
    """How many threads `rank` of a node gets, where cores[r] are those that rank r may run on: at least 1."""
    parts = (Fraction(1, sum(core in others for others in cores)) for core in cores[rank])
    return max(1, int(sum(parts, Fraction())))
