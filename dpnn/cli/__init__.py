"""The command line, thin: `arguments.py` says what may be asked for, `commands.py` does it. MPI only where needed."""

import sys
from argparse import Namespace
from collections.abc import Sequence

from dpnn.cli.arguments import parser
from dpnn.errors import DpnnError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code (DESIGN, section 7)."""
    words = list(sys.argv[1:] if argv is None else argv)
    # What stands behind "--" is sbatch's; argparse would take it for arguments of ours.
    own = words.index("--") if words[:1] == ["submit"] and "--" in words else len(words)
    arguments = parser().parse_args(words[:own], Namespace(options=tuple(words[own + 1 :])))
    try:
        code: int = arguments.run(arguments)
    except DpnnError as error:
        print(f"dpnn: {error}", file=sys.stderr)
        return error.exit_code
    return code
