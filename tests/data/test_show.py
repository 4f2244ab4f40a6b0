"""`dpnn data show`: the sheet has what the network sees, and the summary what the manifest says."""

import msgspec
import numpy as np
import pytest
from PIL import Image

from dpnn import cli
from dpnn.data.labels import Lists
from dpnn.data.manifest import Content, Manifest
from dpnn.data.show import show
from dpnn.data.show.summary import summary
from dpnn.data.view import view_of
from dpnn.data.writer import write_shard
from dpnn.errors import DataError, JobError

replace = msgspec.structs.replace


def holds(sheet, tile):
    """Whether an image is somewhere in a sheet, pixel by pixel."""
    h, w, _ = tile.shape
    rows, columns = np.nonzero((sheet[: 1 - h, : 1 - w] == tile[0, 0]).all(axis=2))
    return any((sheet[r : r + h, c : c + w] == tile).all() for r, c in zip(rows, columns, strict=True))


@pytest.mark.parametrize("augment", ["none", "crop-flip", "imagenet"])
def test_the_sheet_has_the_pixels_that_training_sees(write_folder, tmp_path, augment):
    data = write_folder(counts=(3, 2), shape=(100, 110, 3), block=2)
    out = tmp_path / "sheet.png"
    show(data.folder, out, samples=99, augment=augment, seed=5)
    sheet = np.asarray(Image.open(out))
    tiles = list(data.x)
    if augment != "none":
        view = view_of(
            data.manifest, augment=augment, seed=5, mean=data.manifest.mean, std=data.manifest.std, training=True
        )
        seen = np.empty((5, *view.shape), np.float32)
        for epoch in range(4):
            view.put(data.x, np.arange(5), view.draw(data.ids, epoch), seen)
            tiles += list(np.clip(np.round(seen * data.manifest.std + data.manifest.mean), 0, 255).astype(np.uint8))
    off = [i for i, tile in enumerate(tiles) if not holds(sheet, tile)]
    assert off == []
    assert len({tile.tobytes() for tile in tiles}) > (4 if augment == "none" else 20)


def test_small_images_are_enlarged_and_few_levels_stretched(write_folder, tmp_path):
    data = write_folder(counts=(1,), shape=(8, 8, 1), block=1)
    manifest = data.manifest
    x = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1) // 4
    shard = write_shard(data.folder / manifest.shards[0].name, manifest, data.labels, data.ids, [x])
    replace(manifest, shards=(shard,)).write(data.folder)
    show(data.folder, tmp_path / "sheet.png")
    wanted = np.round(255 * (x[0].astype(np.float32) / 15)).astype(np.uint8).repeat(12, 0).repeat(12, 1).repeat(3, 2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    top, left = np.argwhere((sheet == 0).all(axis=2)).min(axis=0)
    assert np.abs(sheet[top : top + 96, left : left + 96].astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("shape", [(9, 9, 12), (40,), (500,), (3, 4), (2, 3, 4, 5)])
def test_any_shape_of_samples_is_pictured(write_folder, tmp_path, shape, dtype):
    data = write_folder(counts=(4,), shape=shape, dtype=dtype, multi=True)
    show(data.folder, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] > 48
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 2


def test_frames_are_pictured_as_evaluation_and_as_training_take_them(tmp_path):
    content = Content(kind="encoded", codec="frames", shape=(5,), labels="multi", num_classes=9, block=2)
    lists = Lists(np.array([0, 0, 8]), np.arange(8, dtype=np.int32))
    records = [bytes(5 * [0] + 5 * [255]), bytes(5)]
    shard = write_shard(tmp_path / "a.h5", content, lists, np.arange(2), [records])
    Manifest(
        **msgspec.structs.asdict(content), samples=2, histogram=(1,) * 8 + (0,), mean=(9.0,) * 5, std=(2.0,) * 5,
        shards=(shard,),
    ).write(tmp_path)  # fmt: skip
    told = show(tmp_path, tmp_path / "sheet.png", frames=4)
    assert "as the network sees them, 4x1x5" in told
    assert "any of 9 classes, 4.00 a sample" in told
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert {(33, 59, 142), (160, 22, 40)} <= set(map(tuple, sheet.reshape(-1, 3).tolist()))


def test_few_classes_have_a_bar_each_and_of_many_the_ends_are_told(data_of_classes):
    few = data_of_classes([3, 0, 6], class_names=("ant", "bee", "cat"))
    assert few[-3:] == [f"    ant 3 {20 * '█'}", "    bee 0", f"    cat 6 {40 * '█'}"]
    many = data_of_classes([*range(1, 1001)])
    assert "of 1 (least), 500 (median) and 1,000 (most) samples; 0 without any" in many[-12]
    assert [line.split()[0] for line in many[-11:]] == [
        "999", "998", "997", "996", "995", "...", "4", "3", "2", "1", "0",
    ]  # fmt: skip


@pytest.fixture
def data_of_classes(write_folder, tmp_path):
    manifest = write_folder().manifest

    def lines(counts, **fields):
        told = replace(manifest, histogram=tuple(counts), num_classes=len(counts), **fields)
        return summary(tmp_path, told).splitlines()

    return lines


def test_what_training_refuses_is_refused(write_folder, tmp_path):
    data = write_folder()
    with pytest.raises(JobError, match="needs images"):
        show(write_folder(shape=(7,), name="flat").folder, tmp_path / "a.png", augment="crop-flip")
    with pytest.raises(JobError, match=r"nowhere/a\.png can't be written"):
        show(data.folder, tmp_path / "nowhere" / "a.png")
    with pytest.raises(JobError, match="samples = 0 is less than 1"):
        show(data.folder, tmp_path / "a.png", samples=0)
    (data.folder / data.manifest.shards[2].name).unlink()
    with pytest.raises(DataError, match="it is missing"):
        show(data.folder, tmp_path / "a.png", samples=99)


def test_the_command_prints_both_parts_and_writes_the_picture(write_folder, tmp_path, capsys):
    write_folder(name="train")
    write_folder(name="test")
    assert cli.main(["data", "show", str(tmp_path), "--out", str(tmp_path / "a.png"), "--samples", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{tmp_path}/train"
    assert f"{tmp_path}/test" in printed
    assert printed[-1] == f"{tmp_path}/a.png: 3 samples of {tmp_path}/train as the network sees them, 4x3x2"
    assert (tmp_path / "a.png").exists()
