"""An environment in one file: broadcast to the nodes of a job, and unpacked on their own disks, by the batch script.

A thousand ranks that import from a parallel file system open thousands of files each. A venv works at any place where
it is unpacked, as long as it is started by its own bin/python, which finds pyvenv.cfg beside it, and there the Python
that it was made by.
"""

import os
import tarfile
from pathlib import Path

from dpnn.errors import JobError, RankError

PYTHON = '"$environment/bin/python"'
"""The unpacked Python, as the script's shell knows it."""


def check(archive: str) -> None:
    """JobError where `archive`, in which variables are expanded, isn't a packed environment."""
    path = Path(os.path.expandvars(archive))
    way_out = f"pack one with: tar -C VENV -czf {path} ."
    try:
        with tarfile.open(path) as packed:
            found = any(member.name.removeprefix("./") == "bin/python" for member in packed)
    except (OSError, tarfile.TarError) as error:
        raise JobError(f"cluster.environment: {path} can't be read ({error}); {way_out}") from error
    if not found:
        raise JobError(f"cluster.environment: {path} has no bin/python at its top; {way_out}")


def unpack(archive: str) -> list[str]:
    """Lines that unpack it on each node. In $TMPDIR, which is another folder on each; the job's own, whatever is there.

    A job that can't have its environment ends with the code of a failed rank.
    """
    return [
        "",
        "# The environment: broadcast in one file, unpacked on each node's own disk.",
        'environment="${TMPDIR:-/tmp}/dpnn-$SLURM_JOB_ID"',
        'each() { srun --mpi=none --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 "$@"; }',
        f'sbcast --force "{archive}" "$environment.tar" && each sh -c \'rm -rf "$0" && mkdir -m 700 "$0" &&',
        '    tar -xf "$0.tar" -C "$0" --no-same-owner && rm "$0.tar"\' "$environment" ||',
        f'    {{ echo "dpnn: {archive} can\'t be unpacked in ${{TMPDIR:-/tmp}} of each node" >&2;'
        f" exit {RankError.exit_code}; }}",
    ]


def remove() -> list[str]:
    """Lines that leave the nodes' disks as they were."""
    return ['each rm -rf "$environment"']
