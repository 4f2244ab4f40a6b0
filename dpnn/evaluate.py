"""How good a network is on held-out data: `dpnn eval`, and the evaluation between the epochs of `dpnn train`.

Each replica takes its own run of the samples, every sample counts once, and the sums meet at the end: no rank waits
for another before that.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dpnn import checkpoint, config, models
from dpnn.backends.base import Backend
from dpnn.backends.onednn import OneDNN, Unavailable
from dpnn.backends.reference import Reference
from dpnn.checkpoint import Contents
from dpnn.comm.edges import Edges
from dpnn.comm.faults import wait
from dpnn.comm.mesh import Mesh
from dpnn.comm.pulse import PULSE
from dpnn.comm.ranks import Ranks
from dpnn.comm.reduce import BucketReducer
from dpnn.comm.share import share
from dpnn.comm.world import World
from dpnn.data import Loader, Location, Manifest, Sampler, Skipped, network_shape, no_samples, view_of
from dpnn.errors import DataError, JobError
from dpnn.locations import locate, readers
from dpnn.machine import has_gpu_driver
from dpnn.native import Kernels
from dpnn.nn import Network
from dpnn.optim import Segment, merge
from dpnn.plan import Arena, Executor, Layout, Piece, Placed, Plan, Store, Strategy, Sum, compile_plan
from dpnn.state import check_network, load, passing_over_damaged, sliced
from dpnn.team import Team

Array = NDArray[Any]
L = TypeVar("L")
MOST_ROWS = 64
"""Samples of one evaluation batch, where training doesn't take fewer."""


@dataclass(frozen=True)
class Scores:
    """Errors are shares of the samples (0 to 1); `loss` is the mean over them."""

    samples: int
    top1_error: float
    top5_error: float
    loss: float
    bad_samples: int = 0
    """Of them, those whose place another one has taken."""

    def __str__(self) -> str:
        bad = f", {self.bad_samples} of them replaced" if self.bad_samples else ""
        return (
            f"top-1 error {self.top1_error:.2%}, top-5 error {self.top5_error:.2%}, "
            f"loss {self.loss:.4f} ({self.samples} samples{bad})"
        )


