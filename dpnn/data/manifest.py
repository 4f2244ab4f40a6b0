"""`manifest.json`: what a folder of shards holds. Rank 0 reads it, all others get it from rank 0.

It ends in a seal, the CRC of all it says: shards are checked against their manifest, and nothing else would tell that
the manifest itself (a mean, say) was damaged or edited.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from isal.isal_zlib import crc32

from dpnn.data.durable import replacing
from dpnn.data.problems import Problem, refuse
from dpnn.errors import DataError

NAME = "manifest.json"
VERSION = 1
DTYPES = ("uint8", "float16", "float32")


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What all shards of a folder have in common."""

    kind: Literal["raw", "encoded"]
    """raw: arrays of one shape; encoded: records of bytes, which `codec` makes samples."""
    shape: tuple[int, ...] = ()
    """Of one raw sample, as stored: (H, W, C) for images. Of one frame. Empty for encoded images."""
    dtype: str = "uint8"
    codec: Literal["", "image", "frames"] = ""
    """image: a JPEG, PNG or other picture, as its bytes say. frames: arrays of `shape`, one or more, end to end."""
    labels: Literal["single", "multi"]
    num_classes: int
    block: int
    """Samples of a block: what is read, and checked by its CRC, at a time."""

    @property
    def sample_nbytes(self) -> int:
        """Bytes of one raw sample."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def channels(self) -> int:
        """Of how many numbers the mean and the standard deviation are: of the last dimension, or of RGB."""
        return self.shape[-1] if self.shape else 3

    def content_contradictions(self) -> list[str]:
        """What contradicts itself in it, so that no shard can be read by it."""
        of_kind = f"codec = {self.codec!r}" if self.codec else f"kind = {self.kind!r}"
        wrong = [
            (self.dtype not in DTYPES, f"dtype = {self.dtype!r} is none of {', '.join(DTYPES)}"),
            (self.block < 1, f"block = {self.block} is less than 1"),
            (self.num_classes < 1, f"num_classes = {self.num_classes} is less than 1"),
            ((self.codec == "image") == bool(self.shape), f"shape = {list(self.shape)} doesn't fit {of_kind}"),
            (any(dim < 1 for dim in self.shape), f"shape = {list(self.shape)} has a dimension below 1"),
            ((self.kind == "encoded") != bool(self.codec), f"codec = {self.codec!r} doesn't fit kind = {self.kind!r}"),
            (self.kind == "encoded" and self.dtype != "uint8", f"dtype = {self.dtype!r} doesn't fit {of_kind}"),
        ]
        return [text for is_wrong, text in wrong if is_wrong]


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a folder."""

    name: str
    samples: int
    bytes: int
    uuid: str
    digest: str
    """CRC32 of all that isn't payload (labels, ids, checksums, HDF5's own structures): 8 hexadecimal digits."""
    payload_offset: int
    payload_bytes: int

    @property
    def is_in_folder(self) -> bool:
        """Whether its name is that of a file in the folder itself."""
        return self.name not in ("", ".", "..") and not set(self.name) & {"/", "\0"}


