"""What rank 0 does before a run, for all ranks: read the job, the manifests and the checkpoint, make the run folder.

No other rank opens these files: the result is broadcast.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from dpnn import checkpoint, config, models
from dpnn.checkpoint import Contents
from dpnn.comm.losses import survives
from dpnn.comm.mesh import replicas_of
from dpnn.data import (
    Location,
    Manifest,
    Sampler,
    View,
    default_grains,
    default_lanes,
    default_window,
    network_shape,
    view_of,
)
from dpnn.errors import DataError, JobError
from dpnn.evaluate import check_held_out, choose_backends
from dpnn.nn import Network
from dpnn.observe.folder import RunFolder
from dpnn.observe.metrics import last_evaluated
from dpnn.observe.metrics import read as read_metrics
from dpnn.optim import STATES
from dpnn.plan import Placement
from dpnn.planning import assumed
from dpnn.state import check_network
from dpnn.team import Team

BUILT_IN = "digits"
BUILT_IN_FOLDER = "data/digits"
KEPT = ("seed", "global_batch", "lanes", "window", "order")
"""What decides which samples a step takes: it can't change in the middle of an epoch."""
LANE_STEPS = 16
"""About how many steps a leased lane has, where there are enough samples: work is dealt in such pieces."""


@dataclass(frozen=True)
class Start:
    """A job as resolved, what it reads, and where it starts."""

    job: config.Job
    folder: Path
    network: Network
    train: Manifest
    test: Manifest | None
    global_batch: int
    lanes: int
    rows: int
    """The most samples of a replica's step, about."""
    placement: Placement
    """By assumed costs, where measured ones are to decide (planning.py)."""
    window: int
    epoch: int = 0
    step: int = 0
    """The next step of the epoch."""
    steps: int = 0
    """Steps taken since the start of the run."""
    evaluated: int = 0
    """After how many steps the run was last evaluated."""
    leases: dict[str, Any] = field(default_factory=dict)
    """What was leased and has not arrived when the checkpoint was cut (strategies/downpour/ledger.py)."""
    replay: Path | None = None
    """The run whose order of arrival is repeated."""
    chosen: dict[str, str] = field(default_factory=dict)
    """What measured costs decided, to be kept with the run's other choices."""
    notes: tuple[tuple[str, str], ...] = ()
    """Events to be told of, with a text for people, once the ranks have looked."""
    found: Contents | None = None
    """The checkpoint to go on from."""
    damaged: tuple[str, ...] = field(default=())
    """Newer checkpoints that could not be used, and why."""
    train_at: Location = field(default=Location(""))
    test_at: Location = field(default=Location(""))
    """Where the data are read, once the ranks have looked (locations.py)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample as the network sees it."""
        return network_shape(self.train, self.job.data.size, self.job.data.frames)

    @property
    def mirrored(self) -> bool:
        """Whether each server's parameters have a copy on another one. Under MPI only."""
        parallel = self.job.parallel
        return parallel.mirror and parallel.servers > 1 and self.replay is None and survives()

    def view(self, dtype: Any) -> View:
        """What training sees of the samples. JobError, DataError where there can't be one."""
        options, train = self.job.data, self.train
        return view_of(
            train, augment=options.augment, size=options.size, frames=options.frames, seed=self.job.seed,
            mean=train.mean, std=train.std, dtype=dtype,
        )  # fmt: skip

    def info(self) -> dict[str, Any]:
        """What a checkpoint says of its run beside the arrays."""
        return {
            "job": self.job.dump(),
            "data": self.train.digest,
            "shape": self.shape,
            "labels": self.train.labels,
            "mean": self.train.mean,
            "std": self.train.std,
            "seed": self.job.seed,
            "lanes": self.lanes,
            "window": self.window,
            "owners": self.train_at.owners.digest if self.train_at.owners else "",
            "global_batch": self.global_batch,
            "order": "leased" if self.job.parallel.strategy == "downpour" else "together",
        }


def prepare(
    job_path: str | None,
    overrides: Sequence[str],
    resume: str | None,
    replay: str | None,
    ranks: int,
    damaged: Mapping[Path, str],
) -> Start:
    """Start a new run, or go on with a run folder (`resume`; "": the job's newest) from its newest checkpoint.

    `replay`: do the run of this folder again, in the order in which it went. `damaged`: checkpoints that were found so
    when they were read, and what is wrong with them.
    """
    if replay is not None:
        return again(RunFolder.existing(replay), overrides, ranks)
    if job_path and resume:
        raise JobError(f"a job file ({job_path}) and a run folder ({resume}): a run goes on with its own job; name one")
    name = Path(job_path or "").stem
    if resume is None:
        return anew(config.load(job_path or "", overrides), name, ranks)
    folder = RunFolder.existing(resume or config.load(job_path or "", overrides).output.dir, name)
    start = resolve(config.load(str(folder.job), overrides), folder.path, ranks)
    if start.job.parallel.record:
        raise JobError(
            "parallel.record = true: only a whole run can be recorded; go on with --set parallel.record=false"
        )
    newest = checkpoint.newest(folder.checkpoints, damaged)
    if newest is not None:
        start = going_on(start, *newest)
    try_out(start, ranks)
    folder.write_job(start.job.dump())
    folder.forget_failure()
    return start