class Model:
    """A network on this rank: its graph, the parameters of my nodes, and the memory that its plans share."""

    def __init__(self, job: config.Job, placed: Placed, part: int, threads: int, local_rank: int | None = None) -> None:
        self.placed, self.part, self.graph = placed, part, placed.graph
        self.team = Team(job.backend.threads or threads)
        self.backends, self._slow = choose_backends(job, self.team, local_rank)
        self.kernels = self.backends[0].kernels
        self.arithmetic = self.backends[0].arithmetic
        self.dtype = self.backends[0].dtype
        self.memory = self.backends[0].memory
        self.store = Store(placed.nodes(part), self.dtype, self.memory)
        self.arena = Arena(self.memory)
        self._job = job

    def training(self, rows: int, microbatches: int = 1, bucket_nbytes: int = 0, grains: bool = False) -> Layout:
        """The plan of a training step with at most `rows` samples in a micro-batch, laid out."""
        pieces, pipeline = self.store.pieces, self._job.parallel.pipeline
        place = (self.placed, self.part, self.backends)
        return self._layout(compile_plan(*place, "train", rows, microbatches, pieces, bucket_nbytes, grains, pipeline))

    def evaluation(self, rows: int) -> Layout:
        """The plan of a forward pass over at most `rows` samples, laid out."""
        return self._layout(compile_plan(self.placed, self.part, self.backends, "eval", min(rows, MOST_ROWS)))

    def lay_out(self, ranks: Ranks, make: Callable[[], L]) -> L:
        """What `make` lays out. Collective over `ranks`, of which the first are the parts of the first replica.

        What backends choose by timing is timed there, one part after the other; all other ranks take it over, so that
        like ranks compute alike.
        """
        made: list[L] = []

        def on_turn() -> dict[str, str]:
            made.append(make())
            return self.choices

        for part in range(self.placed.parts):
            self.choices.update(ranks.first(on_turn, part))
        return made[0] if made else make()

    @property
    def choices(self) -> dict[str, str]:
        """What was chosen by timing."""
        return self.backends[0].choices

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Events to be told of, with a text for people: what makes this rank, or the next run, slower."""
        unkept = self.backends[0].unkept
        lost = f"what was timed or compiled is lost for other runs: {unkept}" if unkept else ""
        return [(event, text) for event, text in (("slow_backend", self._slow), ("no_cache", lost)) if text]

    def executor(
        self,
        layout: Layout,
        sum_over: Callable[[Array], Sum] | None = None,
        strategy: Strategy | None = None,
        eager: bool = False,
        mesh: Mesh | None = None,
    ) -> Executor:
        """The plan of a layout, bound to its memory; `mesh`, and then collective, where it has several parts."""
        edges = None
        if mesh is not None and self.placed.parts > 1:
            crews = dict.fromkeys(message.crew for message in layout.plan.messages if message.crew)
            edges = Edges(mesh, list(crews), self._job.parallel.stall_abort_s)
        return Executor(layout, self.store, self.arena, self._job.seed, sum_over, strategy, eager, edges)

    def _layout(self, plan: Plan) -> Layout:
        """Where the buffers of a plan lie; its room is asked for. All layouts are made before the first executor."""
        layout = Layout(plan)
        self.arena.reserve(layout.nbytes)
        return layout


def choose_backends(job: config.Job, team: Team, local_rank: int | None = None) -> tuple[list[Backend], str]:
    """The backends to ask, best first, each on the rank's threads; and a line on why not the best.

    `local_rank`: the rank's number on its node, where it computes and may have a GPU. On the CPU the reference comes
    last: it computes what the others decline. JobError where the one asked for can't be had.
    """
    options = job.backend
    threadpool_limits(team.size)
    if options.may_use_gpu and local_rank is not None and (options.name == "cuda" or has_gpu_driver()):
        from dpnn.backends.cuda import Cuda, device_of_rank

        whom = "this rank's device, and others that it sums with"
        try:
            until = partial(wait, whom=whom, limit_s=job.parallel.stall_abort_s)
            return [Cuda(device_of_rank(local_rank), cpu_kernels(team), until)], ""
        except Unavailable as error:
            if options.name == "cuda":
                raise JobError(f"this job needs a GPU: {error}") from error
    reference = Reference(np.float64 if options.precision == "float64" else np.float32)
    if options.name == "reference" or options.precision == "float64":
        return [reference], ""
    try:
        return [OneDNN(team, options.precision == "bfloat16"), reference], ""
    except Unavailable as error:
        if options.needs_onednn:
            raise JobError(f"this job needs the onednn backend: {error}") from error
        return [reference], f"computing on the reference backend, which is slow: {error}"


def cpu_kernels(team: Team) -> Kernels | None:
    """Our compiled CPU kernels, where they were built."""
    try:
        return Kernels(team.size)
    except Unavailable:
        return None


def check_alike(ranks: Ranks, model: Model) -> None:
    """JobError, on all of `ranks`, where they don't compute on one backend: arrays cross between parts as they lie."""
    kind = f"{model.backends[0].name} in {model.dtype}"
    first = ranks.first(lambda: kind)
    told = f"computes on {kind}, the first rank on {first}; set backend.name to one that all have"
    ranks.agree(JobError(told) if kind != first else None)


def check_devices(ranks: Ranks, names: Sequence[str]) -> None:
    """JobError, on all of `ranks`, where only some have a device: gradients are summed in one way. `names`: of all."""
    device = next(filter(None, names), "")
    told = (
        f"computes on the CPU, for want of a GPU, and others on GPUs ({device}): in allreduce all ranks do the one or "
        'the other; set backend.name = "cuda" to see what is missing, or "onednn" for CPUs'
    )
    ranks.agree(JobError(told) if any(names) and not names[ranks.rank] else None)


def check_host(ranks: Ranks, names: Sequence[str]) -> None:
    """JobError, on all of `ranks`, where one computes on a device, whose memory is lost with it. `names`: of all."""
    device = next(filter(None, names), "")
    told = f"computes on {device}: only on CPUs do the others go on where a rank dies; leave out --with-faults"
    ranks.agree(JobError(told) if names[ranks.rank] else None)


