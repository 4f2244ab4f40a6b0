"""Copying shards to local disk: verified, whole or not at all, by several at once, and used again."""

import os
import resource
import signal
import threading
from types import SimpleNamespace

import pytest

from dpnn.data import Manifest, check_shards
from dpnn.data import stage as stage_module
from dpnn.data.stage import prepare_stage, stage, staged_folder
from dpnn.errors import DataError


@pytest.fixture
def data(write_folder, tmp_path):
    made = write_folder()
    made.target = staged_folder(str(tmp_path / "fast"), str(made.folder), made.manifest)
    return made


def copy(data, wanted=(0, 1, 2)):
    """Copy; what was told."""
    told = []
    prepare_stage(str(data.folder), data.target, data.manifest, wanted)
    turns = list(stage(str(data.folder), data.target, data.manifest, wanted, told.append))
    assert len(turns) == len(wanted)
    return told


def same(data, numbers=(0, 1, 2)):
    names = [data.manifest.shards[number].name for number in numbers]
    assert sorted(path.name for path in data.target.iterdir()) == sorted(["manifest.json", *names])
    return all((data.target / name).read_bytes() == (data.folder / name).read_bytes() for name in names)


def test_a_copy_is_a_folder_of_shards_like_the_first(data):
    (told,) = copy(data)
    assert told.startswith("0.00 of 0.00 GB")
    assert same(data)
    check_shards(data.target, Manifest.read(data.target))


def test_only_the_wanted_shards_are_copied(data):
    copy(data, [2])
    assert same(data, [2])


def test_what_is_there_and_right_stays_and_what_is_not_is_copied_again(data):
    copy(data)
    paths = [data.target / shard.name for shard in data.manifest.shards]
    before = [path.stat().st_ino for path in paths]
    with paths[0].open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"damaged!")
    os.truncate(paths[1], 100)
    assert copy(data)
    assert same(data)
    assert [path.stat().st_ino == old for path, old in zip(paths, before, strict=True)] == [False, False, True]
    assert copy(data) == []


def test_other_data_of_the_same_name_go_to_another_folder(data, write_folder):
    other = write_folder(counts=(8,), name="other").manifest
    one, two = (staged_folder("fast", "data/train", manifest) for manifest in (data.manifest, other))
    assert one.parent == two.parent
    assert one != two
    assert one.name.startswith("train-")


def test_room_is_looked_at_first(data, monkeypatch):
    nbytes = sum(shard.bytes for shard in data.manifest.shards)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=nbytes - 1, f_frsize=1))
    with pytest.raises(DataError, match=r"data.stage: .* has room for 0.00 GB, and the shards .* take 0.00 GB; make"):
        copy(data)
    assert not list(data.target.glob("*.h5"))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=nbytes, f_frsize=1))
    copy(data)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=1))
    assert copy(data) == []  # nothing is missing


def test_a_disk_that_takes_no_more_is_an_error_that_names_the_file(data):
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    prepare_stage(str(data.folder), data.target, data.manifest, [0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (data.manifest.shards[0].bytes - 500, limits[1]))
    try:
        with pytest.raises(
            DataError, match=rf"data.stage: .*{data.manifest.shards[0].name} can't be written \(File too"
        ):
            copy(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in data.target.iterdir()] == ["manifest.json"]


def test_a_folder_that_cannot_be_made_is_an_error(data, tmp_path):
    (tmp_path / "fast").write_text("a file")
    with pytest.raises(DataError, match=r"data.stage: .* can't be written \(Not a directory\)"):
        copy(data)


def test_any_damaged_byte_is_found_while_copying(data):
    shard = data.manifest.shards[0]
    path = data.folder / shard.name
    whole = path.read_bytes()
    for at in range(0, len(whole), 331):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(DataError, match=shard.name):
            copy(data, [0])
        assert [left.name for left in data.target.iterdir()] == ["manifest.json"]


def test_a_shard_is_copied_piece_by_piece(data, monkeypatch):
    monkeypatch.setattr(stage_module, "_COPY_NBYTES", 400)
    copy(data)
    assert same(data)


def test_several_may_copy_into_one_folder_at_once(data):
    failures = []

    def run():
        try:
            copy(data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert same(data)


def test_what_a_killed_process_left_is_removed_once_nobody_writes_to_it(data):
    data.target.mkdir(parents=True)
    old, new = data.target / ".a.h5.12-ab.tmp", data.target / ".b.h5.13-cd.tmp"
    for path in (old, new):
        path.write_bytes(b"half a shard")
    os.utime(old, (0, 0))
    copy(data)
    assert not old.exists()
    assert new.exists()


def test_a_shard_that_is_missing_at_its_source_is_an_error(data):
    (data.folder / data.manifest.shards[1].name).unlink()
    with pytest.raises(DataError, match=rf"{data.manifest.shards[1].name}: .* it is missing"):
        copy(data)
