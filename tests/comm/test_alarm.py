"""Which errors come from a death, where the others can go on."""

import pytest
from mpi4py import MPI

from dpnn.comm import alarm
from dpnn.comm.alarm import Alarm
from dpnn.errors import DataError, RankError


@pytest.fixture
def armed(monkeypatch):
    """armed(dead) -> an alarm that looks for deaths, of which there is one, or none."""

    def make(dead: bool) -> Alarm:
        found = Alarm()
        found.arm(MPI.COMM_SELF)
        monkeypatch.setattr(found, "_rings", lambda world: dead)
        monkeypatch.setattr(alarm, "_PATIENCE_S", 0.05)
        return found

    return make


@pytest.mark.parallel([1])
@pytest.mark.parametrize("error", [RankError("waited"), MPI.Exception(MPI.ERR_OTHER), ValueError("load key")])
def test_an_error_comes_from_a_death_where_there_is_one(armed, error):
    assert armed(True).heard(error)
    assert not armed(False).heard(error)
    assert not Alarm().heard(error)


@pytest.mark.parallel([1])
def test_what_is_wrong_with_the_data_is_so_whoever_dies(armed):
    assert not armed(True).heard(DataError("damaged"))


@pytest.mark.parallel([1])
def test_what_is_made_while_a_rank_dies_is_kept(armed):
    kept, error = [], ValueError("cut short")
    with armed(True).outlived(kept):
        raise error
    assert kept == [error]
    with pytest.raises(ValueError, match="cut short"), armed(False).outlived(kept):
        raise error
