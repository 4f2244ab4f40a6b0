"""A worker's links to all that hold shards of its parameters, and what it does where one of them dies.

It turns to who holds the shards then (holders.py), says hello, hears how many of its pushes have arrived, and goes on
from there: pushes that it still has are sent again, of others it sends the numbers, and what was asked for and not
answered is asked again. A push has a number, so none is applied twice.
"""

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from dpnn.comm.faults import tested, wait
from dpnn.comm.losses import Losses
from dpnn.errors import RankError
from dpnn.strategies.downpour.holders import Holders
from dpnn.strategies.downpour.link import Link
from dpnn.strategies.downpour.parts import Alone
from dpnn.strategies.downpour.protocol import Answer, Array, Kind, Request

if TYPE_CHECKING:
    from mpi4py import MPI

_TICK_S = 1.0


class Links:
    """To the holders of the shards `held`: numbers [lo, hi) of `params`, by the shard.

    Gradients are pushed from `sets`, in turn. `workers`: ranks of `comm` that train; servers are behind them.
    `mirrored`: whether shards outlive them. `parts`: of the replica.
    """

    def __init__(
        self,
        comm: "MPI.Comm",
        workers: int,
        held: Mapping[int, tuple[int, int]],
        params: Array,
        sets: Sequence[Array],
        mirrored: bool,
        parts: Alone,
        limit_s: float,
    ) -> None:
        self._workers, self._parts, self._limit_s = workers, parts, limit_s
        self.holders, self._losses = Holders(comm.size - workers, mirrored), Losses(comm)
        self._sets = sets
        self._holds = [0] * len(sets)
        """The push that a set has, counted from 1; 0: it is written to."""
        self.unserved, self._ticked = False, 0.0
        """`unserved`: whether this rank waits for a server, to the end where that is in vain."""
        self.pushes = self.leases = 0
        """Pushes that were sent; leases that were given."""
        self._asks = self._left = self._over = self._parted = False
        """Whether an answer is awaited to who asks for work; what the servers have been told."""
        self._all = [Link(comm, shard, workers + shard, lo, hi, params, sets) for shard, (lo, hi) in held.items()]

    def wait(self, test: Callable[[], object], whom: str) -> None:
        """As faults.wait, but that it goes on where a server has died.

        RankError also where a shard is nobody's any more, or another part of this replica has died, whom no server
        answers.
        """

        def looked() -> object:
            self.unserved = False
            if not self._parted:  # who has parted ends
                self._parts.check()
            self.look()
            self.tick(works=False)
            self.unserved = True
            return test()

        if not tested(test, whom):  # else there is nothing to wait for, and nothing to look for
            wait(looked, whom, self._limit_s)
            self.unserved = False

    def tick(self, works: bool) -> None:
        """Give a sign of life, if it is time: this rank works, or waits for others.

        RankError where this rank counts as dead all the same.
        """
        now = monotonic()
        if now - self._ticked < _TICK_S or self._parted:
            return
        self._ticked = now
        if not all(link.live(works) for link in self._all):
            raise RankError("the servers count this rank as dead, since it said nothing for parallel.silence_s")

    def look(self) -> None:
        """See which servers have died, and turn to those that hold their shards now."""
        dead = [rank - self._workers for rank in self._losses.new() if rank >= self._workers]
        if not self._losses.tells:
            dead = [link.rank - self._workers for link in self._all if link.dead]
        if self.holders.dead.issuperset(dead):
            return
        self.holders.dead.update(dead)
        for link in self._all:
            if link.rank - self._workers in self.holders.dead:
                link.hang_up()
                link.dead = True
                if not self._parted:
                    self._turn_over(link)

    def writes(self, which: int) -> None:
        """A set is going to be written to. Those that are one and the same array are so at once."""
        for other, gradients in enumerate(self._sets):
            if gradients is self._sets[which]:
                self._holds[other] = 0

    def push(self, which: int, push: Request, bases: Sequence[int]) -> None:
        """Push from a set, to each shard with its own base; where that fetches too, receive the parameters."""
        self.pushes += 1
        self._holds[which] = self.pushes
        for link, base in zip(self._all, bases, strict=True):
            numbered = push._replace(number=self.pushes, base=base)
            link.history.append(numbered)
            link.push(which, numbered)
            if push.fetch:
                link.expect()

    def have_left(self, which: int) -> bool:
        """Whether what was pushed from a set has been sent."""
        return all(link.has_left(which) or (self._parted and link.dead) for link in self._all)

    def fetch(self, stop: bool) -> None:
        """Ask for all parameters."""
        for link in self._all:
            link.expect()
            link.ask(Request(Kind.FETCH, stop=stop))

    def have_come(self) -> bool:
        """Whether all parameters are there that were asked for."""
        return all(link.has_come() for link in self._all)

    @property
    def answers(self) -> list[Answer]:
        """What was said of the last parameters, shard by shard."""
        return [link.answer for link in self._all]

    def ask_for_work(self, stop: bool) -> bytearray:
        """What the first server says to who asks for work, once it does."""
        self._asks = True
        self._ask_for_work(self._all[0], stop)
        self.wait(self._all[0].hears, "the first server to answer")
        self._asks = False
        return self._all[0].said.bytes

    def tell(self, kind: Kind, stop: bool) -> None:
        """Tell all servers something that isn't answered; of the end of the run only the first one."""
        self._left, self._over = self._left or kind == Kind.LEAVE, self._over or kind == Kind.OVER
        for link in self._all[:1] if kind == Kind.OVER else self._all:
            link.ask(Request(kind, stop=stop))

    def part(self) -> None:
        """Tell all servers that they will be asked for nothing more, and return when those that live have heard."""
        self._parted = True
        for link in self._all:
            link.ask_to_hear(Request(Kind.PART))
        self.wait(
            lambda: all(link.dead or (link.hears() and link.silent) for link in self._all),
            "the servers to hear of this replica",
        )

    def _ask_for_work(self, link: Link, stop: bool) -> None:
        link.ask_to_hear(Request(Kind.LEASE, stop=stop, number=self.leases))

    def _turn_over(self, link: Link) -> None:
        """Go on with who holds a shard now."""
        rank = self._workers + self.holders.of(link.number)
        link.connect(rank)
        link.ask_to_hear(Request(Kind.HELLO))
        self.wait(lambda: link.rank != rank or link.hears(), "a server to take over from one that has died")
        if link.rank != rank:  # that one has died meanwhile, and it has all been done with another
            return
        arrived = link.said.read().pushes
        if link.history and link.history[0].number > arrived + 1:
            raise RankError(
                f"with server {link.number} more pushes were lost than are remembered, from {arrived + 1} to "
                f"{link.history[0].number - 1}; go on from the last checkpoint with --resume"
            )
        for push in link.history:
            if push.number > arrived:
                self._push_again(link, push)
        if link.coming:
            link.expect()
            link.ask(Request(Kind.FETCH))
        if self._left:
            link.ask(Request(Kind.LEAVE))
        if link is self._all[0]:
            if self._over:
                link.ask(Request(Kind.OVER))
            if self._asks:
                self._ask_for_work(link, stop=False)

    def _push_again(self, link: Link, push: Request) -> None:
        """A push that hasn't arrived: as far as it is still there. A fetch with it is asked for by itself."""
        again = push._replace(fetch=False)
        if push.number in self._holds:
            link.push(self._holds.index(push.number), again)
        else:
            link.ask(again._replace(kind=Kind.SKIP))
