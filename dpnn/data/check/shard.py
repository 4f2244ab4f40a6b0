"""All that can be wrong with one shard: its size, digest, structure, labels, ids, blocks and every sample."""

import itertools
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data import shards
from dpnn.data.check.probe import Probe
from dpnn.data.decode import BadImage, Room, decode
from dpnn.data.labels import Lists, histogram
from dpnn.data.manifest import Content, Shard
from dpnn.data.problems import Problem, listed
from dpnn.data.shards import Index
from dpnn.errors import DataError

Array = NDArray[Any]

_GLANCE = 64
"""So many pixels of a sample are compared before all are: few that aren't constant begin so."""


class Interrupted(Exception):
    """The check was ended from outside."""


@dataclass
class Checked:
    """What is known of a shard now."""

    problems: list[Problem] = field(default_factory=list)
    ids: Array | None = None
    """None, as the others below, where they can't be trusted."""
    counts: Array | None = None
    """Samples of each class."""
    unlabelled: int = 0
    """Samples whose list of labels is empty, which is allowed."""
    nbytes: int = 0
    """Bytes read."""


class ShardCheck:
    """Checks the shards of one folder; for any number of threads.

    `quick`: leave out the samples, and all that needs them. `stop`: set to end every check with `Interrupted`.
    """

    def __init__(self, folder: Path, content: Content, quick: bool, probe: Probe, stop: threading.Event) -> None:
        self._folder, self._content, self._quick = folder, content, quick
        self._probe, self._stop = probe, stop
        self._room = Room()
        self._channels = content.shape[-1] if len(content.shape) == 3 else 1
        self._pixels = math.prod(content.shape) // self._channels

    def __call__(self, shard: Shard) -> Checked:
        """Check one shard."""
        checked = Checked()
        path = self._folder / shard.name
        if self._stop.is_set():
            raise Interrupted
        try:
            file = shards.open_shard(path)
        except DataError as error:
            checked.problems.append(Problem(text=str(error), file=str(path)))
            return checked
        try:
            checked.problems += self._problems(file, path, shard, checked)
        except DataError as error:  # of reading: it shrank, or the disk fails
            checked.problems.append(Problem(text=str(error), file=str(path)))
        finally:
            os.close(file)
        return checked

    def _problems(self, file: int, path: Path, shard: Shard, checked: Checked) -> Iterator[Problem]:
        content = self._content
        try:
            outside = shards.read_outside(file, path, shard)
            checked.nbytes += len(outside.head) + len(outside.tail)
            shards.check_digest(outside, path, shard)
        except DataError as error:
            yield Problem(text=str(error), file=str(path))
            if os.fstat(file).st_size:
                yield from self._probe.problems(path, content, shard)
            return
        # From here on these are the bytes that were packed, which HDF5 wrote itself.
        layout, problems = shards.inspect(path, content, shard)
        problems += [] if problems else shards.payload_problems(layout, path, content, shard)
        yield from problems
        if problems:
            return
        index = shards.index_of(outside, layout, content)
        problems = list(shards.index_problems(index, path, content, shard))
        yield from problems
        checked.ids = index.ids
        if not any(problem.dataset.startswith("y") for problem in problems):
            checked.counts = np.array(histogram(index.labels, content.num_classes))
            if isinstance(index.labels, Lists):
                checked.unlabelled = int(np.count_nonzero(np.diff(index.labels.indptr) == 0))
                yield from _repeated(index.labels, path)
        if any(problem.dataset == "offsets" for problem in problems):
            return
        if index.offsets is not None and content.codec == "frames":
            yield from _broken_frames(index.offsets, content, path)
        if not self._quick:
            yield from self._payload(file, path, shard, index, checked)

    def _payload(self, file: int, path: Path, shard: Shard, index: Index, checked: Checked) -> Iterator[Problem]:
        """What is wrong with the samples, block by block."""
        content, name = self._content, shards.payload_name(self._content)
        damaged: dict[int, str] = {}
        bad: dict[int, str] = {}
        constant: list[int] = []
        for block in range(len(index.crcs)):
            if self._stop.is_set():
                raise Interrupted
            lo, hi = shards.block_range(content, shard, index, block)
            data = memoryview(bytearray(hi - lo))
            crc = shards.read_checked(file, data, shard.payload_offset + lo, path)
            checked.nbytes += len(data)
            first = block * content.block
            if found := shards.damage(crc, content, index, block):
                damaged[first] = str(shards.refusal(path, content, found))
                continue
            if index.offsets is None:
                values = np.frombuffer(data, content.dtype).reshape(-1, self._pixels, self._channels)
                bad |= dict.fromkeys((first + _not_finite(values)).tolist(), "it holds a number that isn't finite")
                constant += (first + _constant(values)).tolist()
                continue
            cuts = index.offsets[first : first + content.block + 1] - lo
            for number, (a, b) in enumerate(itertools.pairwise(cuts.tolist()), first):
                if self._stop.is_set():
                    raise Interrupted
                try:
                    constant += [number] * len(_constant(self._decoded(data[a:b])))
                except BadImage as error:
                    bad[number] = str(error)

        def tell_block(first: int) -> Problem:
            return Problem(text=damaged[first], file=str(path), dataset=name, index=first)

        def tell(number: int) -> Problem:
            text = f"{path}, {name}[{number}]: {bad[number]}; leave the sample out and pack the data again"
            return Problem(text=text, file=str(path), dataset=name, index=number)

        def warn(number: int) -> Problem:
            text = f"{path}, {name}[{number}]: all of the sample is one value"
            return Problem(text=text, file=str(path), dataset=name, index=number, warning=True)

        yield from listed(np.array(list(damaged), np.int64), tell_block)
        yield from listed(np.array(list(bad), np.int64), tell)
        yield from listed(np.array(constant, np.int64), warn)

    def _decoded(self, record: memoryview) -> Array:
        """A record as (1, pixels, channels)."""
        if self._content.codec == "image":
            return decode(record, room=self._room).reshape(1, -1, 3)
        return np.frombuffer(record, np.uint8).reshape(1, -1, 1)


