"""Groups of processes that take turns: ranks of MPI or of PyTorch, or processes that know nothing of one another.

Each process holds an object and sleeps on a socket until it is called. A rank that waited inside MPI would take a core
from those that are measured. As a program this is what such a process runs.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Client, Connection
from time import perf_counter
from typing import Any, Self

from harness import WorkerEnded

from dpnn.comm.launch import command

START_S = 120.0
"""How long the processes may take to start."""


class Group:
    """`n` processes with one object each, `make(*args)`; `make` is "module.Class", imported over there.

    `mpi`: they are started by mpirun; else each finds its number in RANK and theirs in WORLD_SIZE, as torchrun sets
    them. OpenMP and OpenBLAS find 1 thread. RuntimeError where one raises, WorkerEnded where one dies.
    """

    def __init__(self, n: int, mpi: bool, make: str, *args: object) -> None:
        self._name = make
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            with tempfile.TemporaryDirectory(prefix="dpnn-") as folder, socket.socket(socket.AF_UNIX) as door:
                door.bind(f"{folder}/door")
                door.listen(n)
                door.settimeout(START_S)
                self._start(n, mpi, f"{folder}/door")
                self._pipes += [Connection(door.accept()[0].detach()) for _ in range(n)]
            self._ask([make, args])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def call(self, method: str, *args: object) -> list[Any]:
        """What the method returns in each process."""
        return [result for result, _ in self._ask((method, args, 1))]

    def seconds(self, number: int) -> float:
        """What one `step` takes, the mean over `number` of them; the harmonic mean over the processes."""
        return statistics.harmonic_mean([seconds for _, seconds in self._ask(("step", (), number))])

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()

    def _start(self, n: int, mpi: bool, address: str) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        if mpi:
            self._run(command(n, [address], (__file__,)), environ)
        else:
            for rank in range(n):
                self._run([sys.executable, __file__, address], {**environ, "RANK": str(rank), "WORLD_SIZE": str(n)})

    def _run(self, line: Sequence[str], environ: dict[str, str]) -> None:
        self._processes.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, env=environ))

    def _ask(self, question: Sequence[object]) -> list[tuple[Any, float]]:
        """Ask all, then hear all: (result, seconds) of each."""
        with suppress(BrokenPipeError):  # what is missed is the answer
            for pipe in self._pipes:
                pipe.send(question)
        errors, answers = zip(*map(_hear, self._pipes), strict=True)
        for error in filter(None, errors):
            raise RuntimeError(f"{self._name}:\n{error}")
        if None in answers:
            raise WorkerEnded(f"{self._name}: a process ended")
        return list(answers)


def _hear(pipe: Connection) -> tuple[str, tuple[Any, float] | None]:
    """An answer: what went wrong, or (result, seconds); neither from a process that is gone."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return "", None


def serve(address: str) -> None:
    """One process: make the object, then do as asked until that is None, or who asks is gone."""
    with Client(address, "AF_UNIX") as pipe, suppress(EOFError):
        try:
            make, args = pipe.recv()
            module, _, name = make.rpartition(".")
            it = getattr(import_module(module), name)(*args)
            pipe.send(("", (None, 0.0)))
            while question := pipe.recv():
                method, args, number = question
                call, result, begin = getattr(it, method), None, perf_counter()
                for _ in range(number):
                    result = call(*args)
                pipe.send(("", (result, (perf_counter() - begin) / number)))
        except Exception as error:
            if not isinstance(error, EOFError):
                pipe.send((traceback.format_exc(), None))
            raise  # ends the other ranks


if __name__ == "__main__":
    serve(sys.argv[1])
