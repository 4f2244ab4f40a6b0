"""Damaged data, case by case: each is read right or refused with its name. `fuzz.py FIRST END FOLDER` runs the cases.

Case n is drawn from its number alone. Its number is printed before it begins, so that a case which takes the process
down is known, and a line of JSON [n, what went wrong] where it went wrong.
"""

import copy
import faulthandler
import io
import itertools
import json
import sys
import warnings
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image
from tfrecord import TFRecordWriter

from dpnn.data.check import Probe, check
from dpnn.data.decode import BadImage, decode, encode, header
from dpnn.data.labels import Lists, histogram
from dpnn.data.manifest import NAME, Content, Manifest
from dpnn.data.pack.youtube8m import read_youtube8m
from dpnn.data.reader import ShardReader, check_shards
from dpnn.data.writer import write_shard
from dpnn.errors import DataError

LIMIT_S = 20
"""Of a case, which takes some milliseconds: a hang."""


class Wrong(Exception):
    """What a case must not do."""


def mutated(data, rng):
    """Bytes with one to three damages."""
    data = bytearray(data)
    kinds = 9 if rng.integers(2) else 5  # every other time the length stays: that is seen by no size
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(len(data) + 1)), int(rng.integers(1, 1 + rng.choice([8, 64, 4096])))
        match rng.integers(kinds):
            case 0 | 1 if data:
                data[at % len(data)] ^= 1 << rng.integers(8)
            case 2 if data:
                data[at % len(data)] = rng.integers(256)
            case 3:
                data[at : at + n] = bytes(len(data[at : at + n]))
            case 4:
                n, to = min(n, len(data) // 2), int(rng.integers(len(data) + 1))
                at, to = min(at, len(data) - n), min(to, len(data) - n)
                data[at : at + n], data[to : to + n] = data[to : to + n], data[at : at + n]
            case 5:
                del data[at : at + n]
            case 6:
                data[at:at] = rng.bytes(n)
            case 7:
                del data[at:]
            case 8:
                data += rng.bytes(n) if rng.integers(2) else bytes(n)
    return bytes(data)


def mutated_json(text, rng):
    """A manifest with one value that is another, was left out, or stands elsewhere; half of them with a new seal."""
    tree = json.loads(text)
    places = list(_places(tree))
    holder, key = places[rng.integers(len(places))]
    value = holder[key]
    if isinstance(holder, list) and len(holder) > 1 and rng.integers(4) == 0:
        other = int(rng.integers(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif rng.integers(6) == 0:
        del holder[key]
    else:
        others = [0, -1, 1, 2, 1 << 31, 1 << 63, 1 << 64, 10**30, 0.5, 1e300, None, True, "", ".", "..", "a\0b", [], {}]
        if isinstance(value, int | float):
            others += [value + 1, value - 1, 2 * value, -value] * 3
        elif isinstance(value, str):
            others += ["../" + value, value[:-1], value + "x", 5000 * "x", "encoded", "raw", "multi", "float16"]
        elif isinstance(value, list):
            others += [value[:-1], value + value[:1], value[::-1], [value], copy.deepcopy(value) * 2]
        holder[key] = others[rng.integers(len(others))]
    text = json.dumps(tree).encode()
    if rng.integers(2):
        try:
            return msgspec.json.decode(text, type=Manifest).to_bytes(), True
        except (msgspec.MsgspecError, UnicodeEncodeError):
            pass
    return text, False


def _places(tree):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


class Shards:
    """A folder of three shards, of which one file is damaged at a time."""

    def __init__(self, folder, kind):
        rng = np.random.default_rng(len(kind))
        self._folder = folder / kind
        self._folder.mkdir()
        classes, block, counts = 5, 4, (9, 4, 14)
        n = sum(counts)
        if kind in ("raw", "multi"):
            content = {"kind": "raw", "shape": (3, 4, 2), "dtype": "uint8" if kind == "raw" else "float32"}
            samples = rng.integers(0, 255, (n, 3, 4, 2)).astype(content["dtype"])
            moments = 2
        elif kind == "image":
            content = {"kind": "encoded", "codec": "image"}
            samples = [encode(rng.integers(0, 255, (9, 8 + i % 3, 3)).astype(np.uint8)) for i in range(n)]
            moments = 3
        else:
            content = {"kind": "encoded", "codec": "frames", "shape": (6,)}
            samples = [rng.bytes(6 * (1 + i % 5)) for i in range(n)]
            moments = 6
        labels = rng.integers(0, classes, n).astype(np.int32)
        if kind in ("multi", "frames"):
            labels = Lists.from_dense(rng.random((n, classes)) < 0.4)
        content = Content(
            **content, labels="multi" if isinstance(labels, Lists) else "single", num_classes=classes, block=block
        )
        ids = rng.permutation(1000)[:n].astype(np.uint64)
        shards = []
        for i, (lo, hi) in enumerate(itertools.pairwise(np.cumsum((0, *counts)))):
            path = self._folder / f"{kind}-{i:05d}-of-00003.h5"
            blocks = [samples[a : min(a + block, hi)] for a in range(lo, hi, block)]
            shards.append(write_shard(path, content, labels[np.arange(lo, hi)], ids[lo:hi], blocks))
        Manifest(
            **msgspec.structs.asdict(content), samples=n, histogram=tuple(histogram(labels, classes)),
            mean=(100.5,) * moments, std=(7.25,) * moments, class_names=tuple("abcde"), shards=tuple(shards),
        ).write(self._folder)  # fmt: skip
        self._whole = {path.name: path.read_bytes() for path in self._folder.iterdir()}
        self._truth = self._read()
        self._probe = Probe(3)

    def case(self, rng):
        """Damage, read and check; then mend."""
        names = sorted(self._whole)
        name = NAME if rng.integers(3) == 0 else names[rng.integers(len(names))]
        sealed = False
        if name == NAME and rng.integers(2):
            damaged, sealed = mutated_json(self._whole[name], rng)
        else:
            damaged = mutated(self._whole[name], rng)
        path = self._folder / name
        path.write_bytes(damaged)
        try:
            self._judge(path, sealed)
        finally:
            path.write_bytes(self._whole[name])

    def _judge(self, path, sealed):
        refused = None
        try:
            manifest, samples = self._read()
            if samples != self._truth[1] or (manifest != self._truth[0] and not sealed):
                raise Wrong("training reads something else in silence")
        except DataError as error:
            refused = str(error)
            if str(path if not sealed else path.parent) not in refused:
                raise Wrong(f"training refuses it without its name: {refused}") from error
        report = check(self._folder, probe=self._probe)
        errors = [problem.text for problem in report.problems if not problem.warning]
        if refused and not errors:
            raise Wrong(f"the check finds nothing, and training refuses it: {refused}")
        # A manifest that was sealed again may say what training doesn't read, as the number of samples of a class.
        if errors and not refused and not sealed:
            raise Wrong(f"training takes it, and the check says {errors}")
        if errors and not any(str(path if not sealed else path.parent) in text for text in errors):
            raise Wrong(f"the check doesn't name it: {errors}")

    def _read(self):
        """As training reads: the manifest, then by id each sample as stored, with its labels."""
        manifest = Manifest.read(self._folder)
        check_shards(self._folder, manifest)
        reader = ShardReader(self._folder, manifest)
        found = {}
        try:
            for number, shard in enumerate(manifest.shards):
                index = reader.index(number)
                blocks = range(-(-shard.samples // manifest.block))
                samples = [record for block in blocks for record in reader.read_records(number, block)]
                for i, id_ in enumerate(index.ids.tolist()):
                    labels = index.labels[i : i + 1]
                    found[id_] = samples[i], (labels.indices if isinstance(labels, Lists) else labels).tolist()
        finally:
            reader.close()
        return manifest, found


class Pictures:
    """Records for the decoder alone, which can't see every damage: it must end, with a picture or `BadImage`."""

    def __init__(self, folder):
        rng = np.random.default_rng(1)
        image = np.cumsum(rng.integers(-9, 10, (40, 50, 3)), axis=1).astype(np.uint8)
        self._whole = [encode(image), encode(image[:17, :3])]
        for mode, form, options in [
            ("RGB", "JPEG", {"progressive": True}), ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "PNG", {}),
            ("RGBA", "PNG", {}), ("P", "GIF", {}), ("RGB", "BMP", {}), ("RGB", "WEBP", {}),
        ]:  # fmt: skip
            file = io.BytesIO()
            Image.fromarray(image).convert(mode).save(file, form, **options)
            self._whole.append(file.getvalue())

    def case(self, rng):
        """Decode a damaged one."""
        record = self._whole[rng.choice(len(self._whole), p=[0.3, 0.1, *[0.6 / 8] * 8])]
        damaged = mutated(record, rng)
        try:
            _, height, width = header(damaged)
            image = decode(damaged)
        except BadImage as error:
            if damaged == record:
                raise Wrong(f"it refuses a picture that wasn't changed: {error}") from error
            return
        if image.shape != (height, width, 3) or image.dtype != np.uint8:
            raise Wrong(f"its header says {height} x {width}, and it is {image.shape} of {image.dtype}")
        if damaged == record and not np.array_equal(image, decode(record)):
            raise Wrong("it is another picture")


class Videos:
    """A TFRecord file of YouTube-8M's, of which a record may be missing but none be wrong: there is no total."""

    def __init__(self, folder, frames):
        rng = np.random.default_rng(2)
        self._path = folder / f"train-{frames}.tfrecord"
        writer = TFRecordWriter(str(self._path))
        for i in range(6):
            context = {"labels": ([i, 10 + i], "int"), "id": (b"%04d" % i, "byte")}
            if frames:
                rgb, audio = ([rng.bytes(width) for _ in range(1 + i)] for width in (9, 4))
                writer.write(context, {"rgb": (rgb, "byte"), "audio": (audio, "byte")})
            else:
                rgb, audio = (rng.normal(size=width).astype(np.float32) for width in (9, 4))
                writer.write(context | {"mean_rgb": (rgb, "float"), "mean_audio": (audio, "float")})
        writer.close()
        self._whole = self._path.read_bytes()
        self._truth, bad = self._read()
        if len(self._truth) != 6 or bad:
            raise Wrong(f"it isn't read right as it was written: {bad}")

    def case(self, rng):
        """Read a damaged file."""
        damaged = mutated(self._whole, rng)
        self._path.write_bytes(damaged)
        try:
            found, bad = self._read()
        except DataError as error:
            found, bad = [], [str(error)]
        for text in bad:
            if str(self._path) not in text:
                raise Wrong(f"it is refused without its name: {text}")
        if any(record not in self._truth for record in found):
            raise Wrong("a video is read as something else in silence")
        if damaged == self._whole and found != self._truth:
            raise Wrong(f"it refuses a file that wasn't changed: {bad}")

    def _read(self):
        """As packing reads: each video and its labels, and why others were rejected."""
        (split,) = read_youtube8m(self._path).splits
        found, bad = [], []
        for i in range(len(split.ids)):
            try:
                if hasattr(split.samples, "codec"):
                    sample = split.samples.read(i)
                else:
                    sample = split.samples.read(np.array([i])).tobytes()
                found.append((sample, split.labels[i : i + 1].indices.tolist()))
            except DataError as error:
                bad.append(str(error))
        return found, bad


def main(first, end, folder):
    """Run the cases [first, end)."""
    folder = Path(folder)
    subjects = [
        *(Shards(folder, kind) for kind in ("raw", "image", "multi", "frames")),
        Pictures(folder), Videos(folder, False), Videos(folder, True),
    ]  # fmt: skip
    warnings.simplefilter("error")
    for number in range(first, end):
        print(number, flush=True)
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        try:
            subjects[number % len(subjects)].case(np.random.default_rng(number))
        except Exception as error:
            print(json.dumps([number, f"{type(error).__name__}: {error}"]), flush=True)
            if not isinstance(error, Wrong):
                faulthandler.cancel_dump_traceback_later()
                sys.excepthook(*sys.exc_info())
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
