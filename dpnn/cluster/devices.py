"""The GPUs of a job's ranks: who has which, and whether MPI takes their memory, asked and by data.

A library that says that it takes a GPU's memory, and doesn't, reads the address as one of the host's and crashes. So it
is first given some in a process of its own, which may crash alone, and only then between the ranks. One that doesn't
say so is never given any: `comm/lifted.py` doesn't either.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dpnn.backends import cuda
from dpnn.backends.cuda.device import Device
from dpnn.cluster.findings import Finding
from dpnn.comm import library
from dpnn.comm.crossing import swap
from dpnn.comm.faults import wait
from dpnn.comm.world import World
from dpnn.native import Unavailable

_NBYTES = 4 << 20
"""Enough for a message that is sent in pieces, by way of the host or not."""
_LIMIT_S = 120.0
_ALONE = (sys.executable, "-m", "dpnn.cluster.devices")
_LAUNCHERS_OWN = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYD", "MPI_LOCAL", "SLURM_")
_OTHERWISE = "its gradients go by NCCL where that is installed, else over the host"


def compare(world: World) -> Iterator[Finding]:
    """Findings on the GPUs of all ranks; nothing where none has one. Collective, the same on every rank."""
    device = _device(world.node.rank)
    mine = device.about if device else ""
    everywhere = world.comm.allgather((os.uname().nodename, mine))
    if not any(about for _, about in everywhere):
        return
    yield _shared(everywhere)
    if not all(about for _, about in everywhere):
        return
    asked = world.comm.allgather(library.takes_device_memory())
    if not all(asked):
        told = f"rank {asked.index(False)}'s library doesn't say that it takes a GPU's memory: {_OTHERWISE}"
        yield Finding("GPU memory", "ok", told)
        return
    endings = world.comm.allgather(_ends_alone(world.node.rank))
    remedy = "take an MPI that is built with CUDA, or install NCCL: then it isn't given any"
    lies = next((rank for rank, ending in enumerate(endings) if ending), None)
    if lies is not None:
        told = f"rank {lies}'s library says that it takes a GPU's memory, and {endings[lies]} when it was given some"
        yield Finding("GPU memory", "wrong", told, remedy)
        return
    other = world.size - 1 - world.rank
    arrived = world.comm.allgather(device is None or arrives(world.comm, device, other, world.timeout_s))
    if all(arrived):
        yield Finding("GPU memory", "ok", "MPI says that it takes it, and what was sent has arrived")
    else:
        rank = arrived.index(False)
        told = f"MPI says that it takes it, and rank {rank} got other numbers than rank {world.size - 1 - rank} sent"
        yield Finding("GPU memory", "wrong", told, remedy)


def arrives(comm: Any, device: Device, other: int, limit_s: float) -> bool:
    """Send a rank of `comm` (MPI's) the memory of a device and get some from it; whether it is what was sent."""
    sent, got = device.empty(_NBYTES), device.empty(_NBYTES)
    pushed = device.push(_numbers(comm.rank), sent)
    device.zero(got)
    marked = device.mark()
    for done in (pushed, marked):
        wait(done, "this rank's device", limit_s)
    swap(comm, sent, got, other, limit_s)
    return bool((device.read(got) == _numbers(other)).all())


def main(arguments: Sequence[str]) -> int:
    """What a process of its own does: 0 where the memory of its device came back to it, 1 where something else did."""
    device = cuda.device_of_rank(int(arguments[0]))
    return 0 if arrives(library.load().COMM_SELF, device, 0, _LIMIT_S) else 1


def _shared(everywhere: Sequence[tuple[str, str]]) -> Finding:
    """`everywhere`: the node and the device of each rank."""
    counts = Counter(place for place in everywhere if place[1])
    (node, about), most = counts.most_common(1)[0]
    without = [rank for rank, (_, device) in enumerate(everywhere) if not device]
    if without:
        told = f"rank {without[0]} has none, and others have: {about}"
        return Finding("GPUs", "attention", told, 'set backend.name to "cuda" to see what is missing, or "onednn"')
    if most > 1:
        told = f"{most} ranks share {about} of {node}: they compute in turn"
        return Finding("GPUs", "attention", told, "start one rank for each GPU: --ranks-per-node as --gpus-per-node")
    return Finding("GPUs", "ok", f"each rank has one of its own: {about} and others")


def _device(local_rank: int) -> Device | None:
    try:
        return cuda.device_of_rank(local_rank)
    except Unavailable:
        return None


def _ends_alone(local_rank: int) -> str:
    """How a process that gives MPI the memory of this rank's device ends, in words; empty where all is well."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHERS_OWN)}
    line = [*_ALONE, str(local_rank)]
    try:
        ended = subprocess.run(line, env=environ, capture_output=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"hung or couldn't be tried ({type(error).__name__})"
    if ended.returncode < 0:
        return f"crashed ({signal.Signals(-ended.returncode).name})"
    return f"failed (exit code {ended.returncode})" if ended.returncode else ""


def _numbers(rank: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """(_NBYTES,), unlike those of every other rank."""
    return ((np.arange(_NBYTES) * 31 + 7 * rank + 1) % 251).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
