"""What rank 0 does before a run, for all ranks: read the job, the manifests and the checkpoint, make the run folder.

No other rank opens these files: the result is broadcast.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from dpnn import checkpoint, config, models
from dpnn.checkpoint import Checkpoint
from dpnn.data import Manifest, Sampler, default_grains, default_lanes
from dpnn.data.augment import AUGMENTATIONS
from dpnn.data.pack import pack
from dpnn.errors import DataError, JobError
from dpnn.evaluate import choose_backends
from dpnn.nn import Network
from dpnn.observe.folder import RunFolder
from dpnn.optim import STATES
from dpnn.team import Team

BUILT_IN = "digits"
BUILT_IN_FOLDER = "data/digits"
KEPT = ("seed", "global_batch", "lanes", "window")
"""What decides which samples a step takes: it can't change in the middle of an epoch."""


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
    epoch: int = 0
    step: int = 0
    """The next step of the epoch."""
    steps: int = 0
    """Steps taken since the start of the run."""
    damaged: tuple[str, ...] = field(default=())
    """Newer checkpoints that could not be used, and why."""

    def info(self) -> dict[str, Any]:
        """What a checkpoint says of its run beside the arrays."""
        return {
            "job": self.job.dump(),
            "data": self.train.digest,
            "shape": self.train.shape,
            "labels": self.train.labels,
            "mean": self.train.mean,
            "std": self.train.std,
            "seed": self.job.seed,
            "lanes": self.lanes,
            "window": self.job.data.window,
            "global_batch": self.global_batch,
        }


def prepare(
    job_path: str | None, overrides: Sequence[str], resume: str | None, replicas: int
) -> tuple[Start, Checkpoint | None]:
    """Start a new run (`resume` is None), or go on with a run folder ("": the job's newest) from its newest checkpoint.

    The checkpoint is returned apart: it stays on rank 0.
    """
    if job_path and resume:
        raise JobError(f"a job file ({job_path}) and a run folder ({resume}): a run goes on with its own job; name one")
    name = Path(job_path or "").stem
    if resume is None:
        start = resolve(config.load(job_path or "", overrides), Path(), replicas)
        try_out(start, replicas)
        folder = RunFolder.create(start.job.output.dir, name)
        folder.write_job(start.job.dump())
        return changed(start, folder=folder.path), None
    folder = RunFolder.existing(resume or config.load(job_path or "", overrides).output.dir, name)
    start = resolve(config.load(str(folder.job), overrides), folder.path, replicas)
    newest = checkpoint.newest(folder.checkpoints)
    if newest is not None:
        start = with_lanes_of(newest[1], start)
        check_same_run(newest[0], newest[1], start)
    try_out(start, replicas)
    folder.write_job(start.job.dump())
    folder.failure.unlink(missing_ok=True)
    if newest is None:
        return start, None
    _, found, damaged = newest
    return changed(start, epoch=found.epoch, step=found.step, steps=found.steps, damaged=tuple(damaged)), found


def resolve(job: config.Job, folder: Path, replicas: int) -> Start:
    """Read what the job names, and fill in what it leaves open: the number of classes and lanes."""
    job = with_built_in(job)
    train = Manifest.read(job.data.train)
    test = Manifest.read(job.data.test) if job.data.test else None
    if test is not None:
        test.check_like(job.data.test, train.shape, train.labels, train.num_classes)
    classes = job.model.classes or train.num_classes
    if classes < train.num_classes or (train.labels == "multi" and classes != train.num_classes):
        raise JobError(
            f"model.classes = {classes}, but {job.data.train} has {train.num_classes} classes; leave the key out"
        )
    check_loss(job, train)
    global_batch = job.train.global_batch or job.train.replica_batch * replicas
    lanes = job.data.lanes or default_lanes(global_batch, replicas)
    grains = default_grains(lanes) if job.train.reproducible and not job.train.grains else job.train.grains
    job = replace(job, model=replace(job.model, classes=classes), train=replace(job.train, grains=grains))
    network = models.build(job.model.name, classes, train.network_shape, job.model.options)
    return Start(job, folder, network, train, test, global_batch, lanes)


