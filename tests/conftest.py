"""How tests meet MPI, in two ways.

`@pytest.mark.parallel([1, 2, 4])` (mpi-pytest): the test itself runs on that many ranks. `make test` starts all of one
size together, `mpirun -n 4 python -m pytest -m "parallel[4]"`; plain `pytest` starts each alone. Every rank runs the
same tests in the same order; a failure on any rank fails the run, and a rank that waits for a failed one is ended,
with all others, by the time limit. Fixtures for them: `world`, `shared_path`, `mesh_of`, `node_of`.

The fixtures `mpirun` and `start_mpirun` run whole programs from a serial test; `python` and `start_python` likewise
without MPI. Nothing that they start outlives the test.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path

import pytest
from pytest_mpi.plugin import CHILD_PROCESS_FLAG

from dpnn.comm.launch import command, session_folder, sweep

ROOT = Path(__file__).parents[1]
STARTS_MPI = {"mpirun", "start_mpirun", "slurm"}
LAUNCHERS_OWN = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI", "HYD", "SLURM_", "DPNN_", "PYTEST_")

# For plain `pytest`: mpi-pytest looks for mpiexec on the PATH, and Open MPI's doesn't run as root unasked.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

# Ranks of tests give way where they wait: other tests have the same cores. Read when MPI starts.
os.environ |= {"OMPI_MCA_mpi_yield_when_idle": "1"}

# What tests choose by timing stays out of the user's own cache folder. Set here, before any module of tests is
# imported; what tests start inherits it.
CACHE = tempfile.mkdtemp(prefix="dpnn-cache-")
os.environ["XDG_CACHE_HOME"] = CACHE

# What Python compiles is kept, whatever the environment says: tests start dpnn a thousand times.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "note in this folder which CUDA kernels passed tests compiled and ran"
    parser.addoption("--verified", metavar="FOLDER", type=Path, help=what)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # mpi-pytest starts the ranks of a test that was selected without saying how.
    soaks = "soak" in config.option.markexpr or CHILD_PROCESS_FLAG in os.environ
    for item in items:
        if STARTS_MPI.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.mpi)
        if item.get_closest_marker("soak") and not soaks:
            item.add_marker(pytest.mark.skip(reason="runs for minutes: make soak"))


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    from dpnn.comm import library

    MPI = library.load()
    if MPI.COMM_WORLD.size > 1:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = CACHE  # else ranks would clear up one folder at the same time
        config.pluginmanager.register(OneOfSeveral(config, MPI.COMM_WORLD.rank))


class OneOfSeveral:
    """What a rank of several reads: only files that have a test for it; the whole takes longer than those tests.

    And what it prints: the first its report, each a failure at once. A rank with a failed test may be ended, waiting
    for another, before it can report at the end.
    """

    def __init__(self, config: pytest.Config, rank: int) -> None:
        terminal = config.pluginmanager.getplugin("terminalreporter")._tw
        self._out, self._rank = terminal._file, rank
        if rank > 0:
            terminal._file = StringIO()

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return True if collection_path.is_file() and "mark.parallel" not in collection_path.read_text() else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._out.write(f"\nrank {self._rank}: {report.nodeid} ({report.when})\n{report.longreprtext}\n")
            self._out.flush()


@pytest.fixture(scope="session")
def world():
    """All ranks of a parallel test, as dpnn.comm.world.start() would make them, without its hooks."""
    from mpi4py import MPI

    from dpnn.comm.world import World

    return World(MPI.COMM_WORLD, timeout_s=60)


@pytest.fixture
def shared_path(world, tmp_path: Path) -> Path:
    """A folder of its own for a parallel test, the same on every rank."""
    return world.comm.bcast(tmp_path)


@pytest.fixture
def mesh_of(world):
    """mesh_of(where) -> Mesh of replicas that are, as `where` says,

    "together" on one node, "halves" on two (2 + 2, 2 + 1), "one apart" on a node of its own (3 + 1, 2 + 1), or
    "not shared": each on a node of its own.
    """
    from mpi4py import MPI

    from dpnn.comm.mesh import Mesh

    made = []

    def make(where: str) -> Mesh:
        mesh, size = Mesh(world), world.size
        made.append(mesh)
        first = {"halves": size - size // 2, "one apart": size - 1}.get(where, size)
        homes = [replica if where == "not shared" else int(replica >= first) for replica in range(size)]
        nodes = [[replica for replica in range(size) if homes[replica] == home] for home in sorted(set(homes))]
        if len(nodes) > 1:
            mesh.nodes = nodes
            mesh.node = mesh.data.Split(homes[mesh.replica], mesh.replica)
            mesh.smallest_node, mesh.largest_node = min(map(len, nodes)), max(map(len, nodes))
            everywhere = mesh.node.rank < mesh.smallest_node
            mesh.across = mesh.data.Split(mesh.node.rank if everywhere else MPI.UNDEFINED, mesh.replica)
        return mesh

    yield make
    for mesh in made:
        for comm in (mesh.across, mesh.node, mesh.model, mesh.data):
            if comm != MPI.COMM_NULL:
                comm.Free()


@pytest.fixture
def node_of(mesh_of):
    """node_of(where, n=..., ...) -> Node of the replicas of mesh_of(where), or of a given mesh."""
    import numpy as np

    from dpnn.comm.node import Node
    from dpnn.native import Kernels

    def make(where="together", n=1000, dtype="float32", states=("momentum",), native=True, mesh=None, **how) -> Node:
        kernels = Kernels(1) if native else None
        return Node(mesh or mesh_of(where), n, np.dtype(dtype), states, kernels, 60, **how)

    return make


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    """A command that a test, or a fixture, calls in its own process handles signals to the end; what is started
    inherits that.
    """
    _restore_handlers()
    yield
    _restore_handlers()


def _restore_handlers() -> None:
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


class Program:
    """A program that runs in a session of its own, with its output in files, so that nothing can block it.

    `terminal`: a descriptor that is its stdout instead.
    """

    def __init__(
        self, line: Sequence[str], folder: Path, env: dict[str, str], cwd: Path, terminal: int | None = None
    ) -> None:
        self.line = list(line)
        self._mark = secrets.token_hex(8)
        folder.mkdir(parents=True)
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS_OWN)}
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                self.line,
                stdin=subprocess.DEVNULL,
                stdout=stdout if terminal is None else terminal,
                stderr=stderr,
                cwd=cwd,
                env={
                    **inherited,
                    **session_folder(str(folder)),
                    "PYTHONPATH": str(ROOT),
                    **env,
                    "DPNN_TEST": self._mark,
                },
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._stderr.read_text(errors="replace")

    def pids(self) -> dict[int, int]:
        """The process of each MPI rank, by rank. Ranks of Open MPI, MPICH and their kin know their number."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"DPNN_TEST={self._mark}".encode() in environ:
                variables = dict(variable.split(b"=", 1) for variable in environ if b"=" in variable)
                rank = variables.get(b"OMPI_COMM_WORLD_RANK") or variables.get(b"PMI_RANK")
                if rank:
                    found[int(rank)] = int(entry.name)
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program alone (to mpirun, not to its ranks)."""
        self.process.send_signal(number)

    def wait_for(self, text: str, times: int = 1, timeout: float = 60) -> None:
        """Return once stdout and stderr together hold `text` so many times; fails where they don't, in time."""

        def seen() -> bool:
            return (self.stdout + self.stderr).count(text) >= times

        self._until(lambda: seen() or self.process.poll() is not None, timeout)
        if not seen():
            self._fail(f"ended without {times} x {text!r}")

    def finish(self, timeout: float = 60) -> "subprocess.CompletedProcess[str]":
        """Wait for its end; fails, and kills it with its ranks, where that takes longer than `timeout` seconds."""
        self._until(lambda: self.process.poll() is not None, timeout)
        return subprocess.CompletedProcess(self.line, self.process.returncode, self.stdout, self.stderr)

    def until_gone(self, timeout: float = 60) -> None:
        """Wait until it has no rank left; fails where one stays."""
        self._until(lambda: not self.pids(), timeout)

    def kill(self) -> None:
        """Kill all that it has started, in whatever session."""
        sweep("DPNN_TEST", self._mark)
        self.process.wait()

    def _until(self, done: Callable[[], bool], timeout: float) -> None:
        end = time.monotonic() + timeout
        while not done():
            if time.monotonic() > end:
                self._fail(f"still running, or still waited for, after {timeout:g} s")
            time.sleep(0.01)

    def _fail(self, trouble: str) -> None:
        self.kill()
        code = self.process.returncode
        pytest.fail(f"{' '.join(self.line)}: {trouble}; code {code}\nstdout:\n{self.stdout}\nstderr:\n{self.stderr}")


