"""What the type of one key of a job file can't say."""

from difflib import get_close_matches
from typing import Any

import msgspec

from dpnn.config.tables import PLACEMENTS, CountOrNone, Job, Placing
from dpnn.config.toml import did_you_mean, shown, toml, wanted_of
from dpnn.errors import JobError

# Exactly one of each is given.
_PAIRS = (("train.epochs", "train.steps"), ("train.global_batch", "train.replica_batch"))

# Keys that mean something only where another key has this value.
_NEEDS: dict[str, tuple[str, str | bool]] = {
    "optimizer.momentum": ("optimizer.name", "momentum"),
    "optimizer.nesterov": ("optimizer.name", "momentum"),
    "schedule.milestones": ("schedule.name", "step"),
    "schedule.factor": ("schedule.name", "step"),
    "schedule.power": ("schedule.name", "poly"),
    "parallel.wire": ("parallel.strategy", "allreduce"),
    "train.grains": ("train.reproducible", True),
    "parallel.every": ("parallel.strategy", "average"),
    "parallel.state": ("parallel.strategy", "average"),
    "parallel.servers": ("parallel.strategy", "downpour"),
    "parallel.n_push": ("parallel.strategy", "downpour"),
    "parallel.n_fetch": ("parallel.strategy", "downpour"),
    "parallel.fetch_ahead": ("parallel.strategy", "downpour"),
    "parallel.staleness": ("parallel.strategy", "downpour"),
    "parallel.lead": ("parallel.strategy", "downpour"),
    "parallel.warmup_steps": ("parallel.strategy", "downpour"),
    "parallel.spares": ("parallel.strategy", "downpour"),
    "parallel.silence_s": ("parallel.strategy", "downpour"),
    "parallel.record": ("parallel.strategy", "downpour"),
    "parallel.mirror": ("parallel.strategy", "downpour"),
    "train.label_smoothing": ("train.loss", "softmax"),
}


_PRECISIONS = {"cuda": ("float32",), "onednn": ("float32", "bfloat16"), "reference": ("float32", "float64")}


def check(job: Job) -> None:
    """JobError where values don't go together."""

    def value(key: str) -> Any:
        section, _, name = key.partition(".")
        return getattr(getattr(job, section), name)

    for one, other in _PAIRS:
        if not value(one) and not value(other):
            raise JobError(f"{one} is missing: {one} or {other}, {wanted_of(CountOrNone)}, is wanted")
        if value(one) and value(other):
            raise JobError(
                f"{one} = {value(one)} and {other} = {value(other)}: exactly one of them is wanted; set the other to 0"
            )
    for key, (other, wanted) in _NEEDS.items():
        if value(other) != wanted and value(key) != _default(key):
            raise JobError(f"{key} = {shown(value(key))}: it needs {other} = {toml(wanted)}; leave it out")
    milestones = job.schedule.milestones
    if job.schedule.name == "step" and not milestones:
        raise JobError("schedule.milestones is missing: a list of epochs is wanted, as in [30, 60]")
    if list(milestones) != sorted(set(milestones)):
        raise JobError(f"schedule.milestones = {shown(milestones)}: epochs in rising order are wanted")
    backend, precision = job.backend.name, job.backend.precision
    if precision not in _PRECISIONS.get(backend, (precision,)):
        wanted = " or ".join(map(toml, _PRECISIONS[backend]))
        raise JobError(
            f'backend.precision = "{precision}": backend.name = "{backend}" computes in {wanted}; use "auto"'
        )
    if job.train.reproducible and (job.parallel.strategy != "allreduce" or job.parallel.microbatches > 1):
        raise JobError(
            'train.reproducible = true: it needs parallel.strategy = "allreduce" and parallel.microbatches = 1 '
            "(each grain is a micro-batch of its own)"
        )
    if job.train.reproducible and job.parallel.wire != "float32":
        raise JobError('parallel.wire = "bfloat16": train.reproducible = true needs "float32"; leave it out')
    if job.train.balance and (job.train.reproducible or not job.train.global_batch):
        raise JobError(
            "train.balance = true: it needs train.global_batch, and can't be had together with train.reproducible: "
            "leave it out"
        )
    if job.parallel.strategy == "downpour":
        _check_downpour(job)
    if job.data.location == "local":
        _check_local(job)
    placement = job.parallel.placement
    if isinstance(placement, str) and placement not in PLACEMENTS:
        hint = did_you_mean(map(toml, get_close_matches(placement, PLACEMENTS, 1)))
        raise JobError(f"parallel.placement = {toml(placement)}: {wanted_of(Placing)} is wanted{hint}")
    if job.parallel.memory_gb and placement != "auto":
        raise JobError(
            f"parallel.memory_gb = {job.parallel.memory_gb:g}: it is a limit for what "
            'parallel.placement = "auto" chooses; leave it out'
        )
    batch, lanes = job.train.global_batch, job.data.lanes
    if lanes and batch % lanes:
        below, above = batch // lanes * lanes, -(-batch // lanes) * lanes
        fitting = f"{below} or {above}" if below else str(above)
        raise JobError(
            f"train.global_batch = {batch} can't be divided among data.lanes = {lanes}; "
            f"use a multiple of {lanes} ({fitting})"
        )


def _check_downpour(job: Job) -> None:
    parallel, staleness = job.parallel, job.parallel.staleness
    if not parallel.servers:
        raise JobError('parallel.servers = 0: parallel.strategy = "downpour" needs 1 or more')
    if parallel.servers < parallel.parts:
        raise JobError(
            f"parallel.servers = {parallel.servers}: each of parallel.parts = {parallel.parts} has servers of its own; "
            f"use parallel.servers = {parallel.parts} or more"
        )
    if not job.train.replica_batch:
        raise JobError(
            f"train.global_batch = {job.train.global_batch}: replicas don't wait for one another, so each has a batch "
            'of its own; parallel.strategy = "downpour" needs train.replica_batch'
        )
    if parallel.fetch_ahead > parallel.n_fetch:
        raise JobError(
            f"parallel.fetch_ahead = {parallel.fetch_ahead}: parameters have to be there before they are fetched "
            f"again, after parallel.n_fetch = {parallel.n_fetch} steps; use at most that"
        )
    if (staleness.policy == "discard") != (staleness.bound > 0):
        raise JobError(
            f"parallel.staleness.bound = {staleness.bound} and policy = {toml(staleness.policy)}: "
            'a bound of 1 or more is wanted with policy = "discard", and only there'
        )


def _check_local(job: Job) -> None:
    """What deals the lanes in another way than by who owns the shards."""
    train = job.train
    for key, value in (("train.balance", train.balance), ("train.reproducible", train.reproducible)):
        if value:
            raise JobError(
                f'{key} = true: data.location = "local" gives each node lanes of its own shards, and they can\'t be '
                'dealt in another way; leave it out, or use data.location = "shared"'
            )
    if job.parallel.strategy == "downpour" and train.steps:
        raise JobError(
            f'train.steps = {train.steps}: with parallel.strategy = "downpour" and data.location = "local" each node '
            "goes through its own shards so many times; use train.epochs"
        )


def _default(key: str) -> Any:
    section, _, name = key.partition(".")
    table = next(field.type for field in msgspec.structs.fields(Job) if field.name == section)
    return next(field.default for field in msgspec.structs.fields(table) if field.name == name)