def _not_finite(samples: Array) -> Array:
    """Which of the samples (n, pixels, channels) hold a number that is none."""
    if samples.dtype.kind != "f":
        return np.empty(0, np.int64)
    return np.flatnonzero(~np.isfinite(samples).all(axis=(1, 2)))


def _constant(samples: Array) -> Array:
    """Which of the samples (n, pixels, channels) have the same value in several pixels, and no other."""
    if samples.shape[1] == 1:
        return np.empty(0, np.int64)
    likely = np.flatnonzero((samples[:, :_GLANCE] == samples[:, :1]).all(axis=(1, 2)))
    constant: Array = likely[(samples[likely] == samples[likely, :1]).all(axis=(1, 2))]
    return constant


def _repeated(lists: Lists, path: Path) -> Iterator[Problem]:
    """Classes that stand twice in the list of one sample."""
    samples = np.repeat(np.arange(len(lists)), np.diff(lists.indptr))
    order = np.lexsort((lists.indices, samples))
    samples, classes = samples[order], lists.indices[order]
    again = np.flatnonzero((samples[1:] == samples[:-1]) & (classes[1:] == classes[:-1])) + 1

    def tell(place: int) -> Problem:
        at = int(order[place])
        text = (
            f"{path}, y_indices[{at}] = {classes[place]}: sample {samples[place]} has this label twice; it counts once"
        )
        return Problem(text=text, file=str(path), dataset="y_indices", index=at, warning=True)

    yield from listed(again, tell)


def _broken_frames(offsets: Array, content: Content, path: Path) -> Iterator[Problem]:
    """Records that don't hold a whole number of frames."""
    nbytes = np.diff(offsets)

    def tell(sample: int) -> Problem:
        text = (
            f"{path}, bytes: sample {sample} has {nbytes[sample]} bytes, which are not frames of "
            f"{content.sample_nbytes}; pack the data again"
        )
        return Problem(text=text, file=str(path), dataset="bytes", index=sample)

    yield from listed(np.flatnonzero(nbytes % content.sample_nbytes), tell)
