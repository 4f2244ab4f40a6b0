"""A replica's side of Downpour SGD: the strategy that its executor calls.

Gradients are added up over `n_push` steps and sent off; parameters are asked for every `n_fetch` steps and installed
`fetch_ahead` steps later; in between the replica takes steps of its own (Dean et al. 2012, algorithm 7.1). It waits for
parameters that aren't there when they are due, and for a push that hasn't left when the next but one is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING

import numpy as np

from dpnn import config
from dpnn.comm.faults import poke, wait
from dpnn.comm.pulse import PULSE
from dpnn.data import Run
from dpnn.errors import NotFiniteError, RankError
from dpnn.optim import Optimizer
from dpnn.strategies.downpour.life import Life
from dpnn.strategies.downpour.parts import Alone, Note
from dpnn.strategies.downpour.protocol import Answer, Array, Kind, Lease, Letter, Request, Tag, pieces, shards

if TYPE_CHECKING:
    from mpi4py import MPI

_ASK_AGAIN_S, _ASK_AGAIN_SHARE, _ASK_AGAIN_MOST_S = 0.01, 0.1, 0.5
"""How long who has to wait waits before it asks again: a share of the time that it has waited."""


class _Push:
    """One of two sets of what is being sent: gradients, and for each server a request."""

    def __init__(self, comm: "MPI.Comm", gradients: Array, to: Sequence[tuple[int, int, int]]) -> None:
        self.gradients = gradients
        self.requests = [Letter(Request) for _ in to]
        self.sends: list[MPI.Prequest] = []
        for request, (server, lo, hi) in zip(self.requests, to, strict=True):
            self.sends.append(comm.Send_init(request.bytes, server, Tag.REQUEST))
            self.sends.append(comm.Send_init(gradients[lo:hi], server, Tag.GRADIENTS))


class Worker:
    """Fetches and pushes `params` and `grads`, flat arrays, of which the servers behind the workers hold a shard each.

    `local` updates `params` by `grads`: plain SGD. `n_trained`: the numbers from there on are running statistics.
    Where the replica is spread over several `parts`, `held` says of those servers that hold a shard of this one's
    arrays which numbers [lo, hi) it is, by their ranks in `comm`; what is collective is so over the parts.
    """

    together = False

    def __init__(
        self,
        comm: "MPI.Comm",
        workers: int,
        params: Array,
        grads: Array,
        n_trained: int,
        local: Optimizer,
        job: config.Job,
        parts: Alone | None = None,
        held: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self._options, self._limit_s = MPI, comm, job.parallel, job.parallel.stall_abort_s
        self._params, self._grads, self._local, self._n_trained = params, grads, local, n_trained
        self._clips = job.optimizer.clip > 0
        self._parts = parts or Alone()
        self.rate, self.loss, self.samples, self.skipped = 0.0, 0.0, 0, 0
        self.wait_s = self.update_s = 0.0
        self.asked = self.stop = False
        """Whether this replica was asked to stop; whether the servers say that the run stops, as all its parts know."""
        self._heard = False
        """Whether they say so to this part."""
        self.known = Answer()
        """The last answer of the first server to a fetch: what is known of the run as a whole."""
        self.speaker = self.lost = 0
        """The replica that speaks for the run; replicas that have died: as all parts knew when one last asked."""
        self.steps = 0
        """Of all replicas, as far as the part that asks for work knew them in the last step."""
        held = held or dict(enumerate(shards(params.size, comm.size - workers), workers))
        self._shards = [(server, lo, hi) for server, (lo, hi) in held.items()]
        servers = len(held)
        options = self._options
        self._in_step = options.n_push == options.n_fetch == 1 and options.fetch_ahead == 0
        """Whether every step waits for parameters that have its last push in them: then nothing has to be copied."""
        self._sets = [_Push(comm, grads if self._in_step else np.zeros_like(grads), self._shards) for _ in range(2)]
        self._asks = {kind: [Letter(Request) for _ in range(servers)] for kind in Kind}
        self._sent: dict[tuple[Kind, int], MPI.Request] = {}
        """The last request of a kind to a server."""
        self.life = Life(comm, list(held))
        self._fetched = np.empty_like(params) if options.fetch_ahead else params
        """Where parameters arrive. Only those that aren't waited for at once need a place of their own."""
        self._answers = [Letter(Answer) for _ in range(servers)]
        self._leased = Letter(Answer)
        self._arrivals: list[MPI.Prequest] = []
        for answer, (server, lo, hi) in zip(self._answers, self._shards, strict=True):
            shard = self._fetched[lo:hi]
            self._arrivals.append(comm.Recv_init(answer.bytes, server, Tag.ANSWER))
            self._arrivals += [comm.Recv_init(shard[a:b], server, Tag.PARAMS) for a, b in pieces(hi - lo)]
        self._coming = False
        """Whether parameters were asked for and have not been installed."""
        self._asked, self._due = -1, 0
        """The steps before which parameters were last asked for, and are installed."""
        self._versions = self._base = [0] * servers
        """Versions of the parameters now, and when the first step of the next push was computed."""
        self._step = self._pushes = 0
        self._steps, self._samples, self._loss, self._bad = 0, 0, 0.0, 0
        """Of the next push."""
        self._waited = 0.0

    # What the executor calls.

    def begin(self) -> None:
        """Install the parameters that are due, and ask for the next ones."""
        if self._coming and self._step == self._due:
            self._install()
        if self._fetches():
            self._expect()
            self._send(Kind.FETCH, self._shards)
            if self._step == self._due:
                self._install()
        if self._steps == 0:
            self._base = self._versions

    def open(self, lo: int, hi: int) -> None:
        """Return when nobody reads the gradients of the last step any more."""
        if self._in_step:
            self._see_off(self._sets[1 - self._pushes % 2])

    def ready(self, lo: int, hi: int) -> None:
        """They are used in `finish`."""

    def poke(self) -> None:
        """Let MPI move; a step may take longer than the servers wait for a word."""
        poke(self._comm)
        self.tick()

    def tell(self, loss: float) -> None:
        """Tell the other parts the loss, this one's share of the mean over the samples, and what it has heard."""
        self._parts.tell(Note(loss, self._heard, self.asked, self.known.steps))

    def finish(self) -> None:
        """Add the gradients to the next push, and send it off if it is time; take a step of one's own.

        NotFiniteError, on all parts, where the loss isn't finite.
        """
        start, before = perf_counter(), self._waited
        self._hear()
        if not math.isfinite(self.loss):
            raise NotFiniteError(f"the loss is {self.loss}")
        scale = self._clip_scale() if self._clips else 1.0
        push = self._sets[self._pushes % 2]
        if self._steps == 0:
            self._see_off(push)
        self._add(push.gradients, scale)
        if not self._installs_next():
            self._local.apply(0, self._n_trained, self.rate, scale)
        self._steps += 1
        self._samples += self.samples
        self._loss += self.loss * self.samples
        self._bad += self.skipped
        self._step += 1
        if self._steps == self._options.n_push:
            self._push()
        self.update_s = perf_counter() - start - (self._waited - before)
        self.wait_s, self._waited = self._waited, 0.0

    # What the run calls.

    def join(self) -> None:
        """Take the newest parameters, waiting for them: before the first step, and before they are looked at.

        Collective: when it returns, all parts have theirs.
        """
        if self._coming:
            self._install()
        self._expect()
        self._send(Kind.FETCH, self._shards)
        self._install()
        self._parts.tell(Note(0.0, self._heard, self.asked, self.known.steps))
        self._hear()
        self._asked = -1  # the next step asks for newer ones
        self._waited = 0.0  # that was no part of a step

    def lease(self, busy: bool = False) -> Run | None:
        """More to do, or None: there is no more, or, where this replica is `busy` with other leases, not yet.

        What others have leased may come back, where they die. So who isn't busy then pushes what it has, and waits
        until they are done. RankError where they don't go on. Collective.
        """
        answer = self._ask_until(lambda answer: True)
        if answer.lease == Lease.WAIT and not busy:
            if self._steps:
                self._push()
            answer = self._ask_until(lambda answer: answer.lease != Lease.WAIT)
        self.stop = self._heard = self.stop or bool(answer.stop)
        if answer.lease != Lease.LANE:
            return None
        return Run(answer.epoch, range(answer.lane, answer.lane + 1), answer.first, answer.last)

    def leave(self) -> None:
        """Push what is left; no more will come. Collective."""
        if self._steps:
            self._push()
        self.join()  # what is answered now has all pushes of this replica
        self._send(Kind.LEAVE, self._shards)

    def await_others(self) -> None:
        """Return when all replicas have left. RankError where the others don't go on. Collective."""
        self._ask_until(lambda answer: answer.left == 0)

    def await_end(self, replica: int) -> Answer:
        """Return when the run is over, or this replica, which is `replica`, is to speak for it. Collective."""
        return self._ask_until(lambda answer: bool(answer.over) or answer.speaker == replica)

    def await_checkpoint(self) -> None:
        """Return when the last checkpoint is written. Collective."""
        self._ask_until(lambda answer: bool(answer.written))

    def tick(self) -> None:
        """This replica is alive, though it asks for nothing: to be called now and then while it is.

        RankError where the servers count it as dead.
        """
        self.life.tick()

    def end(self) -> None:
        """The run is over, says this replica, which speaks for it."""
        if self._parts.asks:
            self._send(Kind.OVER, self._shards[:1])

    def part(self) -> None:
        """Ask the servers for nothing any more, and return when all that was sent has been received."""
        self._send(Kind.PART, self._shards)
        signs = self.life.end()
        for push in self._sets:
            self._see_off(push)
        for request in (*self._sent.values(), *signs):
            self._wait(request.Test, "the servers to hear of this replica")

    def _ask_until(self, enough: Callable[[Answer], bool]) -> Answer:
        """The first answer that is enough. RankError where the run doesn't go on meanwhile.

        One part asks, all hear the answers: so all find the same.
        """
        answer = self._ask()
        while not enough(answer):
            answer = self._ask_until_others_move(enough, answer)
        return answer

    def _ask_until_others_move(self, enough: Callable[[Answer], bool], last: Answer) -> Answer:
        """The first answer that is enough, or that tells of a replica that has pushed, or said that it is alive."""
        begin, answer = monotonic(), last
        with PULSE.waiting("the other replicas to push something", begin):
            while not enough(answer) and answer.steps + answer.alive == last.steps + last.alive:
                if monotonic() - begin > self._limit_s:
                    raise RankError(
                        f"no replica has pushed anything for {self._limit_s:g} s, and this one waits for them: a rank "
                        "has stopped, or a step takes longer; if all ranks are well, raise parallel.stall_abort_s"
                    )
                sleep(min(_ASK_AGAIN_S + _ASK_AGAIN_SHARE * (monotonic() - begin), _ASK_AGAIN_MOST_S))
                answer = self._ask()
        return answer

    def _ask(self) -> Answer:
        """What the first server says to who asks for work. Collective over the parts."""
        if self._parts.asks:
            coming = self._comm.Irecv(self._leased.bytes, self._shards[0][0], Tag.LEASED)
            self._send(Kind.LEASE, self._shards[:1])
            self._wait(coming.Test, "the first server to answer")
        self._parts.share(self._leased.bytes)
        answer = self._leased.read()
        self.speaker, self.lost = answer.speaker, answer.lost
        return answer

    def _wait(self, test: Callable[[], object], whom: str) -> None:
        """As faults.wait; RankError also where another part of this replica has died, whom no server answers."""

        life = self.life

        def tested() -> object:
            life.unserved = False
            self._parts.check()
            life.tick()
            life.unserved = True
            return test()

        wait(tested, whom, self._limit_s)
        life.unserved = False

    def _hear(self) -> None:
        """What the parts have told one another: the loss of the replica, and whether it stops."""
        begin = perf_counter()
        note = self._parts.hear()
        self._waited += perf_counter() - begin
        self.loss, self.stop, self.steps = note.loss, self.stop or note.stop, note.steps
        self.asked = note.asked or self.stop  # so that the servers of all parts are told

    def _clip_scale(self) -> float:
        """What brings the norm of the replica's whole gradient under the limit."""
        return self._local.clip_scale(self._parts.total(self._local.sum_of_squares(0, self._grads.size)))

    def _installs_next(self) -> bool:
        """Whether the next step begins with other parameters, so that a step of one's own would be lost."""
        options, step = self._options, self._step + 1
        fetches = options.fetch_ahead == 0 and step % options.n_fetch == 0
        return fetches or (self._coming and self._due == step)

    def _add(self, sums: Array, scale: float) -> None:
        """Gradients, clipped, onto those of the next push; running statistics as they are."""
        n, first = self._n_trained, self._steps == 0
        if first:
            if sums is not self._grads:
                np.copyto(sums, self._grads)
            if scale != 1.0:
                sums[:n] *= sums.dtype.type(scale)
        elif scale == 1.0:
            np.add(sums, self._grads, out=sums)
        else:
            sums[:n] += self._grads[:n] * sums.dtype.type(scale)
            sums[n:] += self._grads[n:]

    def _push(self) -> None:
        push = self._sets[self._pushes % 2]
        self._pushes += 1
        if self._steps > 1:
            push.gradients[self._n_trained :] /= push.gradients.dtype.type(self._steps)  # the mean, of statistics
        fetches = self._fetches()
        for request, base in zip(push.requests, self._base, strict=True):
            numbers = (self._steps, self._samples, fetches, base, self.asked, self._loss, self._bad)
            request.write(Request(Kind.PUSH, *numbers))
        with self.life.served():
            self._mpi.Prequest.Startall(push.sends)
        if fetches:
            self._expect()
        self._steps, self._samples, self._loss, self._bad = 0, 0, 0.0, 0

    def _see_off(self, push: _Push) -> None:
        """Return when a push has left, so that it can be written again."""
        begin = perf_counter()
        self._wait(partial(self._mpi.Request.Testall, push.sends), "a server to take a push")
        self._waited += perf_counter() - begin

    def _fetches(self) -> bool:
        """Whether parameters are asked for before this step, and have not been. The last ones have to be in."""
        return self._step % self._options.n_fetch == 0 and self._asked != self._step and not self._coming

    def _expect(self) -> None:
        """Receive the parameters that are being asked for."""
        for arrival in self._arrivals:  # one by one: pieces of a shard are told apart by their order alone
            arrival.Start()
        self._coming, self._asked, self._due = True, self._step, self._step + self._options.fetch_ahead

    def _install(self) -> None:
        begin = perf_counter()
        self._wait(partial(self._mpi.Request.Testall, self._arrivals), "the parameters from the servers")
        self._waited += perf_counter() - begin
        self._coming = False
        if self._fetched is not self._params:
            np.copyto(self._params, self._fetched)
        answers = [answer.read() for answer in self._answers]
        self._versions = [answer.version for answer in answers]
        self._heard = self._heard or any(answer.stop for answer in answers)
        self.known = answers[0]

    def _send(self, kind: Kind, to: Sequence[tuple[int, int, int]]) -> None:
        """A request without numbers behind it."""
        for letter, (server, _, _) in zip(self._asks[kind], to, strict=False):
            if (kind, server) in self._sent:  # it was answered: it has long been sent
                self._wait(self._sent[kind, server].Test, "the servers to hear of this replica")
            letter.write(Request(kind, stop=self.asked))
            with self.life.served():
                self._sent[kind, server] = self._comm.Isend(letter.bytes, server, Tag.REQUEST)
