"""How a server's parameters are stored: by what was faster when both ways were last tried."""

import pytest

from dpnn.strategies.downpour.copies import _KEPT, _TRIED, Stores


def take(stores: Stores, pieces: int, seconds: dict[bool, float]) -> list[bool]:
    """How each piece was stored, where one takes so long by the way it is stored."""
    ways = []
    for _ in range(pieces):
        ways.append(stores.streams)
        stores.took(seconds[stores.streams])
    return ways


@pytest.mark.parametrize("streams", [False, True])
def test_the_faster_way_is_kept_and_found_anew_when_that_changes(streams: bool):
    stores = Stores()
    for faster in (streams, not streams, streams):
        seconds = {faster: 1e-10, not faster: 3e-10}
        assert take(stores, 2 * _TRIED, seconds) == [False] * _TRIED + [True] * _TRIED
        assert take(stores, _KEPT, seconds) == [faster] * _KEPT


def test_a_few_pieces_that_were_held_up_change_nothing():
    stores = Stores()
    for _ in range(_TRIED // 2 - 1):
        stores.took(1.0)
    take(stores, 2 * _TRIED - _TRIED // 2 + 1, {False: 1e-10, True: 3e-10})
    assert not stores.streams