def segments_of(pieces: Sequence[Piece]) -> tuple[Segment, ...]:
    """How the numbers of a network are updated."""
    return merge(Segment(piece.offset, piece.end, piece.spec.decay, piece.spec.statistic) for piece in pieces)


class Evaluator:
    """Runs a network over a folder of shards, on all ranks of a communicator together."""

    def __init__(
        self,
        ranks: Any,
        executor: Executor,
        job: config.Job,
        at: Location,
        test: Manifest,
        mean: Sequence[float],
        std: Sequence[float],
        threads: int,
    ) -> None:
        """Collective over `ranks`, an MPI communicator: each replica of the network takes its part of the samples.

        Its ranks are those of whole replicas, part by part. `mean` and `std`, a number for each channel, are those of
        the data that the network was trained on. `threads`: that make batches.
        """
        options, limit_s = job.data, job.parallel.stall_abort_s
        plan = executor.plan
        rows, parts = plan.rows, plan.placed.parts
        replica, replicas = ranks.rank // parts, ranks.size // parts
        self._executor, self._replica, self._replicas = executor, replica, replicas
        self._sampler = Sampler(
            test.counts, test.block, replicas, rows * replicas, window=rows, seed=0, shuffle=False, owners=at.owners
        )
        if at.owners is not None:
            self._sampler.deal(at.owners.runs())
        self._skipped = Skipped(options.bad_limit)
        view = view_of(
            test, size=options.size, frames=options.frames, mean=mean, std=std, dtype=executor.dtype, training=False
        )
        self._open = partial(
            Loader, at.folder, test, self._sampler, replica, replicas, view=view, dtype=executor.dtype,
            threads=threads, skips=options.on_bad == "skip", last=(0, self._sampler.steps - 1), limit_s=limit_s,
            empty=executor.memory.host,
        )  # fmt: skip
        self._reads = plan.part == plan.placed.reader
        self._sums = np.zeros(5)  # samples, not the first, not among the first five, loss, bad samples
        self._reducer = BucketReducer(ranks, self._sums, limit_s, "scores")

    def run(self, tick: Callable[[], object] = lambda: None) -> Scores:
        """Collective over the communicator: the scores over all samples, the same on each of its ranks.

        `tick` is called after every batch.
        """
        self._sums[:] = 0.0
        loader = self._open() if self._reads else None
        try:
            for step in range(self._sampler.steps):
                self._take(step, loader)
                tick()
        finally:
            if loader is not None:
                loader.close()
        PULSE.doing = "summing the scores"
        self._reducer.start(0, self._sums.size)
        self._reducer.finish()
        samples, first, five, loss, bad = self._sums
        self._skipped.check(int(bad))
        return Scores(int(samples), first / samples, five / samples, loss / samples, int(bad))

    def _take(self, step: int, loader: Loader | None) -> None:
        executor = self._executor
        counts = self._sampler.micro(step, self._replica, self._replicas, 1)
        rows = counts[0][0]
        PULSE.doing = "reading held-out samples"
        PULSE.beats += 1
        batch = loader.next() if loader is not None else no_samples(0, step)
        PULSE.doing = executor
        executor.run(batch, [(rows, rows)], total=1)
        if loader is not None:
            loader.release(batch)
        if (results := executor.results) is not None:
            scores, labels = results
            better = n_better(scores[:rows], labels[:rows])
            self._sums[:3] += (rows, (better >= 1).sum(), (better >= 5).sum())
        self._sums[3:] += (executor.loss, len(batch.bad))
        self._skipped.note(batch.bad)


@dataclass(frozen=True)
class Source:
    """What rank 0 reads for all ranks: the job of a checkpoint, its network, and the held-out data."""

    job: config.Job
    network: Network
    shape: tuple[int, ...]
    """Of a sample as the network sees it."""
    test: Manifest
    mean: Sequence[float]
    std: Sequence[float]
    found: Contents
    damaged: Sequence[str]
    """Newer checkpoints that could not be used, and why."""


def evaluate(world: World, path: str, overrides: Sequence[str]) -> int:
    """Print the scores on `data.test` of a run folder's newest checkpoint, or of one checkpoint file; the exit code."""
    return passing_over_damaged(
        lambda damaged: score(world, world.first(lambda: read_source(Path(path), damaged, overrides)))
    )


