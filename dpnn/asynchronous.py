"""An asynchronous run (Downpour SGD), from its building to its last checkpoint: what train.py is for the others.

The last ranks are servers (`serve`): each holds a shard of the parameters, never the whole network. All others are
replicas (`Replica`), or parts of them: each replica leases lanes of the data from the first server, goes through them,
fetches and pushes when it likes; a part does so with servers of its own. Replicas meet twice: when the run is built,
and when the last one is done.
"""

from collections import deque
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from msgspec.structs import replace

from dpnn import models
from dpnn.checkpoint import InParts, Note, new_mark
from dpnn.cluster.signals import StopRequest
from dpnn.comm import library
from dpnn.comm.faults import deadline
from dpnn.comm.mesh import Mesh
from dpnn.comm.pulse import PULSE
from dpnn.comm.ranks import Ranks
from dpnn.comm.watchdog import Watchdog
from dpnn.comm.world import World
from dpnn.data import Leases, Loader, Location, Run, Sampler, Skipped, no_samples
from dpnn.errors import NotFiniteError, Stopped
from dpnn.evaluate import Array, Evaluator, Model, check_alike, choose_backends, segments_of
from dpnn.native import denormals_flushed
from dpnn.nn.init import draw
from dpnn.observe.folder import RunFolder
from dpnn.observe.journal import Journal, Took
from dpnn.observe.metrics import Metrics
from dpnn.optim import STATES, Optimizer, cut, schedule
from dpnn.plan import Strategy, clip, lay, spread
from dpnn.prepare import Start
from dpnn.state import load, sliced
from dpnn.strategies.downpour.cut import Cut
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.order import Order, Replay
from dpnn.strategies.downpour.parts import Parts
from dpnn.strategies.downpour.protocol import deal
from dpnn.strategies.downpour.server import Server
from dpnn.strategies.downpour.worker import Worker
from dpnn.strategies.mirrored import Mirrored
from dpnn.team import Team


def run(world: World, request: StopRequest, start: Start) -> int:
    """Train on all ranks; the exit code. DamagedError, on all, where the checkpoint to go on from is. Collective."""
    mesh = Mesh(world, start.job.parallel.parts, start.job.parallel.servers)
    with deadline(world.timeout_s, "preparing the lines between workers and servers", world.fail):
        link = world.comm.Dup()
    watchdog = Watchdog(world, start.job.parallel, start.folder, RunFolder(start.folder).event)
    if mesh.server is not None:
        return serve(world, mesh, link, request, start, watchdog)
    replica = Replica(world, mesh, link, request, start)
    with closing(replica.journal), watchdog:
        return replica.run()


