"""The site file: what is the same for all jobs on one cluster, written once, in TOML.

[cluster]
launcher = "srun --mpi=pmix"
modules = ["openmpi/5.0"]
setup = ["source ~/dpnn/bin/activate"]
"""

import os
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from dpnn.config.reading import read_table
from dpnn.config.tables import Switch, Table, Text, Texts
from dpnn.errors import JobError

VARIABLE = "DPNN_SITE"
"""The environment variable that names a site file."""


class Cluster(Table, frozen=True, kw_only=True):
    """[cluster]: how a job is started there. Texts are lines of the batch script: the shell expands them."""

    launcher: Text = "mpirun"
    """ "mpirun" (of the environment's MPI), or "srun" with the options that fit the MPI, as in "srun --mpi=pmix"."""
    modules: Texts = ()
    """To be loaded."""
    setup: Texts = ()
    """Commands that make dpnn's environment ready; none: the Python that ran `dpnn submit`."""
    environment: Text = ""
    """A packed venv that is unpacked on the nodes' own disks and used there, as in "$HOME/dpnn-env.tar.gz"."""
    container: Text = ""
    """What stands in front of dpnn, as in "apptainer exec --nv dpnn.sif". With srun only."""
    stage: Text = ""
    """A folder on the nodes' own disks that shards are copied to first, as in "$TMPDIR/dpnn" (data.stage)."""
    requeue: Switch = True
    """Whether a job may be queued again; false: use --chain."""
    sbatch: Texts = ()
    """More options of sbatch, as in "--constraint=ib"."""


class Site(Table, frozen=True, kw_only=True):
    """A site file."""

    cluster: Cluster = Cluster()


def read_site(path: str | None, requeue: bool = True, environ: Mapping[str, str] = os.environ) -> Cluster:
    """The site file `path`, else the one that DPNN_SITE names, else ~/.config/dpnn/site.toml where there is one.

    `requeue`: whether jobs may be queued again, where the site has nothing against it.
    JobError where a file that was named can't be read, or holds what isn't allowed.
    """
    named = path or environ.get(VARIABLE)
    own = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "dpnn", "site.toml")
    if not named and not own.exists():
        return Cluster(requeue=requeue)
    site: Site = read_table(Site, named or str(own), "the site file")
    cluster = site.cluster
    word = cluster.launcher.split()[:1]
    if word not in (["mpirun"], ["srun"]) or (word == ["mpirun"] and cluster.launcher != "mpirun"):
        raise JobError(
            f'{named or own}: cluster.launcher = "{cluster.launcher}": "mpirun" is wanted, or "srun" and its options'
        )
    if cluster.container and word != ["srun"]:
        raise JobError(
            f"{named or own}: cluster.container needs the host's launcher to start each rank; "
            'set cluster.launcher = "srun --mpi=pmix" (or pmi2)'
        )
    if cluster.container and cluster.environment:
        raise JobError(f"{named or own}: cluster.container is an environment of its own: leave out cluster.environment")
    return replace(cluster, requeue=cluster.requeue and requeue)