def score(world: World, source: Source) -> int:
    """Print the scores of a checkpoint; the exit code. Collective; DamagedError, on all ranks, where it is."""
    job, limit_s = source.job, source.job.parallel.stall_abort_s
    mesh = Mesh(world)
    placed = Placed.whole(models.graph(job, source.network, source.shape))
    model = Model(job, placed, mesh.part, world.threads(), world.node.rank)
    store = model.store
    load(world, source.found, {"": sliced(store.pieces if mesh.replica == 0 else (), store.params)})
    share(mesh.data, store.params, limit_s)
    store.params_wire.push()
    executor = model.executor(model.lay_out(world, lambda: model.evaluation(MOST_ROWS)))
    damaged = (f"passed over a damaged checkpoint: {name}" for name in source.damaged)
    for text in (*damaged, *(text for _, text in model.notes)) if world.rank == 0 else ():
        print(text, file=sys.stderr)
    threads = job.data.threads or world.threads()
    who = readers(world, mesh.replica, mesh.replicas)
    at = locate(world, who, job.data, job.data.test, source.test)
    evaluator = Evaluator(mesh.data, executor, job, at, source.test, source.mean, source.std, threads)
    scores = evaluator.run()
    if world.rank == 0:
        print(scores)
    return 0


def find_checkpoint(path: Path, damaged: Mapping[Path, str]) -> tuple[Contents, list[str]]:
    """A checkpoint (file or folder), or the newest good one of a run folder and what is wrong with newer ones.

    `damaged`: what reading has shown to be wrong with some. DataError where there is none.
    """
    if path.is_file() or (path / checkpoint.INFO).is_file():
        return checkpoint.look(path, damaged), []
    newest = checkpoint.newest(path / "checkpoints", damaged)
    if newest is None:
        raise DataError(f"{path} is neither a checkpoint nor a run folder with one; name what `dpnn train` printed")
    return newest


def read_source(path: Path, damaged: Mapping[Path, str], overrides: Sequence[str]) -> Source:
    """What there is to evaluate: a checkpoint (see find_checkpoint), its job, and the data to evaluate on."""
    found, passed_over = find_checkpoint(path, damaged)
    job = config.parse(found.info["job"], overrides)
    if not job.data.test:
        raise JobError(
            "data.test is not set, so there is nothing to evaluate on; name a folder with --set data.test=FOLDER"
        )
    test = Manifest.read(job.data.test)
    info = found.info
    shape = tuple(info["shape"])
    check_held_out(job.data, test, shape, info["labels"], job.model.classes)
    network = models.build(job.model.name, job.model.classes, shape, job.model.options)
    check_network(found, models.graph(job, network, shape), [""])
    return Source(job, network, shape, test, info["mean"], info["std"], found, passed_over)


def check_held_out(options: config.Data, test: Manifest, shape: tuple[int, ...], labels: str, classes: int) -> None:
    """DataError where the samples of `options.test` aren't of the kind that a network was trained on.

    `shape`: of a sample as the network sees it.
    """
    found_shape = network_shape(test, options.size, options.frames)
    for what, found, wanted in (("shape", found_shape, shape), ("labels", test.labels, labels)):
        if found != wanted:
            raise DataError(
                f"{options.test}: its {what} is {found}, that of the data that the network was trained on {wanted}; "
                "pack both alike"
            )
    if test.num_classes > classes or (labels == "multi" and test.num_classes != classes):
        raise DataError(f"{options.test}: it has {test.num_classes} classes, the network {classes}; pack both alike")


def n_better(scores: Array, labels: Array) -> Array:
    """How many wrong classes score at least as high as a sample's true one (the best of several): (rows,).

    `scores`: (rows, K); `labels`: (rows,) class numbers, or (rows, K) of 0 and 1. A score that isn't a number counts as
    better, and of a sample without a true class all classes are.
    """
    true = labels > 0 if labels.ndim > 1 else np.arange(scores.shape[1]) == labels[:, None]
    best = np.where(true, scores, -np.inf).max(axis=1, keepdims=True)
    better: Array = (~(scores < best) & ~true).sum(axis=1)
    return better
