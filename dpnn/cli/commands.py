"""One function a command: from its arguments to an exit code. What it needs is imported when it runs."""

import argparse
import math
import os
import signal
import sys
from dataclasses import fields
from shlex import quote
from typing import TYPE_CHECKING

from dpnn.errors import DataError, JobError, RankError, Stopped

if TYPE_CHECKING:
    from dpnn.cluster.signals import StopRequest
    from dpnn.comm.world import World


def pack(arguments: argparse.Namespace) -> int:
    """Write data as HDF5 shards with a manifest, for training and for testing.

    Under mpirun, srun or `dpnn launch`: on all ranks together. A packing that was stopped or killed goes on where the
    command is given again.
    """
    from dpnn.cluster.signals import StopRequest

    request = StopRequest()
    from dpnn.comm.library import promise

    promised = promise(os.environ)
    if promised is None or promised.size == 1:  # a login node may have no MPI that starts
        return _pack_together(arguments, request, None)
    from dpnn.comm.world import run

    return run(lambda world: _pack_together(arguments, request, world))


def _pack_together(arguments: argparse.Namespace, request: "StopRequest", world: "World | None") -> int:
    """Pack, on all ranks of the world; without one, alone."""
    from dpnn.data.pack import pack
    from dpnn.data.pack.formats import Options
    from dpnn.observe.progress import Packing, terminal

    first = world is None or world.rank == 0
    if world is not None:
        world.timeout_s = math.inf  # listing a source, or a larger share than the others', may take hours
    shown = Packing(terminal() is not None) if first else None

    def progress(done: int, total: int) -> None:
        if request.asked:
            raise Stopped("packing was told to stop; give the same command again to go on")
        if shown is not None:
            shown.count(done, total)

    try:
        summary = pack(
            arguments.source,
            arguments.folder,
            options=Options(**{one.name: getattr(arguments, one.name) for one in fields(Options)}),
            test_fraction=arguments.test_fraction,
            shorter_side=arguments.shorter_side,
            raw=arguments.raw,
            shard_mb=arguments.shard_mb,
            seed=arguments.seed,
            on_bad=arguments.on_bad,
            force=arguments.force,
            ranks=world,
            progress=progress,
        )
    finally:
        if shown is not None:
            shown.close()
    request.settle()
    if first:
        print(summary, flush=True)
    return 0


