"""The command line, thin: `arguments.py` says what may be asked for, `commands.py` does it. MPI only where needed."""

import os
import select
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence

from dpnn.cli.arguments import parser
from dpnn.errors import DpnnError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code (DESIGN, section 7), or 141 where nobody reads on, as in `dpnn ... | head`."""
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still kept back would fail again
        return 128 + signal.SIGPIPE


def _run(words: list[str]) -> int:
    # What stands behind "--" is sbatch's; argparse would take it for arguments of ours.
    own = words.index("--") if words[:1] == ["submit"] and "--" in words else len(words)
    arguments = parser().parse_args(words[:own], Namespace(options=tuple(words[own + 1 :])))
    try:
        code: int = arguments.run(arguments)
    except DpnnError as error:
        print(f"dpnn: {error}", file=sys.stderr)
        return error.exit_code
    return code


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone."""
    pipe = select.poll()
    pipe.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in pipe.poll(0))
