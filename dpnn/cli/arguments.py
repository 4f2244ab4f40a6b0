"""What may be asked for: `dpnn pack | data | train | eval | plan | doctor | submit | launch`, and their options."""

import argparse

from dpnn import __version__
from dpnn.cli import commands


def parser() -> argparse.ArgumentParser:
    """For the whole command line. `run` of what it returns is one of commands.py."""
    whole = argparse.ArgumentParser(
        prog="dpnn", description="Train one convolutional network on many machines, over MPI."
    )
    whole.add_argument("--version", action="version", version=f"dpnn {__version__}")
    choices = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)

    pack = choices.add_parser("pack", help="write data as HDF5 shards", description=commands.pack.__doc__)
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
    pack.set_defaults(run=commands.pack)

    data = choices.add_parser(
        "data", help="check packed data, or look at them", description="Check packed data, or look at them."
    )
    _add_data_commands(data)

    train = choices.add_parser("train", help="train a network", description=commands.train.__doc__)
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
    train.set_defaults(run=commands.train)

    evaluate = choices.add_parser(
        "eval", help="measure the error on held-out data", description=commands.evaluate.__doc__
    )
    evaluate.add_argument("source", metavar="RUN", help="a run folder (its newest checkpoint), or a checkpoint file")
    _add_set(evaluate)
    evaluate.set_defaults(run=commands.evaluate)

    plan = choices.add_parser("plan", help="show what the ranks of a job would do", description=commands.plan.__doc__)
    plan.add_argument("source", metavar="JOB", help="the job file (TOML), or the folder of a run")
    plan.add_argument("--ranks", type=int, default=1, metavar="N", help="the number of ranks (default 1)")
    plan.add_argument("--instructions", action="store_true", help="also print the instructions of each part")
    _add_set(plan)
    plan.set_defaults(run=commands.plan)

    submit = choices.add_parser(
        "submit",
        help="train in a batch job of Slurm",
        description=commands.submit.__doc__,
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
    submit.set_defaults(run=commands.submit)

    doctor = choices.add_parser(
        "doctor", help="what this machine has, and what is missing", description=commands.doctor.__doc__
    )
    doctor.add_argument("--data", default=".", metavar="FOLDER", help="a folder on the file system where the data lie")
    doctor.add_argument("--ranks", action="store_true", help="also what lies between the ranks; under a launcher")
    doctor.set_defaults(run=commands.doctor)

    launch = choices.add_parser("launch", help="start a command on several ranks", description=commands.launch.__doc__)
    launch.add_argument("-n", type=int, required=True, metavar="RANKS", help="the number of ranks")
    launch.add_argument(
        "--with-faults",
        action="store_true",
        help="go on where a rank dies, as long as a whole replica is left; needs Open MPI 5 (docs/faults.md). A job of "
        "downpour does so anyway, where it can",
    )
    launch.add_argument(
        "command", nargs=argparse.REMAINDER, help="the command and its arguments: train jobs/digits.toml"
    )
    launch.set_defaults(run=commands.launch)
    return whole


def _add_data_commands(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    folder = "a folder of shards, or one that holds train/ and test/"

    check = choices.add_parser(
        "check", help="list all that is wrong with packed data", description=commands.data_check.__doc__
    )
    check.add_argument("folder", metavar="FOLDER", help=folder)
    check.add_argument(
        "--quick",
        action="store_true",
        help="leave out the samples: only the manifest, labels, ids and HDF5's structures",
    )
    check.add_argument("--json", action="store_true", help="print an object a line: each finding, then the summary")
    check.set_defaults(run=commands.data_check)

    show = choices.add_parser(
        "show", help="print what packed data hold, and picture samples", description=commands.data_show.__doc__
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
    show.set_defaults(run=commands.data_show)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="set a key of the job file, as in train.epochs=3; may be repeated",
    )  # fmt: skip