class Manifest(Content, frozen=True, kw_only=True):
    """What a folder of shards holds."""

    version: int = VERSION
    samples: int
    histogram: tuple[int, ...]
    """Samples of each class."""
    mean: tuple[float, ...]
    """Of the stored values, for each channel (the last dimension); of the decoded ones for encoded images, as RGB."""
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    """One for each class, where they have names."""
    shards: tuple[Shard, ...]

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [shard.samples for shard in self.shards]

    @property
    def digest(self) -> str:
        """CRC32 of the manifest, 8 hexadecimal digits: which data a checkpoint belongs to."""
        return f"{crc32(msgspec.json.encode(self)):08x}"

    def to_bytes(self) -> bytes:
        """The JSON text, with its seal."""
        seal = msgspec.json.encode(_Seal(self.digest))
        return msgspec.json.format(msgspec.json.encode(self)[:-1] + b"," + seal[1:], indent=1)

    @classmethod
    def from_bytes(cls, text: bytes, path: Path = Path(NAME)) -> "Manifest":
        """From the JSON text of `path`; DataError naming what is wrong with it."""
        manifest, problems = cls._decode(text, path)
        refuse(problems)
        return manifest

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest of a folder; DataError where there is none, or a damaged one."""
        manifest, problems = cls.inspect(folder)
        refuse(problems)
        return manifest

    @classmethod
    def inspect(cls, folder: str | Path) -> tuple["Manifest", list[Problem]]:
        """The manifest of a folder and all that is wrong in it; DataError where there is none that can be read."""
        path = Path(folder) / NAME
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            parts = sorted(str(found.parent) for found in path.parent.glob(f"*/{NAME}"))
            if parts:
                way_out = f"did you mean {' or '.join(parts)}?"
            else:
                way_out = "write it with `dpnn pack SOURCE FOLDER`, which makes FOLDER/train and FOLDER/test"
            missing = f"{folder} holds no {NAME}" if path.parent.is_dir() else f"the data folder {folder} doesn't exist"
            raise DataError(f"{missing}; {way_out}") from error
        except OSError as error:
            raise DataError(f"{path} can't be read ({error.strerror}); check its permissions") from error
        return cls._decode(text, path)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`: the last thing that is written into a folder of shards."""
        with replacing(folder / NAME) as temporary:
            temporary.write_bytes(self.to_bytes())

    @classmethod
    def _decode(cls, text: bytes, path: Path) -> tuple["Manifest", list[Problem]]:
        try:
            manifest, seal = msgspec.json.decode(text, type=cls), msgspec.json.decode(text, type=_Seal).seal
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} can't be read ({error}); pack the data again") from error
        wrong = manifest._contradictions()
        if not wrong and seal != manifest.digest:
            wrong = [f"it was damaged, or changed by hand (its seal is {seal!r} instead of {manifest.digest!r})"]
        return manifest, [Problem(text=f"{path}: {it}; pack the data again", file=str(path)) for it in wrong]

    def _contradictions(self) -> list[str]:
        """What contradicts itself, worst first."""
        if self.version != VERSION:
            return [f"version = {self.version}, and this dpnn reads version {VERSION}"]
        if not self.shards:
            return ["it names no shards, so there is nothing to train on"]
        wrong = [
            (len(self.histogram) != self.num_classes, "the histogram has not one number for each class"),
            (not len(self.mean) == len(self.std) == self.channels, "mean and std have not one number for each channel"),
            (len(self.class_names) not in (0, self.num_classes), "class_names are not one for each class"),
            (self.samples != sum(self.counts), f"samples = {self.samples}, and its shards hold {sum(self.counts)}"),
        ]
        problems = self.content_contradictions() + [text for is_wrong, text in wrong if is_wrong]
        problems += [f"{shard.name} holds no samples" for shard in self.shards if shard.samples < 1]
        problems += [f"{s.name!r} is not a plain file name" for s in self.shards if not s.is_in_folder]
        names, uuids = Counter(s.name for s in self.shards), Counter(s.uuid for s in self.shards)
        problems += [f"{value} stands for two shards" for value, n in (names | uuids).items() if n > 1]
        if not problems and self.kind == "raw":
            problems = [
                f"{s.name}: payload_bytes = {s.payload_bytes} is not {s.samples} samples of {self.sample_nbytes} bytes"
                for s in self.shards
                if s.payload_bytes != s.samples * self.sample_nbytes
            ]
        return problems


class _Seal(msgspec.Struct):
    """What a manifest's text has beside its fields: its digest when it was written."""

    seal: str


def parts(folder: Path) -> list[Path]:
    """The folders of shards that are meant by a folder: itself, or its train/ and test/."""
    found = [folder / name for name in ("train", "test") if (folder / name).is_dir()]
    return [folder] if (folder / NAME).exists() or not found else found
