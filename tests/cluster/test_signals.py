"""A request to stop."""

import os
import signal

import pytest

from dpnn.cluster.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_does_not_kill(number):
    request = StopRequest()
    assert not request.asked
    os.kill(os.getpid(), number)
    assert request.asked


def test_a_second_interrupt_interrupts_and_other_signals_may_come_twice():
    request = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.asked
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_once_the_end_is_settled_a_signal_changes_nothing(number):
    request = StopRequest()
    request.settle()
    os.kill(os.getpid(), number)
    assert not request.asked
