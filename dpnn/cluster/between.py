"""What lies between the ranks of a job: `mpirun -n 4 dpnn doctor --ranks`. Collective, takes some seconds.

Which way messages take isn't asked of MPI, whose answers differ, but seen: whose counters of the system rise by as
much as was sent.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from dpnn import __version__
from dpnn.cluster import devices
from dpnn.cluster.findings import Finding, judged
from dpnn.cluster.system import INFINIBAND, has_infiniband
from dpnn.comm import library
from dpnn.comm.faults import wait
from dpnn.comm.world import World

_MESSAGE = 16 << 20
_TURNS = 8
_SLEEP_S = 0.2
_MOST_APART_S = 1.0
"""Clocks that differ by more make the times in logs of several nodes hard to compare."""
LEAST_OF_RANK = 1 << 28
"""Bytes below which libraries and the loader leave little for a network."""
_INTERFACES = Path("/sys/class/net")


def compare(world: World) -> list[Finding]:
    """All findings, on every rank."""
    checks = (_alike, _places, _memory, _threads, _network, _progress, _clocks, devices.compare)
    return [finding for check in checks for finding in check(world)]


def _alike(world: World) -> Iterator[Finding]:
    versions = world.comm.allgather((__version__, np.__version__, library.version()))
    if len(set(versions)) > 1:
        other = next(rank for rank, version in enumerate(versions) if version != versions[0])
        yield Finding(
            "versions", "wrong", f"rank 0 has {versions[0]}, rank {other} {versions[other]} (dpnn, NumPy, MPI)",
            "use one environment on all nodes",
        )  # fmt: skip
    else:
        yield Finding("versions", "ok", f"{world.size} ranks, all with dpnn {__version__}, {versions[0][2]}")


def _places(world: World) -> Iterator[Finding]:
    """How many ranks a node has, and on how many cores."""
    cores = sorted(os.sched_getaffinity(0))
    everywhere = world.comm.allgather((os.uname().nodename, world.node.size, world.threads(), len(cores)))
    nodes = dict.fromkeys(name for name, *_ in everywhere)
    threads = [threads for _, _, threads, _ in everywhere]
    text = f"{len(nodes)} nodes, {min(threads)} to {max(threads)} threads a rank"
    share = [(os.cpu_count() or 1) // size for _, size, _, _ in everywhere]
    bound = next((rank for rank, (*_, own) in enumerate(everywhere) if own == 1 < share[rank]), None)
    if bound is not None:
        remedy = "mpirun --bind-to none, srun --cpu-bind=none, or --cpus-per-task: else a rank computes on one core"
        yield Finding("binding", "attention", f"{text}; rank {bound} is bound to a single core", remedy)
    else:
        yield Finding("binding", "ok", text)


def _memory(world: World) -> Iterator[Finding]:
    """What a rank has of its node's memory (parallel.memory_gb = 0)."""
    shares = world.comm.allgather(world.room)
    least = min(shares, key=lambda share: share.amount)
    text = f"{least.amount / 2**30:.1f} GiB a rank at least: {least.group}, {least.among} ranks"
    remedy = "start fewer ranks on a node, or ask for more memory (--mem)"
    yield judged("memory of ranks", "ok" if least.amount >= LEAST_OF_RANK else "attention", text, remedy)


def _threads(world: World) -> Iterator[Finding]:
    level = library.thread_level()
    if level == "multiple":
        yield Finding("threads of MPI", "ok", "MPI may be called by several threads")
    else:
        remedy = "sums go on only when the computing thread pokes them; take an MPI built with MPI_THREAD_MULTIPLE"
        yield Finding("threads of MPI", "attention", f"MPI may be called by one thread ({level})", remedy)


