"""A process of its own in which HDF5 opens what may be damaged: a crash or a hang there is one finding more."""

import os
import resource
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from dpnn.data import shards
from dpnn.data.manifest import Content, Shard
from dpnn.data.problems import Problem
from dpnn.errors import DataError

MOST_MEMORY = 8 << 30


class _Request(msgspec.Struct):
    path: str
    content: Content
    shard: Shard


class Probe:
    """Asks the process, which is started at the first question, and anew after it died. For any number of threads."""

    def __init__(self, limit_s: float = 30.0) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._closed = False

    def problems(self, path: Path, content: Content, shard: Shard) -> list[Problem]:
        """What is wrong with all of a shard but its samples and its size."""
        request = msgspec.json.encode(_Request(str(path), content, shard))
        with self._lock:
            process, pipe = self._start()
            try:
                pipe.send_bytes(request)
                if pipe.poll(self._limit_s):
                    return msgspec.json.decode(pipe.recv_bytes(), type=list[Problem])
                ended = f"hangs on it (for {self._limit_s:g} s)"
            except (EOFError, OSError):
                ended = f"crashes on it ({_cause(process.wait())})"
            self._end()
        return [Problem(text=f"{path}: the HDF5 library {ended}; {shards.REPAIR}", file=str(path))]

    def close(self) -> None:
        """End the process, also while it is being asked."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        with self._lock:
            self._end()

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._process is None or self._pipe is None:
            if self._closed:
                raise DataError("the check was ended")
            self._pipe, theirs = Pipe()
            # -P: what lies in the working directory is not meant to be imported.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            theirs.close()
        return self._process, self._pipe

    def _end(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.wait()
        self._process = self._pipe = None


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _answer(request: _Request) -> list[Problem]:
    path, content, shard = Path(request.path), request.content, request.shard
    try:
        layout, problems = shards.inspect(path, content, shard)
        if not problems:
            problems += shards.payload_problems(layout, path, content, shard)
        if not problems:
            file = shards.open_shard(path)
            try:
                outside = shards.read_outside(file, path, shard)
            finally:
                os.close(file)
            problems += shards.index_problems(shards.index_of(outside, layout, content), path, content, shard)
    except DataError as error:
        return [Problem(text=str(error), file=request.path)]
    except Exception as error:  # whatever h5py makes of damaged structures
        text = f"{path} can't be read by HDF5 ({type(error).__name__}: {error}); {shards.REPAIR}"
        return [Problem(text=text, file=request.path)]
    return problems


def _main(descriptor: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, and its parent ends it
    pipe = Connection(descriptor)
    while True:
        try:
            request = msgspec.json.decode(pipe.recv_bytes(), type=_Request)
        except EOFError:
            return
        pipe.send_bytes(msgspec.json.encode(_answer(request)))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
