"""What mpirun says itself when a job fails: noise below dpnn's own message, the only clue where there is none."""

import re

_MESSAGE = b"dpnn: "
_RULE = re.compile(rb"-{20,}\s*")
_BOX = re.compile(
    rb"MPI_ABORT was invoked|(prterun|mpirun|mpiexec) (has exited due to|detected that one or more processes exited)"
    rb"|Primary job +terminated normally, but"
)
"""The first line inside a box of Open MPI (5 and 4) that says no more than that a rank ended the job."""
_LINE = re.compile(
    rb"Abort\(\d+\) on node \d+|BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES"
    rb"|\[[^]]+\] \[\[\d+,\d+\],\d+\] ORTE_ERROR_LOG: .*/show_help\.c at line \d+"
    rb"|\[[^]]+\] (\d+ more process(es)? has sent help message|Set MCA parameter .*_base_help_aggregate)"
    rb"|NBC_Progress: an error \d+ was found during schedule"
)
"""The line that MPICH writes for MPI_Abort, those of Open MPI 4 where ranks end while it collects their boxes, and that
of Open MPI 5 where a rank dies that the others outlive."""
_MAY_BECOME = (_MESSAGE, b"-" * 20, b"Abort(", b"[", b"NBC_Progress: ")


class Notes:
    """A filter for the stderr of mpirun: keeps its notes on an abort back, passes everything else on at once.

    `feed` takes bytes as they come and returns those to pass on. `rest` returns, at the end, what was kept back: the
    notes only where no line began with `dpnn: `.
    """

    def __init__(self) -> None:
        self._told = False
        self._notes = b""
        self._box: bytes | None = None  # the lines of a box so far: its rule, then its text
        self._line = b""
        self._passed = False  # whether the beginning of the current line is already out

    def feed(self, data: bytes) -> bytes:
        """The part of all data so far that is to be written now."""
        out = b""
        # Open MPI ends its notes with a NUL.
        *lines, self._line = (self._line + data.replace(b"\0", b"")).split(b"\n")
        for line in lines:
            out += line + b"\n" if self._passed else self._sort(line + b"\n")
            self._passed = False
        if self._line and (self._passed or not self._kept(self._line)):
            out, self._line, self._passed = out + self._line, b"", True
        return out

    def rest(self) -> bytes:
        """What was kept back and is to be written after all. The stream has ended."""
        kept = (self._box or b"") + self._line
        return kept if self._told else self._notes + kept

    def _kept(self, begun: bytes) -> bool:
        """Whether a line that begins so can't be passed on yet."""
        return self._box is not None or any(begun.startswith(s[: len(begun)]) for s in _MAY_BECOME)

    def _sort(self, line: bytes) -> bytes:
        self._told |= line.startswith(_MESSAGE)
        if self._box is None:
            if _RULE.fullmatch(line):
                self._box = line
                return b""
            if _LINE.match(line):
                self._notes += line
                return b""
            return line
        first = _RULE.fullmatch(self._box)
        self._box += line
        if first and not _BOX.match(line):
            passed, self._box = self._box, None
            return passed
        if _RULE.fullmatch(line):
            self._notes, self._box = self._notes + self._box, None
        return b""