def with_built_in(job: config.Job) -> config.Job:
    """The job with "digits" replaced by the folders that it is packed into, on first use."""
    paths = {part: f"{BUILT_IN_FOLDER}/{part}" for part in ("train", "test") if getattr(job.data, part) == BUILT_IN}
    if paths and not (Path(BUILT_IN_FOLDER) / "train" / "manifest.json").exists():
        pack(BUILT_IN, BUILT_IN_FOLDER)
    return replace(job, data=replace(job.data, **paths))


def with_lanes_of(found: Checkpoint, start: Start) -> Start:
    """The lanes stay those of the checkpoint where the job names none and the batch is the same."""
    same = not start.job.data.lanes and found.info["global_batch"] == start.global_batch
    return changed(start, lanes=found.info["lanes"]) if same else start


def try_out(start: Start, replicas: int) -> None:
    """Build what is cheap to build: what every rank would refuse is refused before the run folder is touched."""
    job, data, train = start.job, start.job.data, start.train
    sampler = Sampler(
        train.counts, train.block, start.lanes, start.global_batch, data.window, job.seed, grains=job.train.grains
    )
    sampler.check(replicas)
    AUGMENTATIONS[data.augment](job.seed, train.shape, np.dtype(train.dtype), 0)
    graph = models.graph(job, start.network, train.network_shape)
    collected = next((node for node in graph.nodes if node.layer.collected), None)
    if collected is not None and (job.parallel.strategy == "average" or job.train.reproducible):
        what = "train.reproducible = true" if job.train.reproducible else 'parallel.strategy = "average"'
        raise JobError(
            f"{what}: {collected.name} sums over all replicas in the middle of a step; leave out sync = true"
        )
    if job.backend.needs_onednn:
        choose_backends(job.backend, Team(1))


def check_loss(job: config.Job, train: Manifest) -> None:
    """JobError where the loss isn't one for the kind of labels that the data have."""
    wanted = "softmax" if train.labels == "single" else "sigmoid"
    if job.train.loss != wanted:
        has = "one label" if train.labels == "single" else "several labels"
        raise JobError(f"train.loss = {job.train.loss!r}, but {job.data.train} has {has} a sample; use {wanted!r}")


def check_same_run(path: Path, found: Checkpoint, start: Start) -> None:
    """Refuse to go on with other data; in the middle of an epoch also with another order of samples."""
    info = start.info()
    if found.info["data"] != info["data"]:
        raise DataError(
            f"{start.job.data.train} (digest {info['data']}) is not what {path} was trained on (digest "
            f"{found.info['data']}); set data.train to those data, or start a new run"
        )
    for key in KEPT if found.step else ():
        if found.info[key] != info[key]:
            raise JobError(
                f"{key} = {info[key]}, but {path} stands in the middle of an epoch with {key} = {found.info[key]}, "
                "and every sample of an epoch is taken once; change it back"
            )
    check_same_network(path, found, start)


def check_same_network(path: Path, found: Checkpoint, start: Start) -> None:
    """Refuse to go on with another network, or with an optimizer whose state the checkpoint doesn't hold."""
    job = start.job
    graph = models.graph(job, start.network, start.train.network_shape)
    wanted = {param.name: param.spec.shape for param in graph.params()}
    held = {name: array.shape for name, array in found.params.items()}
    for name in (*wanted, *held):
        if wanted.get(name) != held.get(name):
            raise JobError(
                f"{name} has the shape {wanted.get(name)}, and in {path} {held.get(name)}: another network; "
                "change [model] back, or start a new run"
            )
    for name in STATES[job.optimizer.name]:
        if name not in found.optimizer:
            raise JobError(
                f"optimizer.name = {job.optimizer.name!r}, but {path} was written without {name}; "
                "change it back, or start a new run"
            )
