"""Waiting ends: with an answer, with an error, or at its limit."""

import threading
import time

import pytest

from dpnn.comm.faults import deadline, exit_code, message, reported, wait, within
from dpnn.comm.pulse import PULSE
from dpnn.errors import DataError, NotFiniteError, RankError, Stopped


def test_a_wait_ends_with_its_answer():
    answers = iter([False] * 3000 + [True])
    wait(lambda: next(answers), "an answer", 60)
    assert next(answers, "used up") == "used up"


def test_a_wait_ends_at_its_limit_and_names_whom_it_waited_for():
    with pytest.raises(RankError, match=r"waited 0\.02 s for ranks 1 and 2.*raise parallel\.stall_abort_s"):
        wait(lambda: False, "ranks 1 and 2", 0.02)


def test_whom_a_rank_waits_for_is_noted_and_stays_noted_where_it_waited_in_vain():
    PULSE.begin()
    seen = []

    def look() -> bool:
        seen.append((PULSE.whom, PULSE.since))
        return time.monotonic() > begin + 0.02

    begin = time.monotonic()
    wait(look, "rank 1", 60)
    assert seen[0][0] == ""  # most waits end before they are worth a note
    assert seen[-1][0] == "rank 1"
    assert begin <= seen[-1][1] <= time.monotonic()
    assert (PULSE.whom, PULSE.beats) == ("", 1)
    with pytest.raises(RankError):
        wait(lambda: False, "rank 2", 0.01)
    assert PULSE.whom == "rank 2"  # for the post-mortem
    PULSE.begin()


def test_a_wait_in_a_wait_counts_only_where_the_outer_one_is_idle():
    PULSE.begin()
    with PULSE.waiting("others", 1.0):
        with PULSE.waiting("rank 1", 2.0):
            assert (PULSE.whom, PULSE.since) == ("others", 1.0)
        assert PULSE.beats == 0  # asking again and again isn't getting on
    with PULSE.waiting("anybody", 1.0, idle=True):
        with PULSE.waiting("rank 1", 2.0):
            assert (PULSE.whom, PULSE.since, PULSE.idle) == ("rank 1", 2.0, False)
        assert (PULSE.whom, PULSE.since, PULSE.idle) == ("anybody", 1.0, True)
    assert (PULSE.whom, PULSE.idle) == ("", False)


def test_what_another_thread_waits_for_is_not_noted():
    PULSE.begin()
    thread = threading.Thread(target=wait, args=(iter([False] * 60 + [True]).__next__, "a file", 60))
    thread.start()
    thread.join()
    assert (PULSE.whom, PULSE.beats) == ("", 0)


def test_a_blocking_call_ends_with_its_answer_with_its_error_or_at_its_limit():
    assert within(5.0, "nobody", threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        within(5.0, "nobody", lambda: 1 // 0)
    never = threading.Event()
    with pytest.raises(RankError, match=r"waited 0\.1 s for the other devices"):
        within(0.1, "the other devices", never.wait)
    never.set()  # ends the thread


def test_an_error_that_mpi_reports_is_a_rank_error():
    from mpi4py import MPI

    def test() -> bool:
        raise MPI.Exception(MPI.ERR_TRUNCATE)

    with pytest.raises(RankError, match=r"while waiting for rank 1, MPI reported: .*trunc"):
        wait(test, "rank 1", 60)
    with (
        pytest.raises(RankError, match=r"while serving the workers, MPI reported: .*trunc"),
        reported("serving the workers"),
    ):
        test()


def test_another_error_stays_what_it_is():
    def test() -> bool:
        raise RuntimeError("not MPI's")

    with pytest.raises(RuntimeError, match="not MPI's"):
        wait(test, "rank 1", 60)
    with pytest.raises(RuntimeError, match="not MPI's"), reported("serving the workers"):
        test()


def test_a_block_that_misses_its_deadline_fails():
    failed = threading.Event()
    errors = []

    def fail(error: RankError) -> None:
        errors.append(error)
        failed.set()

    with deadline(0.02, "meeting", fail):
        assert failed.wait(60)
    assert "meeting took more than 0.02 s" in str(errors[0])


def test_a_block_that_meets_its_deadline_does_not():
    errors = []
    with deadline(60, "meeting", errors.append):
        pass
    assert errors == []


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("shard 3"), 3, "dpnn: rank 7: shard 3"),
        (NotFiniteError("nan"), 5, "dpnn: rank 7: nan"),
        (Stopped("again"), 75, "dpnn: rank 7: again"),
        (KeyboardInterrupt(), 130, "dpnn: rank 7: interrupted (SIGINT)"),
        (SystemExit("no"), 1, "dpnn: rank 7: ended by sys.exit('no') while the job was running"),
        (SystemExit(), 0, "dpnn: rank 7: ended by sys.exit(None) while the job was running"),
        (ValueError("x"), 1, "dpnn: rank 7: ValueError: x"),
    ],
)
def test_every_error_has_its_code_and_its_text(error, code, text):
    assert exit_code(error) == code
    assert message(error, 7) == text


def test_an_agreed_error_names_no_rank():
    assert message(DataError("shard 3")) == "dpnn: shard 3"
