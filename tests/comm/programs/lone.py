"""Meets the world as the `dpnn` command does, and prints its size."""

import sys

from dpnn.comm.world import run
from dpnn.errors import DpnnError


def main(world) -> int:
    print(f"size {world.size}")
    return 0


if __name__ == "__main__":
    try:
        code = run(main, 30)
    except DpnnError as error:
        print(f"dpnn: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
