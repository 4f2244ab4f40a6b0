"""An asynchronous run (Downpour SGD), from its building to its last checkpoint: what train.py is for the others.

The last ranks are servers (`serve`): each holds a shard of the parameters, never the whole network. All others are
replicas (`Replica`), or parts of them: each replica leases lanes of the data from the first server, goes through them,
fetches and pushes when it likes; a part does so with servers of its own. Replicas meet twice: when the run is built,
and when the last one is done.
"""

import os
import signal
from collections import deque
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any

from msgspec.structs import replace

from dpnn.cluster.signals import StopRequest
from dpnn.comm import library
from dpnn.comm.faults import deadline, message, tell
from dpnn.comm.losses import Losses, outlives
from dpnn.comm.mesh import Mesh
from dpnn.comm.pulse import PULSE
from dpnn.comm.ranks import Ranks
from dpnn.comm.watchdog import Watchdog
from dpnn.comm.world import World
from dpnn.course import Course
from dpnn.data import Leases, Loader, Location, Run, Skipped, no_samples
from dpnn.errors import DpnnError, NotFiniteError, RankError, Stopped
from dpnn.evaluate import Evaluator, Model, check_alike, segments_of
from dpnn.observe.folder import RunFolder
from dpnn.observe.journal import Journal, Took
from dpnn.optim import STATES, Optimizer
from dpnn.plan import Strategy
from dpnn.prepare import Start
from dpnn.serving import serve
from dpnn.state import load
from dpnn.strategies.downpour.parts import Parts
from dpnn.strategies.downpour.worker import Worker
from dpnn.strategies.mirrored import Mirrored


def run(world: World, request: StopRequest, start: Start) -> int:
    """Train on all ranks; the exit code. Collective."""
    parallel, folder = start.job.parallel, RunFolder(start.folder)
    mesh = Mesh(world, parallel.parts, parallel.servers)
    with deadline(world.timeout_s, "preparing the lines between workers and servers", world.fail):
        link = world.comm.Dup()
    if mesh.server is not None:
        return serve(world, mesh, link, request, start, Watchdog(world, parallel, start.folder, folder.event))
    alone = partial(die_alone, world.rank, mesh.replica, folder) if outlives() else None
    watchdog = Watchdog(world, parallel, start.folder, folder.event, alone)
    replica = Replica(world, mesh, link, request, start)
    try:
        with closing(replica), watchdog:
            code = replica.run()
        world.lost = replica.worker.lost > 0 or bool(replica.worker.links.holders.dead)
        return code
    except Exception as error:
        foreseen = isinstance(error, DpnnError) and not isinstance(error, RankError)
        links = replica.worker.links
        holders = links.holders
        holders.dead.update(rank - mesh.crew.size for rank in Losses(link).new() if rank >= mesh.crew.size)
        if alone and not foreseen and not holders.lost and not links.unserved:
            alone(error)
        raise


