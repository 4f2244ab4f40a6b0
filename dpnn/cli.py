"""The commands, thin: `dpnn pack | data | train | eval | plan | doctor | submit | launch`. MPI only where needed."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from shlex import quote
from typing import TYPE_CHECKING

from dpnn import __version__
from dpnn.errors import DataError, DpnnError, JobError, RankError, Stopped

if TYPE_CHECKING:
    from dpnn.cluster.signals import StopRequest
    from dpnn.comm.world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code (DESIGN, section 7)."""
    words = list(sys.argv[1:] if argv is None else argv)
    # What stands behind "--" is sbatch's; argparse would take it for arguments of ours.
    own = words.index("--") if words[:1] == ["submit"] and "--" in words else len(words)
    arguments = _parser().parse_args(words[:own], argparse.Namespace(options=tuple(words[own + 1 :])))
    try:
        code: int = arguments.run(arguments)
    except DpnnError as error:
        print(f"dpnn: {error}", file=sys.stderr)
        return error.exit_code
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpnn", description="Train one convolutional network on many machines, over MPI."
    )
    parser.add_argument("--version", action="version", version=f"dpnn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    pack = commands.add_parser("pack", help="write data as HDF5 shards", description=_pack.__doc__)
    pack.add_argument("source", help='a file or folder of data (docs/packing.md), or "digits"')
    pack.add_argument("folder", help="where FOLDER/train and FOLDER/test are written")
    pack.add_argument(
        "--test-fraction", type=float, metavar="SHARE", help="hold out this share, where the source has no test part"
    )
    pack.add_argument(
        "--seed", type=int, default=0, help="of the order in which samples are laid into shards (default 0)"
    )
    pack.add_argument("--shard-mb", type=float, default=1024.0, metavar="MB", help="size of a shard (default 1024)")
    pack.add_argument(
        "--shorter-side", type=int, default=0, metavar="N", help="make larger pictures so small that this side is N"
    )
    pack.add_argument(
        "--raw", type=int, default=0, metavar="SIZE", help="store pictures decoded, as squares of SIZE pixels"
    )
    pack.add_argument(
        "--on-bad",
        choices=("reject", "stop"),
        default="reject",
        help="leave out samples that can't be read and name them in FOLDER/*/rejected.csv (default), or end at one",
    )
    pack.add_argument("--force", action="store_true", help="overwrite data packed there before")
    # Each of dpnn.data.pack.Options.
    pack.add_argument("--format", default="", metavar="NAME", help="of the source, where its path doesn't tell")
    pack.add_argument(
        "--classes", type=int, default=0, metavar="N", help="the number of classes of YouTube-8M (default 3862)"
    )
    pack.add_argument("--x", default="", metavar="DATASET", help="HDF5: the dataset of samples")
    pack.add_argument("--y", default="", metavar="DATASET", help="HDF5: the dataset of labels")
    pack.add_argument(
        "--layout",
        choices=("NHWC", "NCHW"),
        default="NHWC",
        help="of arrays of images: channels last (default) or first",
    )
    pack.add_argument(
        "--places", action="store_true", help="HDF5: labels are places (row, column) on the samples' plane"
    )
    pack.set_defaults(run=_pack)

    data = commands.add_parser(
        "data", help="check packed data, or look at them", description="Check packed data, or look at them."
    )
    _add_data_commands(data)

    train = commands.add_parser("train", help="train a network", description=_train.__doc__)
    train.add_argument("job", nargs="?", help="the job file (TOML)")
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run folder and its own job.toml, changed by --set; without RUN: the job's newest run",
    )
    train.add_argument(
        "--replay", metavar="RUN", help="do a run again that was recorded (parallel.record = true), bit for bit"
    )
    _add_set(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="measure the error on held-out data", description=_eval.__doc__)
    evaluate.add_argument("source", metavar="RUN", help="a run folder (its newest checkpoint), or a checkpoint file")
    _add_set(evaluate)
    evaluate.set_defaults(run=_eval)

    plan = commands.add_parser("plan", help="show what the ranks of a job would do", description=_plan.__doc__)
    plan.add_argument("source", metavar="JOB", help="the job file (TOML), or the folder of a run")
    plan.add_argument("--ranks", type=int, default=1, metavar="N", help="the number of ranks (default 1)")
    plan.add_argument("--instructions", action="store_true", help="also print the instructions of each part")
    _add_set(plan)
    plan.set_defaults(run=_plan)

    submit = commands.add_parser(
        "submit",
        help="train in a batch job of Slurm",
        description=_submit.__doc__,
        usage="dpnn submit JOB --nodes N --ranks-per-node N --time TIME [option ...] [-- option of sbatch ...]",
    )
    submit.add_argument("job", nargs="?", default="", metavar="JOB", help="the job file (TOML)")
    submit.add_argument("--resume", default="", metavar="RUN", help="go on with a run folder, in place of JOB")
    submit.add_argument("--nodes", type=int, required=True, metavar="N", help="the number of nodes")
    submit.add_argument("--ranks-per-node", type=int, required=True, metavar="N", help="ranks on each node")
    submit.add_argument("--time", required=True, help="the time limit, as sbatch takes it: 2:00:00")
    submit.add_argument("--cpus-per-rank", type=int, default=0, metavar="N", help="cores of each rank")
    submit.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="GPUs of each node")
    for name in ("account", "partition", "qos", "constraint"):
        submit.add_argument(f"--{name}", default="", help="as sbatch takes it")
    submit.add_argument(
        "--array", default="", metavar="TASKS", help="a run for each task, as in 0-3; %%a in --set is its number"
    )
    submit.add_argument(
        "--before", type=int, default=300, metavar="S",
        help="stop, with a checkpoint, so many seconds before the time limit (default 300)",
    )  # fmt: skip
    submit.add_argument(
        "--chain", type=int, default=0, metavar="N",
        help="N jobs that wait for one another, in place of queueing again, where a site forbids that",
    )  # fmt: skip
    submit.add_argument(
        "--site", metavar="FILE", help="the cluster's own settings (default: DPNN_SITE, or ~/.config/dpnn/site.toml)"
    )
    submit.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    _add_set(submit)
    submit.set_defaults(run=_submit)

    doctor = commands.add_parser(
        "doctor", help="what this machine has, and what is missing", description=_doctor.__doc__
    )
    doctor.add_argument("--data", default=".", metavar="FOLDER", help="a folder on the file system where the data lie")
    doctor.add_argument("--ranks", action="store_true", help="also what lies between the ranks; under a launcher")
    doctor.set_defaults(run=_doctor)

    launch = commands.add_parser("launch", help="start a command on several ranks", description=_launch.__doc__)
    launch.add_argument("-n", type=int, required=True, metavar="RANKS", help="the number of ranks")
    launch.add_argument(
        "command", nargs=argparse.REMAINDER, help="the command and its arguments: train jobs/digits.toml"
    )
    launch.set_defaults(run=_launch)
    return parser


