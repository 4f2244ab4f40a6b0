"""A Slurm of our own on this machine: a controller and two nodes, each with its own host name, for one test session.

No systemd, no accounting. Each slurmd has a UTS and a mount namespace, so that MPI sees two machines. Debian's packages
slurm-wlm, munge and libpmix2 are needed, and root.
"""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
_PMIX = Path("/usr/lib/x86_64-linux-gnu/libpmix.so.2"), Path("/usr/lib/x86_64-linux-gnu/pmix2/lib/libpmix.so")
_CONF = """
ClusterName=local
SlurmctldHost={host}({outside})
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
NodeName=n0 NodeHostname=n0 NodeAddr={outside} Port={first} CPUs=2 RealMemory={memory} Gres=gpu:1 State=UNKNOWN
NodeName=n1 NodeHostname=n1 NodeAddr={inside} Port={second} CPUs=2 RealMemory={memory} Gres=gpu:1 State=UNKNOWN
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
    to this machine `folder`/tmp/NODE. `apart`: n1 has a network of its own, by one cable to this machine's.
    """

    def __init__(self, folder: Path, apart: bool = False) -> None:
        self.folder = folder
        self._network = Network() if apart else None
        outside, inside = self._network.addresses if self._network else ("127.0.0.1", "127.0.0.1")
        self.conf = str(folder / "slurm.conf")
        self.disk = folder / "disk"
        for name in ("disk", "state", "spool/n0", "spool/n1", "tmp/n0", "tmp/n1"):
            (folder / name).mkdir(parents=True)
        port = 20000 + os.getpid() % 10000 + 10000 * apart
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**21
        host = os.uname().nodename.partition(".")[0]
        (folder / "slurm.conf").write_text(
            _CONF.format(
                folder=folder,
                host=host,
                port=port,
                first=port + 1,
                second=port + 2,
                memory=memory,
                outside=outside,
                inside=inside,
            )
        )
        # A GPU that jobs can ask for; there is none behind it.
        (folder / "gres.conf").write_text("NodeName=n[0-1] Name=gpu File=/dev/null\n")
        hosts = folder / "hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + f"{outside} n0\n{inside} n1\n")
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
            self.start(node)
        self.wait_until_idle()

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

    def kill(self, node: str) -> None:
        """End all that runs on a node, Slurm's daemon too, at one moment, as if its power failed.

        Where the node has a network of its own, that is cut first: nobody is told that connections are closed.
        """
        if self._network and node == "n1":
            self._network.cut()
        namespace = os.readlink(f"/proc/{self._daemon(node)}/ns/uts")
        there = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/uts") == namespace:
                    there.append(int(pid))
        for number in (signal.SIGSTOP, signal.SIGKILL):  # nobody there sees another one die
            for pid in there:
                os.kill(pid, number)
        for kind in ("spool", "tmp"):  # as if they were in memory: a node that starts finds neither
            shutil.rmtree(self.folder / kind / node)
            (self.folder / kind / node).mkdir()

    def wait_until_idle(self) -> None:
        """Until both nodes can take a job."""
        self.wait_for(lambda: self.call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 60)

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
        if self._network:
            self._network.close()

    def start(self, node: str) -> None:
        """Start a node, also one that was killed."""
        where = ()
        if self._network and node == "n1":
            self._network.join()
            where = ("nsenter", f"--net=/run/netns/{self._network.name}")
        mounts = f"mount --bind {self.folder}/hosts /etc/hosts; mount --bind {self.folder}/tmp/{node} {self.disk}"
        self._call(
            *where, "unshare", "--uts", "--mount", "bash", "-c", f"hostname {node}; {mounts}; exec slurmd -N {node}"
        )

    def runs(self, node: str) -> bool:
        """Whether it does."""
        return Path(f"/proc/{self._daemon(node)}").exists()

    def _daemon(self, node: str) -> int:
        return int((self.folder / f"slurmd.{node}.pid").read_text())

    def _call(self, *command: str) -> None:
        subprocess.run(
            command, env=self._environ(), check=True, timeout=60,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _environ(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": self.conf}


class Network:
    """A network of its own, and the cable between it and this machine's. Needs iproute2, and root."""

    def __init__(self) -> None:
        number = os.getpid() % 50000
        self.name, self._cable = f"dpnn-{number}", f"dpnn{number}"
        self.addresses = tuple(f"10.{78 + number // 250}.{number % 250}.{host}" for host in (1, 2))
        """This machine's, and that of who is in it."""
        outside, inside = self.addresses
        _ip("netns", "add", self.name)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "cable", "netns", self.name)
        _ip("addr", "add", f"{outside}/24", "dev", self._cable)
        _ip("link", "set", self._cable, "up")
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "addr", "add", f"{inside}/24", "dev", "cable")

    def join(self) -> None:
        """Plug the cable in."""
        _ip("-n", self.name, "link", "set", "cable", "up")
        _ip("-n", self.name, "route", "replace", "default", "via", self.addresses[0])

    def cut(self) -> None:
        """Pull it out."""
        _ip("-n", self.name, "link", "set", "cable", "down")

    def close(self) -> None:
        """End it."""
        _ip("link", "del", self._cable)
        _ip("netns", "del", self.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30, capture_output=True)