def going_on(start: Start, found: Contents, damaged: Sequence[str]) -> Start:
    """The start from a checkpoint; JobError, DataError where that isn't possible."""
    start = with_order_of(found, start)
    check_same_run(found, start)
    leases = found.info.get("leases", {}) if found.step else {}  # at the end of an epoch there are none
    start = changed(start, epoch=found.epoch, step=found.step, steps=found.steps, leases=leases)
    start = changed(start, evaluated=last_evaluated(RunFolder(start.folder).metrics))
    return changed(start, found=found, damaged=tuple(damaged))


def anew(job: config.Job, name: str, ranks: int) -> Start:
    """A new run, in a new folder."""
    start = resolve(job, Path(), ranks)
    try_out(start, ranks)
    folder = RunFolder.create(start.job.output.dir, name)
    folder.write_job(start.job.dump())
    return changed(start, folder=folder.path)


def again(recorded: RunFolder, overrides: Sequence[str], ranks: int) -> Start:
    """A new run that repeats a recorded one. JobError where that isn't possible."""
    job = config.load(str(recorded.job))
    if not job.parallel.record:
        raise JobError(f"{recorded.path} was not recorded; record a run with --set parallel.record=true")
    starts = [line for line in read_metrics(recorded.metrics) if line["kind"] == "start"]
    if len(starts) != 1:
        raise JobError(f"{recorded.path} was started {len(starts)} times: only a run from its start can be repeated")
    if starts[0]["ranks"] != ranks:
        raise JobError(f"{recorded.path} ran on {starts[0]['ranks']} ranks, not {ranks}; start as many")
    fresh = replace(job, output=replace(job.output, dir=""), parallel=replace(job.parallel, record=False))
    name = re.sub(r"-\d+$", "", recorded.path.resolve().name)
    return changed(anew(config.parse(fresh.dump(), overrides), name, ranks), replay=recorded.path)