def _add_data_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    folder = "a folder of shards, or one that holds train/ and test/"

    check = commands.add_parser(
        "check", help="list all that is wrong with packed data", description=_data_check.__doc__
    )
    check.add_argument("folder", metavar="FOLDER", help=folder)
    check.add_argument(
        "--quick",
        action="store_true",
        help="leave out the samples: only the manifest, labels, ids and HDF5's structures",
    )
    check.add_argument("--json", action="store_true", help="print an object a line: each finding, then the summary")
    check.set_defaults(run=_data_check)

    show = commands.add_parser(
        "show", help="print what packed data hold, and picture samples", description=_data_show.__doc__
    )
    show.add_argument("folder", metavar="FOLDER", help=folder)
    show.add_argument(
        "--out", default="samples.png", metavar="PNG", help="the picture (default samples.png; overwritten)"
    )
    show.add_argument("--samples", type=int, default=24, metavar="N", help="how many samples it has (default 24)")
    show.add_argument(
        "--augment",
        default="none",
        metavar="NAME",
        help='"none" (default), "crop-flip" or "imagenet": data.augment of a job',
    )
    show.add_argument("--size", type=int, default=0, metavar="N", help="data.size of a job: of the network's images")
    show.add_argument("--frames", type=int, default=0, metavar="N", help="data.frames of a job")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="the seed of a job (default 0)")
    show.set_defaults(run=_data_show)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="set a key of the job file, as in train.epochs=3; may be repeated",
    )  # fmt: skip