@pytest.fixture
def start_line(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """start_line(line, env={}, cwd=..., terminal=None) -> Program; what still runs when the test ends is killed."""
    programs: list[Program] = []

    def start(line: Sequence[str], env: dict[str, str] | None = None, cwd: Path = ROOT, **how) -> Program:
        programs.append(Program(line, tmp_path / f"program-{len(programs)}", env or {}, cwd, **how))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


@pytest.fixture
def start_in_group(start_line):
    """start_in_group(kind, limits, *line, env={}, cwd=...) -> Program in a control group of its own, of version 1.

    `kind`: "memory" or "cpu"; `limits`: of it, by name. The test is skipped where no such group can be made.
    """
    groups: list[Path] = []

    def start(kind: str, limits: dict[str, object], *line: object, **where) -> Program:
        group = Path("/sys/fs/cgroup", kind, f"dpnn-test-{secrets.token_hex(4)}")
        try:
            group.mkdir()
        except OSError as error:
            pytest.skip(f"no control group of version 1 can be made here: {error}")
        groups.append(group)
        for name, value in limits.items():
            (group / f"{kind}.{name}").write_text(str(value))
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        return start_line(["sh", "-c", enter, "sh", *map(str, line)], **where)

    yield start
    for group in groups:
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        while (group / "cgroup.procs").read_text():
            time.sleep(0.01)
        group.rmdir()


@pytest.fixture
def start_python(start_line):
    """start_python(*args, env={}, cwd=...) -> Program: this Python with these arguments."""
    return lambda *args, **where: start_line([sys.executable, *map(str, args)], **where)


@pytest.fixture
def python(start_python):
    """python(*args, timeout=60, env={}, cwd=...) -> CompletedProcess."""
    return lambda *args, timeout=60, **where: start_python(*args, **where).finish(timeout)


@pytest.fixture
def start_mpirun(start_line):
    """start_mpirun(n, *args, script=None, env={}, cwd=...) -> Program: `dpnn args`, or a script, on n ranks."""

    def start(n: int, *args: object, script: Path | None = None, **where) -> Program:
        program = ("-m", "dpnn") if script is None else (str(script),)
        return start_line(command(n, list(map(str, args)), program), **where)

    return start


@pytest.fixture
def mpirun(start_mpirun):
    """mpirun(n, *args, timeout=60, script=None, env={}, cwd=...) -> CompletedProcess."""
    return lambda n, *args, timeout=60, **how: start_mpirun(n, *args, **how).finish(timeout)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of what a package is built from, since a build leaves its own files in the folder."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "dpnn", "kernels"):
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(origin, folder / name)
    return folder