class Course:
    """The run's steps, those of all replicas together, each of a replica's batch; and who holds which parameters."""

    def __init__(self, start: Start) -> None:
        job = start.job
        counts, block = start.train.counts, start.train.block
        owners = start.train_at.owners
        self.sampler = Sampler(counts, block, start.lanes, start.global_batch, start.window, job.seed, owners=owners)
        self.lanes = [self.sampler.lane_steps(lane) for lane in range(start.lanes)]
        self.epoch = sum(self.lanes)
        """Steps of an epoch."""
        self.leases = start.leases or {"next": [start.epoch, 0], "left": [], "steps": start.epoch * self.epoch}
        """Where the run goes on."""
        self.shift = start.steps - self.leases["steps"]
        """A run that began with another strategy counted other steps."""
        self.total = job.train.epochs * self.epoch or job.train.steps - self.shift
        self.rate = schedule(job.schedule, job.optimizer.lr, self.epoch, self.total)
        self.placed = placed = spread(models.graph(job, start.network, start.shape), start.placement)
        self.pieces = [lay(placed.nodes(part)) for part in range(placed.parts)]
        """What each part holds."""
        sizes = [pieces[-1].end if pieces else 0 for pieces in self.pieces]
        self.shards = deal(sizes, job.parallel.servers, first=placed.reader)
        """What each server holds: the first one, which leases the lanes, serves the part that reads."""

    def counts(self, lane: int, step: int, microbatches: int) -> list[tuple[int, int]]:
        """For each micro-batch of a lane's step: (samples of this replica, samples that statistics are taken over)."""
        sampler = self.sampler
        rows = min(sampler.share, int(sampler.cuts[lane + 1] - sampler.cuts[lane]) - step * sampler.share)
        cuts = [rows * i // microbatches for i in range(microbatches + 1)]
        return [(hi - lo, hi - lo) for lo, hi in pairwise(cuts)]


def serve(world: World, mesh: Mesh, link: Any, request: StopRequest, start: Start, watchdog: Watchdog) -> int:
    """Be a server until the run is over; the exit code."""
    job, number = start.job, mesh.server or 0
    course, folder, limit_s = Course(start), RunFolder(start.folder), job.parallel.stall_abort_s
    part, lo, hi = course.shards[number]
    whole = course.pieces[part]
    pieces, segments = clip(whole, lo, hi), cut(segments_of(whole), lo, hi)
    team = Team(job.backend.threads or world.threads())
    backends, _ = choose_backends(job, team)
    kernels = backends[0].kernels

    params = np.zeros(hi - lo, backends[0].dtype)
    state = {name: np.zeros_like(params) for name in STATES[job.optimizer.name]}
    if start.found is not None:
        load(world, start.found, {name: sliced(pieces, flat) for name, flat in {"": params, **state}.items()})
    else:
        for piece in pieces:
            flat = params[piece.offset : piece.end]
            flat[...] = draw(job.seed, piece.name, piece.spec, piece.lo, piece.hi, flat.dtype)

    ledger = None
    if number == 0:
        ledger = Ledger(course.lanes, course.total, mesh.replicas, start.train_at.owners)
        ledger.resume(course.leases)
    name = f"server-{number}-of-{mesh.servers}"
    order = (
        Replay(start.replay / "order" / name)
        if start.replay
        else Order(start.folder / "order" / name if job.parallel.record else None)
    )
    metrics = Metrics(folder.metrics)

    def parting(server: Server) -> None:
        counts = np.trim_zeros(server.histogram, "b").tolist()
        metrics.write("event", event="staleness", server=number, pushes=counts, discarded=server.discarded)
        metrics.close()

    server = Server(
        link, mesh.replicas, params, state,
        lambda params, grads, state: Optimizer(job.optimizer, segments, params, grads, team, kernels, state),
        course.rate, job.parallel, order, ledger, lambda: request.asked, parting, limit_s, mesh.parts, part,
    )  # fmt: skip
    server.steps = course.leases["steps"]

    shards = InParts(folder.checkpoints, mesh.servers, mesh.crew.first(new_mark))

    def write(steps: int, params: Array, state: dict[str, Array], leases: dict[str, Any], note: Note) -> Path | None:
        slices = {name: sliced(pieces, flat) for name, flat in state.items()}
        shards.write(course.shift + steps, number, sliced(pieces, params), slices, note)
        if number != 0:
            return None
        epoch, lane = leases["next"]
        epoch, step = min([(epoch, lane), *((run[0], 1) for run in leases["left"])])
        info = {**start.info(), "leases": leases}
        return shards.complete(course.shift + steps, epoch, step, info, job.output.keep, note)

    def tell(steps: int, path: Path) -> None:
        metrics.write("event", event="checkpoint", step=course.shift + steps, path=str(path))

    every = max(1, round(job.output.checkpoint_every * course.epoch))
    with watchdog, denormals_flushed():  # as where replicas update their own
        server.run(Cut(server, mesh.crew.comm, write, tell, every).turn)
    return Stopped.exit_code if server.steps < course.total else 0


class Replica:
    """A replica of the network, or a part of one, on this rank."""

    def __init__(self, world: World, mesh: Mesh, link: Any, request: StopRequest, start: Start) -> None:
        """Collective over the workers."""
        job, crew = start.job, mesh.crew
        limit_s = job.parallel.stall_abort_s
        self.job, self.start, self.mesh, self.request = job, start, mesh, request
        self.course = course = Course(start)
        self.reads = mesh.part == course.placed.reader
        self.decoders = job.data.threads or world.threads()
        """Threads that make batches."""
        self.model = model = Model(job, course.placed, mesh.part, world.threads(), world.node.rank)
        if mesh.parts > 1:
            check_alike(crew, model)
        folder = RunFolder(start.folder)
        kept = RunFolder(start.replay) if start.replay else folder
        model.choices.update({**crew.first(kept.read_choices), **start.chosen})
        store = model.store
        if start.found is not None:  # the servers read
            load(world, start.found, dict.fromkeys(("", *STATES[job.optimizer.name]), ()))
        descent = Optimizer(
            replace(job.optimizer, name="sgd", nesterov=False),
            segments_of(store.pieces),
            store.params,
            store.grads,
            model.team,
            model.kernels,
        )
        parts = Parts(mesh.model, course.placed.reader, limit_s) if mesh.parts > 1 else None
        held = {server: (lo, hi) for server, (part, lo, hi) in enumerate(course.shards, crew.size) if part == mesh.part}
        args = (store.params, store.grads, store.n_trained, descent, job)
        self.worker = Worker(link, crew.size, *args, parts, held)

        lanes, pieces = course.sampler.lanes, job.parallel.microbatches
        rows = course.sampler.max_micro_rows(lanes, pieces)
        evaluates = start.test is not None and job.train.eval_every > 0
        training, held_out = model.lay_out(
            crew, lambda: (model.training(rows, pieces), model.evaluation(rows) if evaluates else None)
        )
        strategy: Strategy = self.worker
        if model.memory.name:  # the backend computes on a device
            strategy = Mirrored(self.worker, store.params_wire, store.grads_wire, limit_s)
        self.executor = model.executor(training, strategy=strategy, eager=True, mesh=mesh)
        self.alone = self.together = None
        if held_out and start.test:
            evaluation = model.executor(held_out, mesh=mesh)
            place = (start.test, start.train.mean, start.train.std, self.decoders)
            # Between its steps the first replica looks by itself, where it can; at the end all look together.
            if mesh.replica == 0 and start.test_at.whole:
                self.alone = Evaluator(mesh.model, evaluation, job, Location(start.test_at.folder), *place)
            self.together = Evaluator(crew.comm, evaluation, job, start.test_at, *place)
        self.first = mesh.replica == 0 and self.reads
        """Whether this rank tells of the run: the first server speaks to it."""
        self.journal = Journal(folder, course.shift + course.total, self.first)
        self.folder, self.code = folder, 0
        self.skipped = Skipped(job.data.bad_limit)
        self.seen = self.worker.known._replace(steps=course.leases["steps"])
        self.evaluated = course.leases["steps"] // course.epoch

    def run(self) -> int:
        """Train until there is no more to do, or the run stops; the exit code."""
        self._tell_start()
        begin, worker, course = perf_counter(), self.worker, self.course
        leases, loader = Leases(), None
        if self.reads:
            loader = Loader(
                self.start.train_at.folder, self.start.train, course.sampler, 0, course.sampler.lanes,
                view=self.start.view(self.model.dtype), dtype=self.model.dtype, window_mb=self.job.data.window_mb,
                threads=self.decoders, skips=self.job.data.on_bad == "skip", runs=leases,
                limit_s=self.job.parallel.stall_abort_s, empty=self.model.memory.host,
            )  # fmt: skip
        held: deque[Run] = deque()
        try:
            more = self._lease(held, leases)
            if held:
                worker.join()
                self.seen = worker.known
                more = more and self._lease(held, leases)
                self._train(loader, leases, held, more)
        finally:
            if loader is not None:
                loader.close()
        worker.leave()
        worker.await_others()
        worker.join()
        self._last_words(perf_counter() - begin)
        return self.code

    def _last_words(self, seconds: float) -> None:
        """All replicas are done: look at what came out, end the servers and the run. Collective over the workers."""
        worker, course = self.worker, self.course
        known, stopped = worker.known, worker.known.steps < course.total
        self.skipped.check(known.bad, max(-(-known.steps // course.epoch) - self.start.epoch, 1))
        if known.steps != self.seen.steps:
            self._tell_step(Took(seconds, 0.0, seconds, 0.0))
        if self.together is not None and not stopped:
            self.model.store.params_wire.push()
            scores = self.together.run(worker.tick)
            self.journal.scores(str(scores), -(-known.steps // course.epoch), self._steps(), **asdict(scores))
        self.mesh.crew.meet()  # nobody asks a server any more
        if self.mesh.replica == 0:
            worker.close()
        worker.see_off()
        self.code = Stopped.exit_code if stopped else 0
        self.journal.end(self._steps(), known.samples, known.bad, seconds, self.code)

    def _lease(self, held: deque[Run], leases: Leases) -> bool:
        """One more run of steps to do; whether there was one."""
        run = self.worker.lease()
        if run is not None:
            held.append(run)
            leases.add(run)
        return run is not None

    def _train(self, loader: Loader | None, leases: Leases, held: deque[Run], more: bool) -> None:
        """Go through the leased steps, leasing more in time."""
        worker, course, micro = self.worker, self.course, self.job.parallel.microbatches
        took, step = Took(0.0, 0.0, 0.0, 0.0), held[0].first
        while held and not worker.stop:
            begin, run = perf_counter(), held[0]
            PULSE.epoch, PULSE.step, PULSE.doing = run.epoch + 1, self._steps() + 1, "reading a batch"
            batch = loader.next() if loader is not None else no_samples(run.epoch, step)
            read = perf_counter()
            counts = course.counts(run.lanes.start, step, micro)
            worker.asked, worker.samples = worker.asked or self.request.asked, sum(rows for rows, _ in counts)
            worker.rate, worker.skipped = worker.known.rate, len(batch.bad)
            PULSE.doing = self.executor
            try:
                self.executor.run(batch, counts, worker.samples)
            except NotFiniteError as error:
                self._explain(error)
            computed = perf_counter()
            if loader is not None:
                loader.release(batch)
            self.journal.bad_samples(batch.bad)
            self.skipped.note(batch.bad)
            self.skipped.check(worker.known.bad, run.epoch - self.start.epoch + 1)
            step += 1
            if step > run.last:
                held.popleft()
                more = more and not worker.stop and self._lease(held, leases)
                step = held[0].first if held else 0
            end = perf_counter()
            took = Took(
                took.step + end - begin, took.read + read - begin,
                took.wait + worker.wait_s + end - computed, took.update + worker.update_s,
            )  # fmt: skip
            if worker.known.steps != self.seen.steps:
                PULSE.doing = "telling of the step"
                self._tell_step(took)
                took = Took(0.0, 0.0, 0.0, 0.0)
            if self.alone is not None:
                self._evaluate(self.alone)

    def _explain(self, error: NotFiniteError) -> None:
        """Raise, on all parts of the replica, which layer is the first that isn't finite."""
        mine, ranks = self.executor.not_finite(), Ranks(self.mesh.model, self.job.parallel.stall_abort_s)
        layers = [ranks.first(lambda: mine, part) for part in range(self.mesh.parts)]
        layer = next(filter(None, layers), "no layer")
        raise NotFiniteError(
            f"{layer}: its output is not finite (step {self._steps() + 1}: {error}); "
            "lower optimizer.lr, or set optimizer.clip; go on from the last checkpoint with --resume"
        ) from error

    def _evaluate(self, evaluator: Evaluator) -> None:
        """Look at the network after so many epochs of all. Collective over the parts of the first replica."""
        worker, course, every = self.worker, self.course, self.job.train.eval_every
        epoch = worker.steps // course.epoch
        if worker.stop or worker.steps >= course.total or epoch // every <= self.evaluated // every:
            return
        worker.join()
        self.model.store.params_wire.push()
        scores = evaluator.run(worker.tick)
        self.journal.scores(str(scores), epoch, self._steps(), **asdict(scores))
        self.evaluated = epoch

    def _steps(self) -> int:
        """Of all replicas since the start of the run, as far as this one knows."""
        steps: int = self.course.shift + self.worker.known.steps
        return steps

    def _tell_step(self, took: Took) -> None:
        """Pass on what the servers have said."""
        known, seen, course = self.worker.known, self.seen, self.course
        samples = known.samples - seen.samples
        loss = (known.loss - seen.loss) / max(samples, 1)
        self.journal.step(
            -(-known.steps // course.epoch), self._steps(), loss, known.rate, samples, took,
            staleness=known.staleness, discarded=known.discarded, bad_samples=known.bad,
        )  # fmt: skip
        self.seen = known

    def _tell_start(self) -> None:
        job, start, graph, mesh, course = self.job, self.start, self.model.graph, self.mesh, self.course
        backends = "+".join(dict.fromkeys(group.backend.name for group in self.executor.plan.groups))
        ranks, replicas = mesh.crew.size + mesh.servers, f"{mesh.replicas} replicas"
        if mesh.parts > 1:
            replicas += f" of {mesh.parts} parts"
        self.journal.start(
            f"{job.model.name}, {graph.n_params:,} parameters, on {replicas} and {mesh.servers} servers "
            f"({backends}); {course.sampler.samples:,} samples, {course.total} steps of {job.train.replica_batch}",
            mpi=library.version(), ranks=ranks, replicas=mesh.replicas, parts=mesh.parts, servers=mesh.servers,
            parameters=graph.n_params, seed=job.seed, backend=backends, threads=self.model.team.size,
            replica_batch=job.train.replica_batch, lanes=start.lanes, from_step=start.steps,
            library=self.model.backends[0].about,
        )  # fmt: skip
        for event, text in (*self.model.notes, *self.start.notes):
            self.journal.event(event, text)
        if self.together is not None and not start.test_at.whole:
            self.journal.event(
                "evaluated_at_the_end",
                f"the network is evaluated at the end only: the first replica's node hasn't all of {job.data.test}",
            )
        if self.first:
            self.folder.write_choices(self.model.choices)
        for reason in start.damaged:
            self.journal.event("damaged_checkpoint", f"passed over a damaged checkpoint: {reason}", path=reason)
        if start.steps:
            left = f"going on at step {start.steps + 1}"
            if course.leases["steps"] >= course.total:
                left = f"all {course.total} steps are taken; set train.epochs or train.steps higher to go on"
            self.journal.event("resumed", left, step=start.steps)
