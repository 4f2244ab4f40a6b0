"""A job whose last rank ends in the way that the first argument names, while the others wait for its message.

The second argument is how long a rank waits for another.
"""

import atexit
import os
import signal
import sys
import threading
import time

import numpy as np

from dpnn.comm.faults import wait
from dpnn.comm.world import World, run
from dpnn.errors import DataError, DpnnError


def exception(world: World) -> None:
    raise ValueError("bad value")


def data_error(world: World) -> None:
    raise DataError("shard 3 is truncated")


def thread(world: World) -> None:
    def read() -> None:
        raise DataError("shard 4 is truncated")

    threading.Thread(target=read).start()
    time.sleep(1000)


def thread_exception(world: World) -> None:
    threading.Thread(target=lambda: {}["absent"]).start()
    time.sleep(1000)


def sys_exit(world: World) -> None:
    sys.exit(3)


def interrupt(world: World) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1000)


def kill(world: World) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(world: World) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def silent(world: World) -> None:
    time.sleep(1000)


def kill_late(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(world: World) -> None:
    sys.exit(0)


def main(world: World) -> int:
    print("working", flush=True)
    way = sys.argv[1]
    last = world.size - 1
    if way == "well":
        return 0
    if way == "code":
        return 75
    if way == "killed at last":
        atexit.register(kill_late if world.rank > 1 else time.sleep, 0.01 * world.rank)
        return 0
    if way == "everyone":
        raise DataError(f"shard {world.rank} is damaged")
    if way == "agree":
        world.agree(DataError(f"shard {world.rank} is damaged") if world.rank > 0 else None)
    elif way == "first":
        world.first(lambda: refuse("no such folder"))
    elif world.rank == last:
        globals()[way](world)
    request = world.comm.Irecv(np.zeros(1), source=last)
    wait(request.Test, f"a message of rank {last}", world.timeout_s)
    return 0


def refuse(text: str) -> None:
    raise DataError(text)


if __name__ == "__main__":
    try:
        code = run(main, float(sys.argv[2]))
    except DpnnError as error:
        print(f"dpnn: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