def resolve(job: config.Job, folder: Path, ranks: int) -> Start:
    """Read what the job names, and fill in what it leaves open: the number of classes and lanes."""
    job = with_built_in(job)
    train = Manifest.read(job.data.train)
    test = Manifest.read(job.data.test) if job.data.test else None
    shape = network_shape(train, job.data.size, job.data.frames)
    if test is not None:
        check_held_out(job.data, test, shape, train.labels, train.num_classes)
    classes = job.model.classes or train.num_classes
    if classes < train.num_classes or (train.labels == "multi" and classes != train.num_classes):
        raise JobError(
            f"model.classes = {classes}, but {job.data.train} has {train.num_classes} classes; leave the key out"
        )
    check_loss(job, train)
    network = models.build(job.model.name, classes, shape, job.model.options)
    replicas = replicas_of(ranks, job.parallel.parts, job.parallel.servers)
    if job.parallel.spares >= replicas:
        raise JobError(
            f"parallel.spares = {job.parallel.spares} of {replicas} replicas: at least one has to train from the "
            "beginning; start more ranks, or set fewer spares"
        )
    if job.parallel.strategy == "downpour":
        lanes = job.data.lanes or leased_lanes(train.samples, job.train.replica_batch, replicas)
        global_batch = lanes * job.train.replica_batch
    else:
        global_batch = job.train.global_batch or job.train.replica_batch * replicas
        lanes = job.data.lanes or default_lanes(global_batch, replicas)
    grains = default_grains(lanes) if job.train.reproducible and not job.train.grains else job.train.grains
    microbatches = job.parallel.microbatches or (1 if job.parallel.parts == 1 else 0)
    job = replace(
        job,
        model=replace(job.model, classes=classes),
        train=replace(job.train, grains=grains),
        parallel=replace(job.parallel, microbatches=microbatches),
    )
    rows = job.train.replica_batch or -(-global_batch // replicas)
    placement = Placement.whole()
    if job.parallel.parts > 1 or job.parallel.memory_gb:
        placement = assumed(job, models.graph(job, network, shape), rows)
    window = job.data.window or chosen_window(job, train, lanes, global_batch)
    return Start(job, folder, network, train, test, global_batch, lanes, rows, placement, window)


def chosen_window(job: config.Job, train: Manifest, lanes: int, global_batch: int) -> int:
    """The window where the job names none: a rank alone can hold it for all lanes, or, where they are leased, for one.

    So it doesn't depend on the number of ranks.
    """
    sample_nbytes = sum(shard.payload_bytes for shard in train.shards) / train.samples
    owned = 1 if job.parallel.strategy == "downpour" else lanes
    return default_window(
        train.samples, owned, max(global_batch // lanes, 1), train.block, sample_nbytes, job.data.window_mb
    )


def leased_lanes(samples: int, batch: int, replicas: int) -> int:
    """The number of lanes where they are leased: each a few steps long, and several for each replica."""
    steps = -(-samples // batch)
    return min(max(steps // LANE_STEPS, 4 * replicas), steps)


def with_built_in(job: config.Job) -> config.Job:
    """The job with "digits" replaced by the folders that it is packed into, on first use."""
    paths = {part: f"{BUILT_IN_FOLDER}/{part}" for part in ("train", "test") if getattr(job.data, part) == BUILT_IN}
    if paths and not (Path(BUILT_IN_FOLDER) / "train" / "manifest.json").exists():
        from dpnn.data.pack import pack

        pack(BUILT_IN, BUILT_IN_FOLDER)
    return replace(job, data=replace(job.data, **paths))


def with_order_of(found: Contents, start: Start) -> Start:
    """Window and lanes stay those of the checkpoint where the job names none; the lanes if the batch is the same."""
    info, batch, lanes = found.info, start.global_batch, found.info["lanes"]
    if not start.job.data.window:
        start = changed(start, window=info["window"])
    if start.job.parallel.strategy == "downpour" and info.get("order") == "leased":
        batch = start.job.train.replica_batch * lanes
    same = not start.job.data.lanes and info["global_batch"] == batch
    return changed(start, lanes=lanes, global_batch=batch) if same else start


def try_out(start: Start, ranks: int) -> None:
    """Build what is cheap to build: what every rank would refuse is refused before the run folder is touched."""
    replicas = replicas_of(ranks, start.job.parallel.parts, start.job.parallel.servers)
    job, train = start.job, start.train
    sampler = Sampler(
        train.counts, train.block, start.lanes, start.global_batch, start.window, job.seed, grains=job.train.grains
    )
    sampler.check(1 if job.parallel.strategy == "downpour" else replicas)  # leased lanes go to who asks
    start.view(np.float32)
    graph = models.graph(job, start.network, start.shape)
    collected = next((node for node in graph.nodes if node.layer.collected), None)
    if collected is not None and (job.parallel.strategy != "allreduce" or job.train.reproducible):
        what = (
            "train.reproducible = true" if job.train.reproducible else f'parallel.strategy = "{job.parallel.strategy}"'
        )
        raise JobError(
            f"{what}: {collected.name} sums over all replicas in the middle of a step; leave out sync = true"
        )
    if job.backend.name != "auto" or job.backend.needs_onednn:
        choose_backends(job, Team(1), local_rank=0)


def check_loss(job: config.Job, train: Manifest) -> None:
    """JobError where the loss isn't one for the kind of labels that the data have."""
    wanted = "softmax" if train.labels == "single" else "sigmoid"
    if job.train.loss != wanted:
        has = "one label" if train.labels == "single" else "several labels"
        raise JobError(f"train.loss = {job.train.loss!r}, but {job.data.train} has {has} a sample; use {wanted!r}")


def check_same_run(found: Contents, start: Start) -> None:
    """Refuse to go on with other data; in the middle of an epoch also with another order of samples."""
    info = start.info()
    if found.info["data"] != info["data"]:
        raise DataError(
            f"{start.job.data.train} (digest {info['data']}) is not what {found.path} was trained on "
            f"(digest {found.info['data']}); set data.train to those data, or start a new run"
        )
    for key in KEPT if found.step else ():
        if found.info.get(key, info[key]) != info[key]:
            raise JobError(
                f"{key} = {info[key]}, but {found.path} stands in the middle of an epoch with {key} = "
                f"{found.info[key]}, and every sample of an epoch is taken once; change it back"
            )
    check_same_network(found, start)


def check_same_owners(start: Start) -> None:
    """Refuse to go on in the middle of an epoch where the shards lie, or are parted, in another way than before."""
    found = start.found
    if found is None or not found.step or found.info.get("owners", "") == start.info()["owners"]:
        return
    raise JobError(
        f'data.location = "{start.job.data.location}": {start.folder} stands in the middle of an epoch, in which the '
        "shards were parted among the nodes in another way, and every sample of an epoch is taken once; run it on the "
        "same nodes, with as many ranks on each, or go on from a checkpoint at the end of an epoch: remove the newer "
        "ones"
    )


def check_same_network(found: Contents, start: Start) -> None:
    """Refuse to go on with another network, or with an optimizer whose state the checkpoint doesn't hold."""
    graph = models.graph(start.job, start.network, start.shape)
    check_network(found, graph, [""])
    states = STATES[start.job.optimizer.name]
    for name in states:
        if not found.shapes(name):
            raise JobError(
                f"optimizer.name = {start.job.optimizer.name!r}, but {found.path} was written without {name}; "
                "change it back, or start a new run"
            )
    check_network(found, graph, states)