def _pack(arguments: argparse.Namespace) -> int:
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


def _data_check(arguments: argparse.Namespace) -> int:
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


def _data_show(arguments: argparse.Namespace) -> int:
    """Print the manifest of packed data and the samples of each class, and picture some samples as the network sees
    them, several times where training changes them. Options as in the [data] of a job show what that job sees.
    """
    from dpnn.data.show import show

    options = {name: getattr(arguments, name) for name in ("samples", "augment", "size", "frames", "seed")}
    print(show(arguments.folder, arguments.out, **options))
    return 0


def _train(arguments: argparse.Namespace) -> int:
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


def _eval(arguments: argparse.Namespace) -> int:
    """Print the error of a trained network on held-out data. Under mpirun, srun or `dpnn launch`: on all ranks."""

    from dpnn.comm.world import run
    from dpnn.evaluate import evaluate

    return run(lambda world: evaluate(world, arguments.source, arguments.overrides))


def _plan(arguments: argparse.Namespace) -> int:
    """Show which layers lie on which rank, with memory, messages and the predicted step. Needs no MPI.

    A job file is planned by assumed figures; of a run's folder, what the run measured and chose is read.
    """
    from dpnn.preview import preview

    print(preview(arguments.source, arguments.overrides, arguments.ranks, arguments.instructions))
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    """Train in a batch job of Slurm, which is queued again until the run has ended. Needs no MPI.

    What is the same for all jobs on a cluster stands in the site file (docs/cluster.md).
    """
    from dpnn.cluster import site, slurm

    if bool(arguments.job) == bool(arguments.resume):
        raise JobError("name a job file, or a run folder to go on with (--resume RUN)")
    request = slurm.Request(
        arguments.job, arguments.nodes, arguments.ranks_per_node, arguments.time, tuple(arguments.overrides),
        arguments.resume, arguments.cpus_per_rank, arguments.gpus_per_node, arguments.account, arguments.partition,
        arguments.qos, arguments.constraint, arguments.array, arguments.before, arguments.options,
    )  # fmt: skip
    slurm.check(request, arguments.chain)
    cluster = site.read_site(arguments.site, requeue=not arguments.chain)
    if arguments.dry_run:
        print(slurm.script(request, cluster), end="")
        return 0
    for number in slurm.submit(request, cluster, arguments.chain):
        print(f"submitted job {number}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Say what this machine has, what is missing or slow, and what to do about it. Starts no MPI without --ranks.

    Ends with 2 where something is wrong.
    """
    from dpnn.cluster.doctor import Finding, diagnose, table

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


def _launch(arguments: argparse.Namespace) -> int:
    """Print the mpirun line that fits the installed MPI and this machine, and run it."""
    from dpnn.comm.launch import launch

    def settle(told: bytes, code: int) -> int:
        from dpnn.observe.folder import RunFolder  # imports NumPy: only after the job

        folder, ended = RunFolder.told(told)
        if ended is not None:
            return ended
        way_out = f"go on with: dpnn train --resume {quote(str(folder.path))}"
        print(f"dpnn: {folder.path}: the run was killed, or couldn't write its end; {way_out}", file=sys.stderr)
        return code or RankError.exit_code

    inner = _parser().parse_args(arguments.command)  # so that a wrong command is told once, and before anything starts
    if inner.run in (_plan, _submit, _launch):
        raise JobError(f"{arguments.command[0]} runs in one process: leave out launch")
    return launch(arguments.n, arguments.command, settle=settle)