def _network(world: World) -> Iterator[Finding]:
    """Latency and bandwidth between neighbours, and between the first and the middle rank; by which way."""
    if world.size == 1:
        return
    for what, distance in (("neighbours", 1), ("far ranks", world.size // 2)):
        if distance == 1 and what == "far ranks":
            return
        before = _counters()
        latency, rate = _exchange(world, distance)
        rise = {name: value - before.get(name, 0) for name, value in _counters().items()}
        way = max(rise, key=rise.__getitem__, default="")
        way = way if rise.get(way, 0) > _MESSAGE else "shared memory"
        rows = world.comm.allgather((latency, rate, way))
        rows = [row for row in rows if row[1]]
        slowest = min(rows, key=lambda row: row[1])
        ways = ", ".join(dict.fromkeys(row[2] for row in rows))
        text = f"{median(row[0] for row in rows) * 1e6:.0f} us, {slowest[1] / 1e9:.2f} GB/s at least, by {ways}"
        by_tcp = any(row[2].startswith("network") for row in rows)
        if by_tcp and world.comm.allreduce(has_infiniband()):
            remedy = "use the cluster's own MPI, built with UCX or libfabric: that of the wheels has TCP only"
            yield Finding(what, "attention", f"{text}, beside InfiniBand", remedy)
        else:
            yield Finding(what, "ok", text)


def _exchange(world: World, distance: int) -> tuple[float, float]:
    """Seconds one way for a byte, and bytes a second for a large message, with the rank `distance` away; 0, 0 alone."""
    place = world.rank // distance
    other = world.rank + (-distance if place % 2 else distance)
    world.meet()
    if other >= world.size:
        return 0.0, 0.0
    first = place % 2 == 0
    small, large = np.zeros(1, np.uint8), np.zeros(_MESSAGE, np.uint8)

    def turn(buffer: np.ndarray) -> float:
        begin = time.perf_counter()
        for sends in (first, not first):
            request = world.comm.Isend(buffer, other) if sends else world.comm.Irecv(buffer, other)
            wait(request.Test, f"rank {other}", world.timeout_s)
        return (time.perf_counter() - begin) / 2

    times = [median(turn(buffer) for _ in range(_TURNS)) for buffer in (small, large)]
    return times[0], _MESSAGE / times[1]


def _progress(world: World) -> Iterator[Finding]:
    """Whether a message goes on while the ranks do something else: the share of it that a sleep hides."""
    if world.size == 1:
        return
    array = np.zeros(_MESSAGE // 4, np.float32)
    total = np.empty_like(array)

    def sum_(pause: float) -> float:
        world.meet()
        begin = time.perf_counter()
        request = world.comm.Iallreduce(array, total)
        time.sleep(pause)
        wait(request.Test, "the sum over all ranks", world.timeout_s)
        return time.perf_counter() - begin

    alone = median(sum_(0.0) for _ in range(3))
    both = median(sum_(_SLEEP_S) for _ in range(3))
    hidden = world.comm.allreduce(min(max((alone + _SLEEP_S - both) / alone, 0.0), 1.0)) / world.size
    text = f"{hidden:.0%} of a sum goes on while a rank computes, unless it pokes MPI, which dpnn does"
    yield Finding("progress", "ok", text)


def _clocks(world: World) -> Iterator[Finding]:
    """How far the nodes' clocks are apart, to within the time of a message."""
    world.meet()
    times = world.comm.allgather(time.time())
    apart = max(times) - min(times)
    text = f"the nodes' clocks are at most {apart:.2f} s apart"
    if apart > _MOST_APART_S:
        remedy = "start an NTP daemon, so that times in logs of several nodes can be compared"
        yield Finding("clocks", "attention", text, remedy)
    else:
        yield Finding("clocks", "ok", text)


def _counters() -> dict[str, int]:
    """Bytes that went out, by each network interface and InfiniBand port."""
    found = {}
    for interface in _listed(_INTERFACES):
        found[f"network {interface.name}"] = _number(interface / "statistics" / "tx_bytes")
    for port in (port for device in _listed(INFINIBAND) for port in _listed(device / "ports")):
        found[f"InfiniBand {port.parents[1].name}"] = 4 * _number(port / "counters" / "port_xmit_data")  # in words of 4
    return found


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
