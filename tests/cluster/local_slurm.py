"""A Slurm of our own on this machine: a controller and two nodes, each with its own host name, for one test session.

No systemd, no accounting. Each slurmd has a UTS and a mount namespace, so that MPI sees two machines. Debian's packages
slurm-wlm, munge and libpmix2 are needed, and root.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
_PMIX = Path("/usr/lib/x86_64-linux-gnu/libpmix.so.2"), Path("/usr/lib/x86_64-linux-gnu/pmix2/lib/libpmix.so")
_CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
TmpFS={folder}/tmp/%n
GresTypes=gpu
NodeName=n0 NodeHostname=n0 NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory={memory} Gres=gpu:1 State=UNKNOWN
NodeName=n1 NodeHostname=n1 NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory={memory} Gres=gpu:1 State=UNKNOWN
PartitionName=debug Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""
NODES = ("n0", "n1")


def missing() -> str:
    """Why there can be no such cluster here; empty where there can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge libpmix2"
    return "" if os.geteuid() == 0 else "only root can start one"


class LocalSlurm:
    """Started by its constructor in `folder`; `stop` ends all of it. `disk`: a folder that is another one on each node,
    to this machine `folder`/tmp/NODE.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = str(folder / "slurm.conf")
        self.disk = folder / "disk"
        for name in ("disk", "state", "spool/n0", "spool/n1", "tmp/n0", "tmp/n1"):
            (folder / name).mkdir(parents=True)
        port = 20000 + os.getpid() % 10000
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**21
        host = os.uname().nodename.partition(".")[0]
        (folder / "slurm.conf").write_text(
            _CONF.format(folder=folder, host=host, port=port, first=port + 1, second=port + 2, memory=memory)
        )
        # A GPU that jobs can ask for; there is none behind it.
        (folder / "gres.conf").write_text("NodeName=n[0-1] Name=gpu File=/dev/null\n")
        hosts = folder / "hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {node}\n" for node in NODES))
        library, wanted = _PMIX
        if library.exists() and not wanted.exists():
            wanted.parent.mkdir(parents=True, exist_ok=True)
            wanted.symlink_to(library)  # the name under which srun --mpi=pmix looks for it
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._call(
            "munged", "--force", f"--key-file={key}", f"--socket={folder / 'munge.sock'}",
            f"--pid-file={folder / 'munged.pid'}", f"--log-file={folder / 'munged.log'}",
            f"--seed-file={folder / 'munge.seed'}",
        )  # fmt: skip
        self._call("slurmctld", "-c", "-i")
        for node in NODES:
            mounts = f"mount --bind {hosts} /etc/hosts; mount --bind {folder}/tmp/{node} {self.disk}"
            start = f"hostname {node}; {mounts}; exec slurmd -N {node}"
            self._call("unshare", "--uts", "--mount", "bash", "-c", start)
        self.wait_for(lambda: self.call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 30)

    def call(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=self._environ(), capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, ..."""
        return self.call("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]

    def wait_for(self, test, limit_s: float) -> None:
        """Until `test()` is true."""
        end = time.monotonic() + limit_s
        while not test():
            if time.monotonic() > end:
                raise TimeoutError(f"not within {limit_s:g} s; {self.folder} has the logs")
            time.sleep(0.1)

    def wait_until_left(self, job: str) -> None:
        """Until no node has anything of a job's last life: what is queued again starts in two minutes as a rule."""
        spool = self.folder / "spool"
        self.wait_for(lambda: not any(spool.glob(f"*/*.{job}.*")) and not any(spool.glob(f"*/job*{job}/*")), 30)
        time.sleep(2)

    def stop(self) -> None:
        """End all jobs and daemons."""
        for job in self.call("squeue", "-h", "-o", "%i").split():
            subprocess.run(["scancel", job], env=self._environ(), check=False, timeout=60)
        pids = [
            int((self.folder / f"{name}.pid").read_text()) for name in ("slurmd.n0", "slurmd.n1", "slurmctld", "munged")
        ]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 3
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
            time.sleep(0.1)
        for pid in pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)

    def _call(self, *command: str) -> None:
        subprocess.run(
            command, env=self._environ(), check=True, timeout=60,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _environ(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": self.conf}
