"""What is kept for other runs is made once on a node; where it can't be, that costs time only."""

import signal
import subprocess
from pathlib import Path

import pytest

from dpnn.caches import one_by_one, trouble

COMPILER = """
import sys, time
from pathlib import Path
from dpnn.caches import one_by_one
cache, log = map(Path, sys.argv[1:])
with one_by_one("kernels-of-a-test"):
    if not cache.exists():
        time.sleep(0.2)
        cache.touch()
        with log.open("a") as file:
            file.write("made ")
with log.open("a") as file:
    file.write("used ")
"""
"""What several processes do that start together with an empty cache."""
HOLDER = """
import time
from dpnn.caches import one_by_one
with one_by_one("held-by-a-test"):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where locks lie."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_of_several_processes_one_makes_it_and_all_use_it(temporary, start_python):
    cache, log = temporary / "cache", temporary / "log"
    started = [start_python("-c", COMPILER, cache, log, env={"TMPDIR": str(temporary)}) for _ in range(4)]
    assert [one.finish().returncode for one in started] == [0] * 4
    assert sorted(log.read_text().split()) == ["made", *["used"] * 4]


def test_who_dies_inside_lets_go_and_who_is_stopped_is_not_waited_for_long(temporary, start_python):
    holder = start_python("-c", HOLDER, env={"TMPDIR": str(temporary)})
    holder.wait_for("in")
    holder.signal(signal.SIGSTOP)
    with one_by_one("held-by-a-test", 0.1) as alone:
        assert not alone
    holder.signal(signal.SIGKILL)
    with one_by_one("held-by-a-test", 30) as alone:
        assert alone


def test_without_a_place_for_locks_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with one_by_one("a") as alone:
        assert not alone


def test_a_folder_that_can_not_be_written_is_told_of(tmp_path):
    assert trouble(tmp_path / "new" / "folder") == ""
    (tmp_path / "file").write_text("")
    assert trouble(tmp_path / "file") == f"{tmp_path / 'file'} can't be written (File exists)"
    assert "(Not a directory)" in trouble(tmp_path / "file" / "inside")


def test_a_full_disk_is_told_of(tmp_path):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(tmp_path)], check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        Path(tmp_path, "all").write_bytes(b"\0" * 4096)
        assert "(No space left on device)" in trouble(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
