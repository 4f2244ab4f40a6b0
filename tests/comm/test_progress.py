"""A thread that moves MPI is kept only where the first steps were shorter with it."""

import threading

import pytest

from dpnn.comm.progress import TRIAL_STEPS, Progress, progress


class Counted:
    """A communicator that counts."""

    def __init__(self):
        self.probed = threading.Event()

    def Iprobe(self):
        self.probed.set()


def threads():
    return [thread.name for thread in threading.enumerate()].count("dpnn-progress")


@pytest.mark.parametrize(("without", "with_thread", "helps"), [(2.0, 1.0, True), (1.0, 2.0, False), (1.0, 1.0, False)])
def test_the_shortest_step_decides_whatever_disturbs_others(without, with_thread, helps):
    before, comm = threads(), Counted()
    tried = Progress(comm)
    for step in range(TRIAL_STEPS):
        assert tried.helps is None
        comm.probed.clear()
        tried.on()
        used = step > 0 and step % 2 == 0
        assert comm.probed.wait(10 if used else 0.05) == used
        seconds = 100.0 if step in (0, 3, 4) else with_thread if used else without
        tried.off(0.1 if step in (5, 6) else 8 * seconds, 0 if step in (5, 6) else 8)
    assert tried.helps is helps
    assert threads() - before == helps
    comm.probed.clear()
    tried.on()
    assert comm.probed.wait(10 if helps else 0.05) == helps
    tried.off(1.0, 8)
    tried.close()
    assert threads() == before


@pytest.mark.parallel([1])
def test_on_one_node_there_is_nothing_to_move(world):
    assert progress(world.comm, 1) is None
