"""READ THIS FIRST: a training run, from the job file to the last checkpoint.

`train` is the command. Rank 0 reads what all need (`prepare.py`). `Training` builds the rooms of the house, once:
mesh, data, network, parameters, strategy, plans. After that it takes steps: the loader brings a batch, the executor
walks the plan's instructions over it, the strategy exchanges gradients and updates the parameters. Everything that can
be wrong is found while building.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from dataclasses import replace as changed
from functools import partial
from time import perf_counter

from msgspec.structs import replace

from dpnn import models
from dpnn.balance import runs
from dpnn.cluster.signals import StopRequest
from dpnn.comm import library
from dpnn.comm.grains import stack_places
from dpnn.comm.lifted import devices_of
from dpnn.comm.losses import survives
from dpnn.comm.mesh import Mesh, replicas_of
from dpnn.comm.node import Node
from dpnn.comm.pulse import PULSE
from dpnn.comm.reduce import BucketReducer, measured_bucket, most_updates
from dpnn.comm.world import World
from dpnn.data import Batch, Loader, Sampler, Skipped, no_samples
from dpnn.errors import NotFiniteError, Stopped
from dpnn.evaluate import Evaluator, Model, check_alike, check_devices, check_host, segments_of
from dpnn.locations import locate, readers
from dpnn.needs import check_room, room_of
from dpnn.observe.folder import RunFolder
from dpnn.observe.journal import Journal, Took
from dpnn.optim import STATES, schedule
from dpnn.plan import Costs, n_params, spread
from dpnn.planning import COSTS, is_open, settle
from dpnn.prepare import Start, check_same_owners, prepare
from dpnn.recovery import Past, Survivors, catch_up
from dpnn.saving import Saver
from dpnn.state import Drawn, Saved, passing_over_damaged
from dpnn.strategies.allreduce import Allreduce
from dpnn.strategies.average import Average
from dpnn.strategies.base import Strategy
from dpnn.strategies.flats import Flats
from dpnn.timetable import Lanes, Timetable

STRATEGIES: dict[str, type[Allreduce] | type[Average]] = {"allreduce": Allreduce, "average": Average}


def train(
    world: World,
    request: StopRequest,
    job_path: str | None,
    overrides: Sequence[str],
    resume: str | None,
    replay: str | None,
) -> int:
    """Train the network of a job file on all ranks of `world`; the exit code.

    `request`: of this rank, to stop. `resume`: None starts a new run; a run folder goes on from its newest checkpoint,
    "" the job's newest run. `replay`: the folder of a recorded run, to be repeated.
    """
    ready = partial(prepare, job_path, overrides, resume, replay, world.size)
    return passing_over_damaged(lambda damaged: attempt(world, request, partial(ready, damaged)))


def attempt(world: World, request: StopRequest, prepared: Callable[[], Start]) -> int:
    """Train from a start that the first rank prepares; the exit code. DamagedError, before a step is taken."""

    def first() -> Start:
        start = prepared()
        RunFolder(start.folder).tell_launcher()
        return start

    start = world.first(first)
    world.claim = RunFolder(start.folder).claim
    world.timeout_s = start.job.parallel.stall_abort_s
    start = located(world, placed(world, start))
    if start.job.parallel.strategy == "downpour":
        from dpnn import asynchronous

        return asynchronous.run(world, request, start)
    return Survivors(world, start, partial(Training, world), located).run(request)


def placed(world: World, start: Start) -> Start:
    """The start with its layers placed, where measured costs are to decide that; JobError where they can't fit.

    Collective.
    """
    if is_open(start.job):
        graph = models.graph(start.job, start.network, start.shape)
        folder = RunFolder(start.replay or start.folder)
        room = partial(room_of, world, start)
        setting, chosen = settle(world, folder, start.job, graph, start.rows, room)
        parallel = replace(start.job.parallel, microbatches=setting.microbatches)
        job = replace(start.job, parallel=parallel)
        start = changed(start, job=job, placement=setting.placement, chosen=chosen)
    return changed(start, notes=check_room(world, start))


def located(world: World, start: Start) -> Start:
    """The start with its data where they are read, and checked. Collective."""
    job, train, test = start.job, start.train, start.test
    parts, servers = job.parallel.parts, job.parallel.servers
    replicas = replicas_of(world.size, parts, servers)
    replica, part = divmod(world.rank, parts)
    reader = spread(models.graph(job, start.network, start.shape), start.placement).reader
    who = readers(world, replica if part == reader and replica < replicas else None, replicas)
    start = changed(start, train_at=locate(world, who, job.data, job.data.train, train, start.lanes))
    world.check(lambda: check_same_owners(start))
    if test is None:
        return start
    return changed(start, test_at=locate(world, who, job.data, job.data.test, test))


class Training:
    """One run on this rank. The constructor builds everything; `run` takes the steps."""

    def __init__(self, world: World, start: Start, past: Past) -> None:
        """Collective. DamagedError, on all ranks, where the checkpoint to go on from is."""
        job, limit_s = start.job, start.job.parallel.stall_abort_s
        self.world, self.start, self.job = world, start, job
        origin = past.origin or (Saved(start.found) if start.found is not None else Drawn(job.seed))
        self.past = changed(past, origin=None)  # which is needed here only
        self.mesh = mesh = Mesh(world, job.parallel.parts)

        self.placed = placed = spread(models.graph(job, start.network, start.shape), start.placement)
        self.reads = mesh.part == placed.reader

        # Data: the order of samples, and which of them this replica takes.
        self.sampler = sampler = Sampler(
            start.train.counts, start.train.block, start.lanes, start.global_batch, start.window, job.seed,
            grains=job.train.grains, owners=start.train_at.owners,
        )  # fmt: skip
        sampler.check(mesh.replicas)
        if start.train_at.owners is not None:
            sampler.deal(start.train_at.owners.runs())

        homes = [world.numbers[replica * mesh.parts] for replica in range(mesh.replicas)]
        self.lanes = Lanes(sampler, mesh.replica, homes)

        # Where the run stands: after `steps` of the steps that it has had since its start.
        train = job.train
        self.table = table = Timetable(sampler, start.steps, start.epoch, start.step, train.epochs, train.steps)
        self.steps, self.evaluated, self.began = start.steps, start.evaluated, past.began or perf_counter()

        # The network, and its parameters, drawn or those of the checkpoint: the first replica's, on all.
        self.decoders = job.data.threads or world.threads()
        """Threads that make batches."""
        self.model = model = Model(job, placed, mesh.part, world.threads(), world.node.rank)
        if mesh.parts > 1:
            check_alike(world, model)
        self.devices = devices_of(world.comm, model.memory, limit_s)
        self.folder = RunFolder(start.folder)
        model.choices.update({**world.first(self.folder.read_choices), **start.chosen})
        segments = segments_of(model.store.pieces)
        strategy = STRATEGIES[job.parallel.strategy]
        if strategy.together:
            check_devices(world, self.devices)
        if survives():
            check_host(world, self.devices)
        is_undone = survives() and (strategy.together or mesh.parts > 1)  # else who dies takes its parameters along
        self.node = node = Node(
            mesh, model.store.size, model.dtype, STATES[job.optimizer.name], model.kernels, limit_s,
            strategy.together, partials=stack_places(job.train.grains, mesh.replicas),
            updates=most_updates(model.store.size, len(model.store.pieces)) if is_undone else 0,
        )  # fmt: skip
        store = model.store
        flats = Flats.of(model.memory, node)
        store.place(flats.params, flats.grads)
        sums = node.sums if strategy.together else node.grads
        optimizer = flats.optimizer(job.optimizer, segments, sums, model.team, model.arithmetic, node.undo)
        self.rate = schedule(job.schedule, job.optimizer.lr, sampler.steps, table.at(table.end))
        self.arrays = {"": node.params, **node.state}
        for name in origin.fill(world, mesh, store, self.arrays):
            node.share(self.arrays[name])
        flats.push()

        if job.train.balance:
            trial = partial(Model, job, placed, mesh.part, world.threads(), world.node.rank)
            sampler.deal(runs(world, mesh, trial, sampler, job.parallel, model.choices))

        # The strategy, and the two plans: a training step, and a forward pass over held-out samples.
        self.microbatches = job.train.grains // mesh.replicas or job.parallel.microbatches
        rows = sampler.max_micro_rows(mesh.replicas, self.microbatches)
        self.strategy: Strategy = strategy(mesh, node, flats, optimizer, job)
        self.strategy.since = past.since
        evaluates = start.test and job.train.eval_every
        bucket_nbytes = self._bucket_nbytes()
        training, held_out = model.lay_out(
            world,
            lambda: (
                model.training(rows, self.microbatches, bucket_nbytes, job.train.reproducible),
                model.evaluation(rows) if evaluates else None,
            ),
        )
        sum_over = partial(BucketReducer, mesh.data, limit_s=limit_s, what="BatchNorm statistics")
        self.executor = model.executor(training, sum_over, self.strategy, mesh=mesh)
        self.evaluator = None
        if held_out and start.test:
            mean, std = start.train.mean, start.train.std
            evaluation = model.executor(held_out, mesh=mesh)
            place = (start.test_at, start.test, mean, std, self.decoders)
            self.evaluator = Evaluator(mesh.crew.comm, evaluation, job, *place)

        # What the run tells, and keeps.
        self.skipped = Skipped(job.data.bad_limit)
        self.journal = Journal(self.folder, table.end, first=world.rank == 0)
        self.saver = Saver(
            self.folder.checkpoints, mesh, store, node.state, model.team, job.output.keep, limit_s,
            lambda steps, path: self.journal.event("checkpoint", step=steps, path=str(path)), past.writing,
        )  # fmt: skip

    def _bucket_nbytes(self) -> int:
        """The size of a bucket: what the job says, else what the run began with, else measured where most lies."""
        if self.job.parallel.bucket_mb:
            return round(self.job.parallel.bucket_mb * 2**20)
        question = f"bucket_nbytes {self.mesh.replicas}x{self.mesh.parts}, {self.node.comm.size} a node"
        choices = self.model.choices
        if question not in choices:
            measured = measured_bucket(self.node, self.job.parallel.stall_abort_s)
            sizes = [sum(map(n_params, self.placed.nodes(part))) for part in range(self.mesh.parts)]
            choices[question] = self.world.first(lambda: str(measured), sizes.index(max(sizes)))
        return int(choices[question])

    def run(self, request: StopRequest) -> int:
        """Take the steps that are left; the exit code. Collective, as is all below."""
        past, strategy, saver, self.request = self.past, self.strategy, self.saver, request
        if not past.began:
            self._tell_start()
        elif self.world.rank == 0:
            self.folder.write_choices(self.model.choices)
        if past.began and not strategy.together:
            catch_up(self)
        loader = self.open(self.lanes, self.steps, self.table.end)
        try:
            # The run was killed between its last checkpoint and an evaluation, or a rank has died before either.
            self._pause(saves=past.began > 0 and self._saves(), last=False)
            while self.steps < self.table.end:
                self._take_step(loader)
                saver.look()
                last = self.steps == self.table.end or strategy.stop
                self._pause(saves=last or self._saves(), last=last)
                if last:
                    break
            PULSE.doing = "ending the run"
        finally:
            if loader is not None:
                loader.close()
        strategy.close()
        epoch, step = self.table.place(self.steps)
        self.skipped.check(strategy.bad_samples, max(epoch - self.start.epoch + (step > 0), 1))
        saver.finish()
        code = 0 if self.steps >= self.table.end else Stopped.exit_code
        samples, bad = past.samples + self.table.samples(self.steps), past.bad_samples + strategy.bad_samples
        self.journal.end(self.steps, samples, bad, perf_counter() - self.began, code)
        return code

    def open(self, lanes: Lanes, begin: int, end: int) -> Loader | None:
        """What brings the batches of some lanes, from one step of the run to another; None on a part that reads none.

        None also where there are no such steps.
        """
        if not self.reads or begin >= end:
            return None
        job, start = self.job, self.start
        loader = Loader(
            start.train_at.folder, start.train, lanes.sampler, lanes.replica, len(lanes.homes),
            view=start.view(self.model.dtype), dtype=self.model.dtype, window_mb=job.data.window_mb,
            threads=self.decoders, skips=job.data.on_bad == "skip", empty=self.model.memory.host,
            start=self.table.place(begin), last=self.table.place(end - 1), limit_s=job.parallel.stall_abort_s,
        )  # fmt: skip
        if not loader.pooled:
            self.journal.event(
                "single_samples",
                f"windows of {loader.window_mb:,.0f} MB are more than data.window_mb = {job.data.window_mb:g}: "
                "samples are read one by one, slower and without their checksum",
            )
        return loader

    def _saves(self) -> bool:
        """Whether a checkpoint is due after the last step."""
        every = max(1, round(self.job.output.checkpoint_every * self.sampler.steps))
        return self.steps > 0 and (self.steps == self.table.end or self.steps % every == 0)

    def _pause(self, saves: bool, last: bool) -> None:
        """Between two steps: write a checkpoint, where it `saves`, and evaluate, where it is time to."""
        evaluator, strategy = self.evaluator, self.strategy
        evaluates = evaluator is not None and self.steps > self.evaluated and self._is_due()
        if not (saves or evaluates):
            return
        PULSE.doing = "gathering the parameters"
        strategy.gather()
        if saves:
            PULSE.doing = "writing a checkpoint"
            self.journal.flush()
            self.saver.save((*self.table.place(self.steps), self.steps), self.start.info())
        if evaluates and evaluator is not None:
            scores = evaluator.run()
            epoch, step = self.table.place(self.steps)
            self.journal.scores(str(scores), epoch + (step > 0), self.steps, **asdict(scores))
            self.evaluated = self.steps
        if not last:
            strategy.release()

    def _take_step(self, loader: Loader | None) -> None:
        """One step."""
        strategy, begin = self.strategy, perf_counter()
        epoch, step = place = self.table.place(self.steps)
        PULSE.epoch, PULSE.step = epoch + 1, self.steps + 1
        batch, read_s = self.learn(loader, place, self.lanes.counts(step, self.microbatches))
        self.steps += 1
        PULSE.doing = "telling of the step"
        took = Took(perf_counter() - begin, read_s, strategy.wait_s, strategy.update_s)
        bad, total = self.past.bad_samples + strategy.bad_samples, self.sampler.total(step)
        self.journal.step(epoch + 1, self.steps, strategy.loss, strategy.rate, total, took, bad_samples=bad)
        self.journal.bad_samples(batch.bad)
        self.skipped.note(batch.bad)
        self.skipped.check(strategy.bad_samples, epoch - self.start.epoch + 1)

    def learn(
        self, loader: Loader | None, place: tuple[int, int], counts: Sequence[tuple[int, int]]
    ) -> tuple[Batch, float]:
        """Train on the next batch of a loader; the batch, and the seconds that it was waited for.

        `place`: the epoch, and its step; `counts`: for each micro-batch the samples of this replica, and of all.
        """
        strategy, sampler, (epoch, step) = self.strategy, self.sampler, place
        begin, PULSE.doing = perf_counter(), "reading a batch"
        batch = loader.next() if loader is not None else no_samples(epoch, step)
        read_s = perf_counter() - begin
        rows = sum(mine for mine, _ in counts)
        strategy.rate, strategy.samples = self.rate(epoch * sampler.steps + step), rows
        strategy.skipped, strategy.stop = len(batch.bad), self.request.asked
        PULSE.doing = self.executor
        try:
            self.executor.run(batch, counts, sampler.total(step) if strategy.together else rows)
        except NotFiniteError as error:
            self._explain(error)
        if loader is not None:
            loader.release(batch)
        return batch, read_s

    def _is_due(self) -> bool:
        """Whether the network is evaluated after the last step: it ended the run, or so many epochs."""
        epoch, step = self.table.place(self.steps)
        return self.steps == self.table.end or (step == 0 and epoch % self.job.train.eval_every == 0)

    def _explain(self, error: NotFiniteError) -> None:
        """Raise, on every rank, which layer of which rank is the first that isn't finite."""
        self.saver.finish()  # a good one may be on its way
        layer = self.executor.not_finite()
        epoch, _ = self.table.place(self.steps)
        where = f"epoch {epoch + 1}, step {self.steps + 1}: {error}"
        way_out = "lower optimizer.lr, or set optimizer.clip; go on from the last checkpoint with --resume"
        self.world.agree(NotFiniteError(f"{layer}: its output is not finite ({where}); {way_out}") if layer else None)
        self.world.agree(NotFiniteError(f"{where}, though all layers' outputs are finite; {way_out}"))

    def _spread(self) -> str:
        """How a replica is spread, where it is."""
        parts, pieces = self.mesh.parts, self.microbatches
        return f", {parts} parts a replica, {pieces} micro-batches" if parts > 1 else ""

    def _tell_start(self) -> None:
        job, start, graph, world = self.job, self.start, self.model.graph, self.world
        backends = "+".join(dict.fromkeys(group.backend.name for group in self.executor.plan.groups))
        backends = backends or self.model.backends[0].name  # a part with nothing to do
        self.journal.start(
            f"{job.model.name}, {graph.n_params:,} parameters, on {world.size} ranks{self._spread()} ({backends}); "
            f"{self.sampler.samples:,} samples, {self.table.end} steps of {start.global_batch}",
            mpi=library.version(), ranks=world.size, replicas=self.mesh.replicas, parts=self.mesh.parts,
            microbatches=self.microbatches, parameters=graph.n_params, seed=job.seed, backend=backends,
            threads=job.backend.threads or world.threads(), global_batch=start.global_batch, lanes=start.lanes,
            from_step=self.steps, library=self.model.backends[0].about, sums_by=self.strategy.sums_by,
        )  # fmt: skip
        if COSTS in start.chosen:
            found = Costs.load(start.chosen[COSTS])
            self.journal.event("costs", f"costs measured: {found}; `dpnn plan` of a job file assumes {Costs()}")
        for event, text in (*self.model.notes, *start.notes):
            self.journal.event(event, text)
        for device, ranks in Counter(filter(None, self.devices)).most_common(1):
            if ranks > 1:
                self.journal.event("shared_device", f"{ranks} ranks share {device}: they compute in turn")
        if self.node.note:
            self.journal.event(
                "no_shared_memory", f"gradients are summed by MPI, not in shared memory: {self.node.note}"
            )
        if world.rank == 0:
            self.folder.write_choices(self.model.choices)
        for reason in start.damaged:
            self.journal.event("damaged_checkpoint", f"passed over a damaged checkpoint: {reason}", path=reason)
        if self.steps:
            left = f"going on at epoch {start.epoch + 1}, step {self.steps + 1}"
            if self.steps >= self.table.end:
                left = f"all {self.table.end} steps are taken; set train.epochs or train.steps higher to go on"
            self.journal.event("resumed", left, step=self.steps)
