"""A replica's side of Downpour SGD: the strategy that its executor calls.

Gradients are added up over `n_push` steps and sent off; parameters are asked for every `n_fetch` steps and installed
`fetch_ahead` steps later; in between the replica takes steps of its own (Dean et al. 2012, algorithm 7.1). It waits for
parameters that aren't there when they are due, and for a push that hasn't left when the next but one is.

Where a server dies, the replica turns to who holds its shards now, and says again what that one doesn't know.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING

import numpy as np

from dpnn import config
from dpnn.comm.faults import poke
from dpnn.comm.pulse import PULSE
from dpnn.data import Run
from dpnn.errors import NotFiniteError, RankError
from dpnn.memory import zeros_like
from dpnn.optim import Optimizer
from dpnn.strategies.downpour.links import Links
from dpnn.strategies.downpour.parts import Alone, Note
from dpnn.strategies.downpour.protocol import Answer, Array, Kind, Lease, Letter, Request, shards

if TYPE_CHECKING:
    from mpi4py import MPI

_ASK_AGAIN_S, _ASK_AGAIN_SHARE, _ASK_AGAIN_MOST_S = 0.01, 0.1, 0.5
"""How long who has to wait waits before it asks again: a share of the time that it has waited."""


class Worker:
    """Fetches and pushes `params` and `grads`, flat arrays, of which the servers behind the workers hold a shard each.

    `local` updates `params` by `grads`: plain SGD. `n_trained`: the numbers from there on are running statistics.
    Where the replica is spread over several `parts`, `held` says of those shards that are of this one's arrays which
    numbers [lo, hi) they are; what is collective is so over the parts. `mirrored`: whether shards outlive servers.
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
        mirrored: bool = False,
    ) -> None:
        self._comm, self._options, self._limit_s = comm, job.parallel, job.parallel.stall_abort_s
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
        options = self._options
        self._in_step = options.n_push == options.n_fetch == 1 and options.fetch_ahead == 0
        """Whether every step waits for parameters that have its last push in them: then nothing has to be copied."""
        self._sets = [grads if self._in_step else zeros_like(grads) for _ in range(2)]
        """From which gradients are sent, in turn."""
        self._fetched = zeros_like(params) if options.fetch_ahead else params
        """Where parameters arrive. Only those that aren't waited for at once need a place of their own."""
        held = held or dict(enumerate(shards(params.size, comm.size - workers)))
        self.links = Links(comm, workers, held, self._fetched, self._sets, mirrored, self._parts, self._limit_s)
        self._leased = Letter(Answer)
        self._coming = False
        """Whether parameters were asked for and have not been installed."""
        self._asked, self._due = -1, 0
        """The steps before which parameters were last asked for, and are installed."""
        self._versions = self._base = [0] * len(held)
        """Versions of the parameters now, and when the first step of the next push was computed."""
        self._step = 0
        self._steps, self._samples, self._loss, self._bad = 0, 0, 0.0, 0
        """Of the next push."""
        self._waited = 0.0

    # What the executor calls.

    def begin(self) -> None:
        """Install the parameters that are due, and ask for the next ones."""
        if self._coming and self._step == self._due:
            self._install()
        if self._fetches():
            self._note_fetch()
            self.links.fetch(self.asked)
            if self._step == self._due:
                self._install()
        if self._steps == 0:
            self._base = self._versions

    def open(self, lo: int, hi: int) -> None:
        """Return when nobody reads the gradients of the last step any more."""
        if self._in_step:
            self._see_off(1 - self.links.pushes % 2)
            self.links.writes(0)

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
        turn = self.links.pushes % 2
        if self._steps == 0:
            self._see_off(turn)
            if not self._in_step:
                self.links.writes(turn)
        self._add(self._sets[turn], scale)
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
        self._note_fetch()
        self.links.fetch(self.asked)
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
        self.links.tell(Kind.LEAVE, self.asked)

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
        """This replica works, though it asks for nothing: to be called now and then while it does.

        RankError where the servers count it as dead.
        """
        self.links.look()
        self.links.tick(works=True)

    def end(self) -> None:
        """The run is over, says this replica, which speaks for it."""
        if self._parts.asks:
            self.links.tell(Kind.OVER, self.asked)

    def part(self) -> None:
        """Ask the servers for nothing any more, and return when all that was sent has been received."""
        self.links.part()
        for turn in range(2):
            self._see_off(turn)

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
            self._leased.bytes[:] = self.links.ask_for_work(self.asked)
        self._parts.share(self._leased.bytes)
        answer = self._leased.read()
        self.links.leases += answer.lease == Lease.LANE
        self.speaker, self.lost = answer.speaker, answer.lost
        return answer

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
        turn = self.links.pushes % 2
        if self._steps > 1:
            gradients = self._sets[turn]
            gradients[self._n_trained :] /= gradients.dtype.type(self._steps)  # the mean, of statistics
        fetches = self._fetches()
        push = Request(Kind.PUSH, self._steps, self._samples, fetches, 0, self.asked, self._loss, self._bad)
        if fetches:
            self._note_fetch()
        self.links.push(turn, push, self._base)
        self._steps, self._samples, self._loss, self._bad = 0, 0, 0.0, 0

    def _see_off(self, turn: int) -> None:
        """Return when the push from a set has left, so that it can be written again."""
        begin = perf_counter()
        self.links.wait(partial(self.links.have_left, turn), "a server to take a push")
        self._waited += perf_counter() - begin

    def _fetches(self) -> bool:
        """Whether parameters are asked for before this step, and have not been. The last ones have to be in."""
        return self._step % self._options.n_fetch == 0 and self._asked != self._step and not self._coming

    def _note_fetch(self) -> None:
        """Parameters are being asked for."""
        self._coming, self._asked, self._due = True, self._step, self._step + self._options.fetch_ahead

    def _install(self) -> None:
        begin = perf_counter()
        self.links.wait(self.links.have_come, "the parameters from the servers")
        self._waited += perf_counter() - begin
        self._coming = False
        if self._fetched is not self._params:
            np.copyto(self._params, self._fetched)
        answers = self.links.answers
        self._versions = [answer.version for answer in answers]
        self._heard = self._heard or any(answer.stop for answer in answers)
        self.known = answers[0]
