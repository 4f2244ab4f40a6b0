"""The run folder: made anew, found again, and the place where a failure is kept."""

from pathlib import Path

import pytest

from dpnn.comm import launch
from dpnn.errors import JobError
from dpnn.observe import metrics
from dpnn.observe.folder import RunFolder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def test_runs_of_one_job_are_numbered():
    names = []
    for _ in range(3):
        folder = RunFolder.create("", "digits")
        folder.write_job("seed = 0\n")
        names.append(str(folder.path))
    assert names == ["runs/digits-001", "runs/digits-002", "runs/digits-003"]
    assert str(RunFolder.create("", "digits-large").path) == "runs/digits-large-001"
    assert str(RunFolder.existing("", "digits").path) == "runs/digits-003"


def test_after_999_runs_the_newest_is_still_the_newest():
    for number in (998, 999, 1000):
        Path(f"runs/digits-{number}").mkdir(parents=True)
        Path(f"runs/digits-{number}/job.toml").write_text("")
    assert str(RunFolder.existing("", "digits").path) == "runs/digits-1000"
    assert str(RunFolder.create("", "digits").path) == "runs/digits-1001"


def test_two_jobs_that_start_together_get_two_folders():
    assert RunFolder.create("", "digits").path != RunFolder.create("", "digits").path


def test_a_folder_that_holds_a_run_is_not_written_over():
    RunFolder.create("my run", "digits").write_job("seed = 0\n")
    with pytest.raises(JobError, match="'my run' holds a run already"):
        RunFolder.create("my run", "digits")
    assert RunFolder.existing("my run").job.read_text() == "seed = 0\n"


def test_a_folder_that_is_no_run_is_refused():
    Path("empty").mkdir()
    with pytest.raises(JobError, match="empty is not a run folder"):
        RunFolder.existing("empty")
    with pytest.raises(JobError, match="no run runs/digits-"):
        RunFolder.existing("", "digits")


def test_a_folder_that_cannot_be_made_is_refused():
    Path("file").write_text("")
    with pytest.raises(JobError, match="file/run can't be made"):
        RunFolder.create("file/run", "digits")


def test_the_first_of_all_ranks_to_fail_keeps_its_message():
    folder = RunFolder.create("", "digits")
    assert folder.claim("disk on fire", 3)
    assert not folder.claim("me too", 4)
    assert folder.failure.read_text() == "disk on fire\n"
    assert metrics.read(folder.metrics) == [{"kind": "end", "exit": 3, "error": "disk on fire"}]


@pytest.fixture
def telling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a launcher has asked this job to tell its folder in."""
    monkeypatch.setenv(launch.RUN, str(tmp_path / "told"))
    return tmp_path / "told"


def test_a_launcher_learns_the_folder_and_how_this_part_of_the_run_ended(telling: Path, tmp_path: Path):
    """Of each part, only from its own lines."""
    folder = RunFolder.create("a run of\nmine \udcff", "digits")
    for code in (75, None, 5, 0):
        folder.tell_launcher()
        told, ended = RunFolder.told(telling.read_bytes())
        assert (told.path, ended) == (tmp_path / folder.path, None)
        log = metrics.Metrics(folder.metrics)
        log.write("start")
        if code is not None:
            log.write("end", exit=code)
        log.write("event", event="end")
        log.close()
        assert RunFolder.told(telling.read_bytes())[1] == code


def test_nobody_is_told_who_has_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(launch.RUN, raising=False)
    RunFolder.create("run", "digits").tell_launcher()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_launcher_on_another_node_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(launch.RUN, str(tmp_path / "absent" / "told"))
    RunFolder.create("run", "digits").tell_launcher()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