def die_alone(rank: int, replica: int, folder: RunFolder, error: Exception) -> None:
    """An error that has nothing to do with the job or its data ends this rank alone; the others go on without it.

    It kills itself: an exit code other than 0 would take the others along.
    """
    text = message(error, rank)
    tell(f"{text}\ndpnn: rank {rank} ends, the others go on")
    with suppress(DpnnError):
        folder.event("worker_failed", rank=rank, replica=replica, error=text)
    os.kill(os.getpid(), signal.SIGKILL)


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
        held = {shard: (lo, hi) for shard, (part, lo, hi) in enumerate(course.shards) if part == mesh.part}
        args = (store.params, store.grads, store.n_trained, descent, job)
        self.worker = Worker(link, crew.size, *args, parts, held, start.mirrored)

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
            # Between its steps the speaker looks by itself, where it can; at the end all look together, unless some may
            # have died.
            if start.test_at.whole:
                self.alone = Evaluator(mesh.model, evaluation, job, Location(start.test_at.folder), *place)
            if not start.test_at.whole or not outlives():
                self.together = Evaluator(crew.comm, evaluation, job, start.test_at, *place)
        self.tells = mesh.replica == 0 and self.reads
        """Whether this rank tells of the run: that of the replica which speaks for it."""
        self.journal = Journal(folder, course.shift + course.total, self.tells)
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
            self._lease(held, leases)
            if held and self.reads and self.mesh.replica >= self.mesh.replicas - self.job.parallel.spares:
                self.folder.event("spare_joined", rank=self.mesh.crew.rank, replica=self.mesh.replica)
            if held:
                worker.join()
                self.seen = worker.known
                self._lease(held, leases)
                self._train(loader, leases, held)
        finally:
            if loader is not None:
                loader.close()
        worker.leave()
        worker.await_others()
        worker.join()
        self._last_words(perf_counter() - begin)
        return self.code

    def _last_words(self, seconds: float) -> None:
        """All replicas are done. One of them tells what came out, and ends the run."""
        worker, course = self.worker, self.course
        known = worker.known
        stopped = bool(known.stop) and known.steps < course.total
        self.code = Stopped.exit_code if stopped else 0
        self.skipped.check(known.bad, max(-(-known.steps // course.epoch) - self.start.epoch, 1))
        if self.together is not None and not stopped and not worker.lost:
            self._look(self.together)
        if not worker.await_end(self.mesh.replica).over:
            self._speak()
            if known.steps != self.seen.steps:
                self._tell_step(Took(seconds, 0.0, seconds, 0.0))
            if self.together is None and self.alone is not None and not stopped:
                self._look(self.alone)
            worker.await_checkpoint()
            self.journal.end(self._steps(), known.samples, known.bad, seconds, self.code)
            worker.end()
        worker.part()

    def _look(self, evaluator: Evaluator) -> None:
        """Look at what came out. Collective over the replicas that the evaluator is of."""
        self.model.store.params_wire.push()
        scores = evaluator.run(self.worker.tick)
        epoch = -(-self.worker.known.steps // self.course.epoch)
        self.journal.scores(str(scores), epoch, self._steps(), **asdict(scores))

    def close(self) -> None:
        """Tell no more of the run."""
        self.journal.close()

    def _speak(self) -> None:
        """This replica speaks for the run, if it hasn't done so: those before it have died."""
        if self.reads and not self.tells:
            self.tells = True
            self.journal = Journal(self.folder, self.course.shift + self.course.total, first=True)

    def _lease(self, held: deque[Run], leases: Leases) -> None:
        """One more run of steps to do, if there is one."""
        run = self.worker.lease(busy=bool(held))
        if self.worker.speaker == self.mesh.replica:
            self._speak()
        if run is not None:
            held.append(run)
            leases.add(run)

    def _train(self, loader: Loader | None, leases: Leases, held: deque[Run]) -> None:
        """Go through the leased steps, leasing more in time."""
        worker, course, micro = self.worker, self.course, self.job.parallel.microbatches
        took, step = Took(0.0, 0.0, 0.0, 0.0), held[0].first
        while held and not worker.stop:
            begin, run = perf_counter(), held[0]
            PULSE.epoch, PULSE.step, PULSE.doing = run.epoch + 1, self._steps() + 1, "reading a batch"
            PULSE.beats += 1  # what is known of all replicas' steps rises only with a fetch
            batch = loader.next(worker.tick) if loader is not None else no_samples(run.epoch, step)
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
                if not worker.stop:
                    self._lease(held, leases)
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
            if self.alone is not None and worker.speaker == self.mesh.replica:
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
        mirrors = ", each mirrored by another," if start.mirrored else " without mirrors"
        if mesh.parts > 1:
            replicas += f" of {mesh.parts} parts"
        self.journal.start(
            f"{job.model.name}, {graph.n_params:,} parameters, on {replicas} and {mesh.servers} servers{mirrors} "
            f"({backends}); {course.sampler.samples:,} samples, {course.total} steps of {job.train.replica_batch}",
            mpi=library.version(), ranks=ranks, replicas=mesh.replicas, parts=mesh.parts, servers=mesh.servers,
            mirrored=start.mirrored, parameters=graph.n_params, seed=job.seed, backend=backends,
            threads=self.model.team.size, replica_batch=job.train.replica_batch, lanes=start.lanes,
            from_step=start.steps, library=self.model.backends[0].about,
        )  # fmt: skip
        for event, text in (*self.model.notes, *self.start.notes):
            self.journal.event(event, text)
        if self.together is not None and not start.test_at.whole:
            self.journal.event(
                "evaluated_at_the_end",
                f"the network is evaluated at the end only: the first replica's node hasn't all of {job.data.test}",
            )
        if self.tells:
            self.folder.write_choices(self.model.choices)
        for reason in start.damaged:
            self.journal.event("damaged_checkpoint", f"passed over a damaged checkpoint: {reason}", path=reason)
        if start.steps:
            left = f"going on at step {start.steps + 1}"
            if course.leases["steps"] >= course.total:
                left = f"all {course.total} steps are taken; set train.epochs or train.steps higher to go on"
            self.journal.event("resumed", left, step=start.steps)