def data_check(arguments: argparse.Namespace) -> int:
    """Read everything that was packed and list all that is wrong with it: damaged or missing files, labels out of
    range, ids that stand twice, pictures that can't be decoded, and more. Exit code 3 where there is an error.
    """
    from rich.progress import Progress

    from dpnn.data.check import check
    from dpnn.data.check.report import lines

    with Progress(transient=True, disable=arguments.json or not sys.stdout.isatty()) as progress:
        bar = progress.add_task("checking")
        report = check(
            arguments.folder,
            quick=arguments.quick,
            threads=len(os.sched_getaffinity(0)),
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    for line in lines(report, arguments.json):
        print(line)
    if report.interrupted:
        return 128 + signal.SIGINT
    return DataError.exit_code if report.errors else 0


def data_show(arguments: argparse.Namespace) -> int:
    """Print the manifest of packed data and the samples of each class, and picture some samples as the network sees
    them, several times where training changes them. Options as in the [data] of a job show what that job sees.
    """
    from dpnn.data.show import show

    options = {name: getattr(arguments, name) for name in ("samples", "augment", "size", "frames", "seed")}
    print(show(arguments.folder, arguments.out, **options))
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Train the network of a job file. Under mpirun, srun or `dpnn launch`: on all ranks together."""
    if arguments.job is None and not arguments.resume and not arguments.replay:
        raise JobError("name a job file, or a run folder to go on with (--resume RUN) or to repeat (--replay RUN)")
    if arguments.replay and (arguments.job or arguments.resume is not None):
        raise JobError("--replay RUN repeats a run with its own job: leave out the job file and --resume")

    from dpnn.cluster.signals import StopRequest

    request = StopRequest()  # before what takes long: a signal that comes early asks too
    from dpnn.comm.world import run
    from dpnn.train import train

    what = (arguments.job, arguments.overrides, arguments.resume, arguments.replay)
    code = run(lambda world: train(world, request, *what))
    request.settle()
    return code


def evaluate(arguments: argparse.Namespace) -> int:
    """Print the error of a trained network on held-out data. Under mpirun, srun or `dpnn launch`: on all ranks."""

    from dpnn.comm.world import run
    from dpnn.evaluate import evaluate

    return run(lambda world: evaluate(world, arguments.source, arguments.overrides))


def plan(arguments: argparse.Namespace) -> int:
    """Show which layers lie on which rank, with memory, messages and the predicted step. Needs no MPI.

    A job file is planned by assumed figures; of a run's folder, what the run measured and chose is read.
    """
    from dpnn.preview import preview

    print(preview(arguments.source, arguments.overrides, arguments.ranks, arguments.instructions))
    return 0


def submit(arguments: argparse.Namespace) -> int:
    """Train in a batch job of Slurm, which is queued again until the run has ended. Needs no MPI.

    What is the same for all jobs on a cluster stands in the site file (docs/cluster.md). With --dry-run JOB may be left
    out: then the script takes it as its argument, as those in jobs/ do.
    """
    from dpnn.cluster import site, slurm

    if arguments.job and arguments.resume:
        raise JobError("name a job file, or a run folder to go on with (--resume RUN), not both")
    if not (arguments.job or arguments.resume or arguments.dry_run):
        raise JobError("name a job file, or a run folder to go on with (--resume RUN); only --dry-run needs neither")
    request = slurm.Request(
        arguments.job, arguments.nodes, arguments.ranks_per_node, arguments.time, tuple(arguments.overrides),
        arguments.resume, arguments.cpus_per_rank, arguments.gpus_per_node, arguments.account, arguments.partition,
        arguments.qos, arguments.constraint, arguments.array, arguments.before, arguments.options,
    )  # fmt: skip
    cluster = site.read_site(arguments.site, requeue=not arguments.chain)
    request = slurm.checked(request, cluster, arguments.chain)
    if arguments.dry_run:
        print(slurm.script(request, cluster), end="")
        return 0
    for number in slurm.submit(request, cluster, arguments.chain):
        print(f"submitted job {number}")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Say what this machine has, what is missing or slow, and what to do about it. Starts no MPI without --ranks.

    Ends with 2 where something is wrong.
    """
    from dpnn.cluster.doctor import diagnose
    from dpnn.cluster.findings import Finding, table

    def tell(findings: list[Finding]) -> int:
        print(table(findings))
        return JobError.exit_code if any(finding.state == "wrong" for finding in findings) else 0

    if not arguments.ranks:
        return tell(diagnose(arguments.data))
    from dpnn.cluster.between import compare
    from dpnn.comm.world import World, run

    def look(world: World) -> int:
        found = compare(world)
        return world.first(lambda: tell([*diagnose(arguments.data), *found]))

    return run(look, timeout_s=60)


def launch(arguments: argparse.Namespace) -> int:
    """Print the mpirun line that fits the installed MPI and this machine, and run it."""
    from dpnn.cli.arguments import parser
    from dpnn.comm.launch import check_survives, launch

    def settle(told: bytes, code: int) -> int:
        from dpnn.observe.folder import RunFolder  # imports NumPy: not before the job

        folder, ended = RunFolder.told(told)
        if ended is not None:
            return ended
        way_out = f"go on with: dpnn train --resume {quote(str(folder.path))}"
        print(f"dpnn: {folder.path}: the run was killed, or couldn't write its end; {way_out}", file=sys.stderr)
        return code or RankError.exit_code

    def ended(told: bytes) -> bool:
        from dpnn.observe.folder import RunFolder

        return bool(told) and RunFolder.told(told)[1] is not None

    inner = parser().parse_args(arguments.command)  # so that a wrong command is told once, and before anything starts
    if inner.run not in (pack, train, evaluate, doctor):
        raise JobError(f"{arguments.command[0]} runs in one process: leave out launch")
    if arguments.with_faults:
        if inner.run is not train:
            raise JobError(f"--with-faults is for train: {arguments.command[0]} ends where a rank dies")
        check_survives()
    survives = arguments.with_faults or (inner.run is train and _survives(inner))
    return launch(arguments.n, arguments.command, settle=settle, survives=survives, ended=ended)


def _survives(arguments: argparse.Namespace) -> bool:
    """Whether the training that is asked for goes on where one of its ranks dies. A wrong job is told by itself."""
    from dpnn import config

    path, folder = arguments.job, arguments.resume or arguments.replay
    if path is None and not folder:
        return False
    try:
        job = config.load(path or os.path.join(folder, "job.toml"), arguments.overrides)
    except JobError:
        return False
    return job.parallel.strategy == "downpour"
