"""The rank's threads: work is cut without gaps, every share is done, and what fails is told."""

import threading

import numpy as np
import pytest

from dpnn.team import Team


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(("n", "least"), [(0, 1), (1, 1), (5, 2), (100, 33), (100, 1000), (3, 1)])
def test_runs_follow_on_one_another_and_none_is_too_short(size, n, least):
    runs = Team(size).cut(n, least)
    assert [i for run in runs for i in run] == list(range(n))
    assert 1 <= len(runs) <= size
    assert len(runs) == 1 or min(map(len, runs)) >= least
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_each_share_is_done_in_order_and_on_a_thread_of_its_own():
    done, meet = {}, threading.Barrier(3, timeout=20)

    def note(share, number):
        done.setdefault(share, []).append((number, threading.get_ident()))

    def shares():
        for share in range(3):
            yield [meet.wait, *[lambda s=share, n=number: note(s, n) for number in range(4)]]

    Team(3).run(list(shares()))
    assert all([number for number, _ in done[share]] == [0, 1, 2, 3] for share in range(3))
    assert len({thread for notes in done.values() for _, thread in notes}) == 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_a_share_raises_is_raised_here_and_the_team_goes_on(failing):
    team, done = Team(3), []

    def fail():
        raise ZeroDivisionError("share")

    with pytest.raises(ZeroDivisionError, match="share"):
        team.run([[fail] if share == failing else [lambda s=share: done.append(s)] for share in range(3)])
    assert sorted(done) == sorted({0, 1, 2} - {failing})
    team.run([[lambda s=share: done.append(s)] for share in range(3)])
    assert len(done) == 5


def test_numbers_that_overflow_warn_on_no_thread():
    large = np.full(4, 3e38, np.float32)
    with np.errstate(all="ignore"):
        Team(2).run([[lambda: large * large], [lambda: large * large]])
