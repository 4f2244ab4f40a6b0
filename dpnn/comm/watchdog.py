"""A thread of each rank that sees when its main thread doesn't get on, whatever that does.

About once a second it looks at the pulse, and copies where the rank stands into the node's shared file. Where nothing
has moved for `stall_warn_s` seconds, one rank of the node says so; after `stall_abort_s` the job ends, with a line for
every rank. It never calls MPI.
"""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from dpnn import config
from dpnn.comm.faults import deadline, given_up, started, tell
from dpnn.comm.postmortem import LastWords, by_rank, clock, complete, lines_of, table, trouble, where
from dpnn.comm.pulse import PULSE
from dpnn.comm.slots import Place, Slots, here
from dpnn.comm.world import World
from dpnn.errors import DpnnError, RankError

T = TypeVar("T")

_TICK_S = 1.0
"""From one look to the next: so long, or a quarter of `stall_warn_s`."""
_GRACE_S = 1.0
"""The main thread has the first word: its own limits name what it waits for."""
_HELD_S = 10.0
"""After this time beyond `stall_abort_s` the process ends itself even where no thread of Python's runs."""
_FOLDER_S = 2.0
"""How long the run folder may take to answer."""
_WORDS_S = 2.5
"""How long other nodes may take to write their lines. Ranks that fail beside this one wait longer (world.py)."""
_PATIENCE_S = 5.0
"""How long the thread may take to end."""
_NAMED = 3
"""Ranks of the node that a warning names."""
_WARNING, _LISTENING = range(2)
"""What one rank of a node does for all."""


class Watchdog:
    """As a context manager it watches what this rank does in the block, which has to be its main thread's.

    `folder`: of the run. `event(name, **values)` writes into its metrics. Where the block raises and the job has other
    ranks, it goes on looking until the process ends: another node may still ask for this one's lines.
    """

    def __init__(self, world: World, options: config.Parallel, folder: Path, event: Callable[..., object]) -> None:
        """Collective over the world."""
        self._world, self._event = world, event
        self._warn_s, self._abort_s = options.stall_warn_s, options.stall_abort_s
        with deadline(world.timeout_s, "making a file that the ranks of a node share", world.fail):
            self._slots = Slots(world.node)
        self._words = LastWords(folder, world.size)
        self._tick_s = min(_TICK_S, self._warn_s / 4)
        self._done, self._ending = threading.Event(), False
        self._folder_answers = True
        self._marks: tuple[object, ...] = ()
        self._moved = 0.0
        self._warned = 0.0
        """Since when it had stalled when it last warned; 0: it goes on."""
        self._thread = threading.Thread(target=self._run, name="dpnn-watchdog", daemon=True)

    def __enter__(self) -> Self:
        PULSE.begin()
        self._slots.write(self._place())
        self._world.post_mortem = self.post_mortem
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ending = True
        if error is not None and self._world.size > 1:
            return
        self._done.set()
        self._thread.join(_PATIENCE_S)
        if isinstance(error, RankError):
            tell(self.post_mortem())
        self._world.post_mortem = None
        if not self._thread.is_alive():  # else a dead file system holds it; it dies with the process
            self._slots.close()

    def post_mortem(self) -> str:
        """A line for every rank of the job, for people."""
        self._ending = True
        self._slots.write(self._place())
        own, size = lines_of(self._slots.read()), self._world.size
        found = self._reached(partial(self._words.collect, own, _WORDS_S), _WORDS_S + 0.5)
        lines = complete(by_rank(own) if found is None else found, size)
        return table(lines, size, self._reached(partial(self._words.keep, lines), _FOLDER_S) or "")

    def _run(self) -> None:
        while not self._done.is_set():
            faulthandler.dump_traceback_later(self._abort_s + _HELD_S, exit=True, file=2)
            self._look()
            self._done.wait(self._tick_s)
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        """Note where the main thread is, and do what is to be done where it has been there for too long."""
        place = self._place()
        self._slots.write(place)
        quiet = place.seen - place.since
        if quiet >= min(self._warn_s, self._abort_s / 2):
            self._listen()
        if self._ending:
            return
        stalled = time.monotonic() - self._moved if PULSE.idle else quiet
        if stalled > self._abort_s + _GRACE_S:
            self._ending = True
            waits = place.whom and not PULSE.idle
            error = given_up(self._abort_s, place.whom) if waits else self._stuck(place)
            # In a thread of its own, since this one goes on to listen.
            threading.Thread(target=self._world.fail, args=(error,), name="dpnn-failing", daemon=True).start()
        elif stalled >= self._warn_s and self._slots.due(_WARNING, stalled):
            self._warned = place.since
            self._warn(place, stalled)
        elif self._warned and stalled < self._warn_s:
            seconds, self._warned = place.since - self._warned, 0.0
            tell(f"dpnn: rank {place.rank} goes on after {seconds:.0f} s: {where(place)}")
            self._note("goes_on", rank=place.rank, seconds=seconds)

    def _place(self) -> Place:
        """Where the main thread is now."""
        now, wall, marks = time.monotonic(), time.time(), PULSE.marks()
        if marks != self._marks:
            self._marks, self._moved = marks, now
        whom, since = PULSE.whom, PULSE.since
        begun = wall - (now - (since if whom else self._moved))
        at = PULSE.epoch, PULSE.step, wall, begun
        return Place(self._world.rank, os.getpid(), here(), *at, whom, PULSE.instruction())

    def _warn(self, place: Place, stalled: float) -> None:
        """Say that this rank doesn't get on, and which others of its node don't wait."""
        waits = f"has waited {stalled:.0f} s for {place.whom}" if place.whom else f"hasn't moved for {stalled:.0f} s"
        named = []
        for other in self._slots.read():
            wrong = trouble(other, place.seen)
            if other.rank != place.rank and (wrong or not other.whom):
                named.append(f"rank {other.rank} {wrong or 'works'} ({where(other)})")
        more = [f"{len(named) - _NAMED} more ranks of this node don't wait"] * (len(named) > _NAMED)
        text = "; ".join([f"{where(place)}, since {clock(place.since)}", *named[:_NAMED], *more])
        tell(
            f"dpnn: rank {place.rank} ({socket.gethostname()}) {waits}: {text}; "
            f"where nothing moves for {self._abort_s:g} s, the job ends"
        )
        self._note("stalled", rank=place.rank, seconds=stalled, instruction=where(place), whom=place.whom)

    def _stuck(self, place: Place) -> RankError:
        return RankError(
            f"nothing has moved for {self._abort_s:g} s in {where(place)}: this rank hangs, in a device, a file system "
            "or a lock, or is much too slow; if it is well, raise parallel.stall_abort_s"
        )

    def _listen(self) -> None:
        """Where another node ends the job, give it the lines of this one."""
        if self._slots.due(_LISTENING, self._tick_s / 2) and self._reached(self._words.are_asked, _FOLDER_S):
            places = self._slots.read()
            self._reached(partial(self._words.add, lines_of(places), places[0].rank), _FOLDER_S)

    def _note(self, name: str, **values: object) -> None:
        self._reached(partial(self._event, name, **values), _FOLDER_S)

    def _reached(self, call: Callable[[], T], limit_s: float) -> T | None:
        """What a call returns that needs the run folder; None where it fails.

        A folder that doesn't answer in time isn't asked again: its file system may be why nothing moves.
        """
        if not self._folder_answers:
            return None
        try:
            return started(call).result(limit_s)
        except TimeoutError:
            self._folder_answers = False
        except (OSError, DpnnError):
            pass
        return None
