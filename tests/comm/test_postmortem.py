"""The lines of a post-mortem: one for every rank, whatever became of it, and the telling ones first."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from dpnn.comm.postmortem import LastWords, by_rank, complete, forget, lines_of, table
from dpnn.comm.slots import Place, here


def well(ago: float = 0.0) -> Place:
    """Of this process, last seen some seconds ago; it hasn't moved for half a minute."""
    now = time.time()
    return Place(0, os.getpid(), here(), 1, 5, now - ago, now - 30, "", "Forward conv1")


def line(rank: int, waits: bool = True, node: str = "n0") -> str:
    does = "waits for the other ranks: step 5, Finish" if waits else "works: step 5, reading a batch"
    return f"rank {rank} ({node}) {does}, since 14:03:05; last seen 14:03:36"


def said(place: Place) -> str:
    (found,) = lines_of([place])
    assert found.startswith(f"rank {place.rank} ({socket.gethostname()}) ")
    return found


@pytest.fixture
def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_rank_waits_or_works():
    place = well()
    seen, since = (time.strftime("%H:%M:%S", time.localtime(at)) for at in (place.seen, place.since))
    assert f" works: epoch 1, step 5, Forward conv1, since {since}; last seen {seen}" in said(place)
    waiting = place._replace(rank=7, epoch=0, whom="the losses", doing="Finish")
    assert f" waits for the losses: step 5, Finish, since {since}; last seen {seen}" in said(waiting)


def test_a_rank_that_can_not_be_well_is_told_apart(dead):
    late = well(ago=60)
    assert " is dead: epoch 1" in said(late._replace(pid=dead))
    assert " is stuck, and Python with it: epoch 1" in said(late)
    assert ", and waits for rank 1, since" in said(late._replace(whom="rank 1"))


def test_a_process_number_of_another_container_says_nothing(dead):
    assert " works: " in said(well()._replace(pid=dead, space=here() + 1))
    assert " works: " in said(well()._replace(pid=dead))  # it has just been seen


def test_ranks_without_a_word_are_named_together():
    lines = complete(by_rank([line(rank) for rank in (0, 1, 2, 5)]), 12)
    assert lines[:4] == [line(rank) for rank in (0, 1, 2, 5)]
    assert lines[4].startswith("no word from ranks 3-4, 6-11: ")
    assert complete(by_rank([line(0)]), 2)[1].startswith("no word from rank 1: ")
    assert complete(by_rank([line(0)]), 1) == [line(0)]


def test_ranks_that_do_not_wait_come_first_and_of_many_that_do_only_some_are_shown():
    lines = [line(rank, waits=rank not in (500, 900)) for rank in range(1000)]
    head, *shown = table(lines, 1000, "runs/x/post-mortem.txt").splitlines()
    assert head == "post-mortem of 1000 ranks, kept in runs/x/post-mortem.txt:"
    assert shown[:2] == [f"  {lines[500]}", f"  {lines[900]}"]
    assert shown[2:34] == [f"  {found}" for found in lines[:32]]
    assert shown[34:] == ["  and 966 more ranks that wait"]
    assert "kept" not in table(lines, 1000, "")


def test_nodes_meet_in_the_folder(tmp_path):
    """One ends the job; the others look for that, and bring their lines. One comes too late."""
    words = LastWords(tmp_path, 6)
    assert not words.are_asked()

    def bring() -> None:
        other = LastWords(tmp_path, 6)
        while not other.are_asked():
            time.sleep(0.01)
        other.add([line(2, node="n1"), line(3, node="n1")], 2)

    thread = threading.Thread(target=bring)
    thread.start()
    found = words.collect([line(0), line(1)], 1.0)
    thread.join()
    assert list(found) == [0, 1, 2, 3]
    lines = complete(found, 6)
    assert words.keep(lines) == str(tmp_path / "post-mortem.txt")
    assert (tmp_path / "post-mortem.txt").read_text().splitlines() == lines
    assert os.listdir(tmp_path) == ["post-mortem.txt"]
    forget(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_line_that_is_just_being_written_is_not_taken():
    assert by_rank([line(1), line(2)[:-3], ""]) == {1: line(1)}


def test_a_node_alone_asks_nobody(tmp_path):
    assert LastWords(tmp_path, 2).collect([line(0), line(1)], 60.0) == {0: line(0), 1: line(1)}
    assert os.listdir(tmp_path) == []
