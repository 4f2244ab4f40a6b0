"""mpirun's notes on an abort are dropped below dpnn's message, and only there; all else passes, at once."""

import pytest

from dpnn.comm.notes import Notes

RULE = b"-" * 74 + b"\n"
ABORT = (
    RULE
    + b"MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n  Proc: [[642,1],1]\n  Errorcode: 3\n\n"
    + b"NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.\n"
    + RULE
)
EXITED = RULE + b'prterun has exited due to process rank 1 with PID 0 on node a calling\n"abort".\n' + RULE
DETECTED = RULE + b"prterun detected that one or more processes exited with non-zero status,\nthus\n" + RULE
MPICH = b"Abort(3) on node 1 (rank 1 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 3) - process 1\n"
KILLED = RULE + b"prterun noticed that process rank 1 with PID 5340 on node a exited on\nsignal 9 (Killed).\n" + RULE
COLLECTED = (
    b"[n1:22998] [[13608,0],0] ORTE_ERROR_LOG: Data unpack would read past end of buffer in file "
    b"../../../orte/util/show_help.c at line 507\n"
    b"[n1:22998] 1 more process has sent help message help-mpi-api.txt / mpi-abort\n"
    b'[n1:22998] Set MCA parameter "orte_base_help_aggregate" to 0 to see all help / error messages\n'
)
MESSAGE = b"dpnn: rank 1: shard 3 is truncated\n"
OUTLIVED = (
    b"NBC_Progress: an error 75 was found during schedule 0x55da2f4bfbd0 at row-offset 0 - aborting the schedule\n"
)
NOTES = [ABORT + EXITED + b"\0", DETECTED, MPICH, COLLECTED, OUTLIVED]


def passed(data: bytes, size: int) -> bytes:
    """All that comes through, fed in pieces."""
    notes = Notes()
    return b"".join(notes.feed(data[i : i + size]) for i in range(0, len(data), size)) + notes.rest()


@pytest.mark.parametrize("size", [1, 7, 100, 10000])
@pytest.mark.parametrize("note", NOTES)
def test_notes_are_dropped_where_dpnn_has_spoken(note, size):
    assert passed(b"before\n" + MESSAGE + note + b"after\n", size) == b"before\n" + MESSAGE + b"after\n"


@pytest.mark.parametrize("note", NOTES)
def test_notes_are_dropped_even_where_they_overtake_the_message(note):
    assert passed(note + MESSAGE, 50) == MESSAGE


@pytest.mark.parametrize("size", [1, 7, 10000])
@pytest.mark.parametrize("note", NOTES)
def test_notes_are_shown_where_dpnn_is_silent(note, size):
    assert passed(b"before\n" + note, size) == b"before\n" + note.rstrip(b"\0")


@pytest.mark.parametrize("size", [1, 10000])
def test_other_notes_are_always_shown(size):
    assert passed(MESSAGE + KILLED, size) == MESSAGE + KILLED


def test_lines_between_rules_that_are_no_note_are_not_kept_back():
    notes = Notes()
    assert notes.feed(RULE) == b""
    assert notes.feed(b"epoch 1\n") == RULE + b"epoch 1\n"


@pytest.mark.parametrize("text", [b"step 10", b"50 %\r", b"dp", b"  dpnn: ", b"Ab", b"[n"])
def test_a_line_passes_before_it_is_complete_unless_it_may_become_a_note(text):
    kept = any(start.startswith(text) for start in (b"dpnn: ", b"Abort(", b"[n1:22998] "))
    notes = Notes()
    assert notes.feed(text) == (b"" if kept else text)
    assert notes.rest() == (text if kept else b"")


def test_a_line_that_ends_the_stream_without_its_end_is_shown():
    assert passed(RULE + b"MPI_ABORT was", 10000) == RULE + b"MPI_ABORT was"
