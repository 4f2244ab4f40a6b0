"""Choices by timing are made once; the file that keeps them may be damaged or missing."""

import json

import pytest

from dpnn.backends.onednn.choices import Choices


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dpnn" / "machine.json"


class Clock:
    """Times by name; `asked` notes what was timed."""

    def __init__(self, **times):
        self.times, self.asked = times, []

    def __call__(self, name):
        self.asked.append(name)
        return self.times[name]


def test_the_fastest_is_taken_and_timed_once(cache):
    clock, made = Clock(slow=2.0, fast=1.0), {}
    choices = Choices("machine", made)
    assert [choices.fastest("a shape", ["slow", "fast"], clock) for _ in range(2)] == ["fast", "fast"]
    assert clock.asked == ["slow", "fast"]
    assert made == {"a shape": "fast"}


def test_another_run_reads_what_was_chosen(cache):
    Choices("machine", {}).fastest("a shape", ["slow", "fast"], Clock(slow=2.0, fast=1.0))
    clock, made = Clock(), {}
    assert Choices("machine", made).fastest("a shape", ["slow", "fast"], clock) == "fast"
    assert clock.asked == []
    assert made == {"a shape": "fast"}


def test_what_was_chosen_before_goes_before_the_file(cache):
    Choices("machine", {}).fastest("a shape", ["slow", "fast"], Clock(slow=2.0, fast=1.0))
    assert Choices("machine", {"a shape": "slow"}).fastest("a shape", ["slow", "fast"], Clock()) == "slow"


def test_a_choice_that_is_no_longer_offered_is_made_anew(cache):
    Choices("machine", {}).fastest("a shape", ["gone"], Clock(gone=1.0))
    assert Choices("machine", {}).fastest("a shape", ["slow", "fast"], Clock(slow=2.0, fast=1.0)) == "fast"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"a shape": 3}'])
def test_a_damaged_file_costs_the_timing_again(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    clock = Clock(slow=2.0, fast=1.0)
    assert Choices("machine", {}).fastest("a shape", ["slow", "fast"], clock) == "fast"
    assert clock.asked == ["slow", "fast"]
    assert json.loads(cache.read_text())["a shape"] == "fast"


def test_a_folder_that_can_not_be_made_costs_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    choices = Choices("machine", {})
    assert choices.fastest("a shape", ["slow", "fast"], Clock(slow=2.0, fast=1.0)) == "fast"
    assert choices.trouble == f"{file}/dpnn/machine.json can't be written (Not a directory)"


def test_two_runs_at_once_keep_each_others_choices(cache):
    one, other = Choices("machine", {}), Choices("machine", {})
    one.fastest("a shape", ["fast"], Clock(fast=1.0))
    other.fastest("another", ["slow"], Clock(slow=1.0))
    assert json.loads(cache.read_text()) == {"a shape": "fast", "another": "slow"}
