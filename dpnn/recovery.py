"""A rank dies in synchronous training, and the others go on, from what they have in memory.

Where the MPI tells of deaths (Open MPI 5 under `mpirun --with-ft ulfm`), whoever hears of one wakes all others. The
ranks that are left agree on a step to go on from (regroup.py), take back what they have done beyond it, and form whole
replicas; who is left over leaves. Then the run is built anew, by the same constructor, on the ranks that are left.
Lanes are dealt anew, and no sample of theirs is dropped or taken twice.

A rank may die at any moment of this too: then the others begin anew.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from msgspec import structs
from numpy.typing import NDArray

from dpnn.cluster.signals import StopRequest
from dpnn.comm.alarm import ALARM
from dpnn.comm.faults import deadline, tell, wait
from dpnn.comm.losses import survives
from dpnn.comm.mesh import Mesh
from dpnn.comm.pulse import PULSE
from dpnn.comm.watchdog import Watchdog
from dpnn.comm.world import World
from dpnn.data import Loader
from dpnn.errors import RankError
from dpnn.observe.folder import RunFolder
from dpnn.observe.journal import Journal
from dpnn.observe.metrics import last_evaluated, last_exit, lost
from dpnn.prepare import Start
from dpnn.regroup import Regrouped, Told, apart, together
from dpnn.saving import Saver, Writing
from dpnn.state import Held, Origin, Own
from dpnn.strategies.base import NEVER, Since, Strategy
from dpnn.timetable import Lanes, Timetable

Array = NDArray[Any]

_FAREWELL_S = 5.0
"""How long a rank that is left over stays for the others to part from it."""


@dataclass(frozen=True)
class Past:
    """What a run has behind it when it is built: nothing, or what it did with ranks that have died since."""

    origin: Origin | None = None
    """Where its parameters come from; None: from where the start says."""
    began: float = 0.0
    """When it began (perf_counter)."""
    samples: int = 0
    bad_samples: int = 0
    writing: Writing | None = None
    """A checkpoint that this rank is still writing."""
    since: Since = NEVER
    backlog: tuple[int, Lanes] | None = None
    """From which step on, and whose samples, this replica has to take alone before it goes on with the others."""


class Run(Protocol):
    """A run that was built, as far as it matters here (train.py)."""

    start: Start
    past: Past
    mesh: Mesh
    lanes: Lanes
    table: Timetable
    microbatches: int
    arrays: dict[str, Array]
    """The parameters (""), and by name what the optimizer keeps."""
    strategy: Strategy
    saver: Saver
    journal: Journal
    began: float

    def run(self, request: StopRequest) -> int: ...
    def open(self, lanes: Lanes, begin: int, end: int) -> Loader | None: ...
    def learn(self, loader: Loader | None, place: tuple[int, int], counts: Sequence[tuple[int, int]]) -> object: ...


def catch_up(run: Run) -> None:
    """Where others have died, replicas that don't wait for one another may be behind: they take those steps alone.

    All go on when none is behind. Collective.
    """
    crew, strategy, (begin, lanes) = run.mesh.crew, run.strategy, backlog(run)
    places = run.table.places(begin, run.start.steps)
    loader = run.open(lanes, begin, run.start.steps)
    strategy.alone = True
    try:
        for number in range(-int(crew.least(-len(places)))):
            if number < len(places):
                run.learn(loader, places[number], lanes.counts(places[number][1], run.microbatches))
            crew.meet()
    finally:
        if loader is not None:
            loader.close()
    strategy.alone = False
    strategy.meet()


def backlog(run: Run) -> tuple[int, Lanes]:
    """The step that a replica begins with, and whose samples it takes first."""
    return run.past.backlog or (run.start.steps, run.lanes)


class Stand:
    """Where this rank stands, when it has left a run for good."""

    def __init__(self, run: Run) -> None:
        run.strategy.leave()
        self.run, self.part, self.writing = run, run.mesh.part, run.saver.writing
        self.bad_samples = run.past.bad_samples + run.strategy.bad_samples
        self._begun, self.lanes = backlog(run)
        if self._begun + run.strategy.steps >= run.start.steps:
            self.lanes = run.lanes

    @property
    def home(self) -> int:
        """The replica that this rank is of, by the number of its first rank."""
        return self.lanes.homes[self.lanes.replica]

    def held(self) -> tuple[int, int]:
        """The steps of the run, and the averages, that the parameters surely have behind them."""
        steps, averages = self.run.strategy.held()
        return self._begun + steps, averages

    def go_back(self, steps: int, averages: int) -> Since:
        """Make the parameters those after so many steps and averages."""
        return self.run.strategy.go_back(steps - self._begun, averages)


class Survivors:
    """The ranks of a job, as long as a whole replica is left of them."""

    def __init__(
        self,
        world: World,
        start: Start,
        build: Callable[[Start, Past], Run],
        located: Callable[[World, Start], Start],
    ) -> None:
        """Collective. `located`: the start with its data where they are read by the ranks that are left."""
        if survives() and start.job.train.reproducible:
            # Who is left gets the cores of the dead, but other threads would make other bits.
            threads = start.job.backend.threads or world.threads()
            backend = structs.replace(start.job.backend, threads=threads)
            start = replace(start, job=structs.replace(start.job, backend=backend))
        self._world, self._start, self._build, self._located = world, start, build, located
        self._parts, self._apart = start.job.parallel.parts, start.job.parallel.strategy == "average"
        self._all, self._past = world.comm, Past()
        self._known, self._homes = set(world.numbers), tuple[int, ...]()
        """Ranks, and whole replicas, that others were told to be left."""
        self._stand: Stand | None = None
        self._dealt: list[tuple[int, Lanes]] = []
        """Of each run so far, the step that it began with, and whose samples were whose from there on."""
        self._failures: list[BaseException] = []
        """Errors since the run was last built: they keep what messages may still be written into."""
        self._folder = RunFolder(start.folder)
        self._since = world.first(lambda: self._folder.metrics.stat().st_size if self._folder.metrics.exists() else 0)

    def run(self, request: StopRequest) -> int:
        """Train, with the ranks that are left, to the end; the exit code. Collective."""
        world, parallel = self._world, self._start.job.parallel
        if survives():
            ALARM.arm(self._all)
        while True:
            run = None
            with ALARM.outlived(self._failures):
                run = self._build(self._start, self._past)
                self._forget()
                watchdog = Watchdog(world, parallel, self._start.folder, self._folder.event)
                with closing(run.journal), watchdog, ALARM.outlived(self._failures):
                    code = run.run(request)
                    if survives():
                        world.meet()  # who leaves before is missed
                    return code
            if run is not None:
                self._stand = Stand(run)
                self._dealt.append((run.start.steps, run.lanes))
            left = self._go_on()
            if left is not None:
                return left

    def _forget(self) -> None:
        """The run is built: of what was there before nothing is needed any more."""
        self._stand, self._past = None, Past()
        self._failures.clear()
        gc.collect()

    def _go_on(self) -> int | None:
        """Make a world of the ranks that are left, and a start. An exit code, where this rank has nothing to do there.

        Each try loses a rank at least, or it is the last.
        """
        PULSE.begin()  # it forgets the run
        PULSE.doing = "going on without a rank that has died"
        for _ in range(self._world.size):
            with ALARM.outlived(self._failures):
                return self._try_to_go_on()
        raise RankError("ranks die faster than the others can go on; go on with --resume")

    def _try_to_go_on(self) -> int | None:
        world, stand = self._world, self._stand
        ALARM.sound()
        world.lost = True
        mine = Told(world.number, world.rank % self._parts, 0, False, self._start.steps)
        if stand is not None:
            mine = Told(world.number, stand.part, stand.home, True, *stand.held(), stand.bad_samples)
        with deadline(world.timeout_s, "making a world of the ranks that are left", world.fail):
            # Of all that there ever were: those who have got further in an earlier try begin here, too.
            comm = ALARM.wakes(self._all.Shrink())
            ALARM.arm(comm)
            told: list[Told] = comm.allgather(mine)
        ended = last_exit(self._folder.metrics, self._since)
        if ended is not None:
            return ended
        goes_back = all(one.stands for one in told)  # else some were never in a run, and all start anew
        if goes_back and self._apart:
            groups = apart(told, self._parts)
        else:
            groups = together(told, self._parts, self._start.job.train.grains)
        start, places = self._start, groups.places
        if goes_back and comm.rank in places:
            start = self._go_back(told, groups, comm.rank)
        if comm.rank == places[0]:
            self._tell(told, groups, start.steps)
        goes_on = comm.rank in places
        with deadline(world.timeout_s, "forming replicas of the ranks that are left", world.fail):
            formed = ALARM.wakes(comm.Split(goes_on, places.index(comm.rank) if goes_on else 0))
        # Whoever tells of the others has done so.
        self._known, self._homes = {told[rank].number for rank in places}, groups.homes
        parting = comm.Ibarrier()
        if not goes_on:
            with suppress(RankError):
                wait(parting.Test, "the others to part from this rank", _FAREWELL_S)
            return 0
        world.go_on(formed, [told[rank].number for rank in places])
        ALARM.arm(world.comm)
        self._start = self._with_data(start)
        return None

    def _go_back(self, told: Sequence[Told], groups: Regrouped, rank: int) -> Start:
        """The start from where all go on, with what they have; this one is `rank` of those that told."""
        stand = self._stand
        if stand is None:
            raise TypeError("a rank that was never in a run can't go back to one of its steps")
        run, writing = stand.run, stand.writing
        if writing is not None and self._parts > 1:
            writing.give_up()  # the part of a dead rank may never come
            writing = None
        origin: Origin = Held({})
        since, backlog = NEVER, None
        if rank in groups.back:
            steps, averages = groups.back[rank]
            arrays, since = stand.run.arrays, stand.go_back(steps, averages)
            origin = Held(arrays)
            if self._apart:
                most = max(count for _, count in groups.back.values())
                origin = Own(arrays, groups.ahead, averages < most, self._start.job.parallel.state)
                since = since if averages == most else Since(averages=most)
                if steps < groups.steps:
                    backlog = steps, stand.lanes
        samples = run.past.samples + run.table.samples(groups.steps)
        bad = min(one.bad_samples for one in told)
        self._past = Past(origin, run.began, samples, bad, writing, since, backlog)
        epoch, step = run.table.place(groups.steps)
        return replace(self._start, epoch=epoch, step=step, steps=groups.steps, found=None, damaged=())

    def _with_data(self, start: Start) -> Start:
        """The start with what all ranks that go on know of it. Collective."""
        evaluated = self._world.first(lambda: last_evaluated(self._folder.metrics))
        start = self._located(self._world, replace(start, evaluated=evaluated))
        if start.step and start.info()["owners"] != self._start.info()["owners"]:
            raise RankError(
                "without the ranks that have died the shards are parted among the nodes in another way, and every "
                "sample of an epoch is taken once; go on from a checkpoint at the end of an epoch, with --resume"
            )
        return start

    def _tell(self, told: Sequence[Told], groups: Regrouped, steps: int) -> None:
        """Tell of those who are lost, and that nobody has told of in a try that others broke off. On one rank."""
        ranks, replicas = lost(self._folder.metrics, self._since)
        left, stand, past = len(groups.places), self._stand, self._past
        gone = sorted(self._known - {one.number for one in told} - ranks)
        if gone:
            tell(f"dpnn: lost rank {', '.join(map(str, gone))}; {left} ranks go on after step {steps}")
            self._folder.event("worker_lost", ranks=gone, left=left, spare=len(told) - left, step=steps)
        if stand is not None and groups.homes:
            begin = (steps if past.backlog is None else past.backlog[0]) - past.since.steps
            homes = self._homes or stand.lanes.homes
            gone = [home for home in homes if home not in groups.homes and home not in replicas]
            samples, end = 0, steps
            for first, lanes in reversed(self._dealt):
                places = stand.run.table.places(max(begin, first), end)
                theirs = [replica for replica, home in enumerate(lanes.homes) if home in gone]
                samples += sum(lanes._replace(replica=replica).rows(places) for replica in theirs)
                end = min(end, first)
            if gone:
                self._folder.event("samples_lost", replicas=gone, samples=samples, since=begin)
