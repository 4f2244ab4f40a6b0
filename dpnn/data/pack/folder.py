"""One folder of shards from one part of a source."""

import csv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dpnn.data.durable import replacing
from dpnn.data.labels import Lists, histogram
from dpnn.data.manifest import Content, Manifest
from dpnn.data.pack.journal import REJECTED, Finished, Journal, Sizes
from dpnn.data.pack.moments import Moments, merged
from dpnn.data.pack.source import Source, Split, plain
from dpnn.data.pack.stored import Form, Part, Rejected
from dpnn.data.writer import verify, write_shard
from dpnn.errors import DataError

Array = NDArray[Any]

_MOST_SAMPLES, _MOST_NBYTES, _LEAST_BLOCKS = 256, 4 << 20, 64
_TASK_NBYTES = 1 << 20
"""Records of about so many bytes are one task of a thread."""


def block_size(samples: int, sample_nbytes: float) -> int:
    """Samples of a block: a power of two up to 256, of up to 4 MiB, and so that there are 64 blocks to shuffle."""
    most = min(_MOST_SAMPLES, int(_MOST_NBYTES / sample_nbytes), samples // _LEAST_BLOCKS)
    return 1 << max(most, 1).bit_length() - 1


class Folder:
    """Which samples of a part lie in which shard of its folder: the same whoever writes them.

    `order`: the numbers of the part's samples, as they are laid into the shards. `shard_nbytes`: of a shard, about.
    """

    def __init__(self, path: Path, split: Split, source: Source, form: Form, shard_nbytes: float, order: Array) -> None:
        self.path, self._split, self._form, self._order = path, split, form, order
        self._class_names = tuple(map(plain, source.class_names))
        n = len(split.ids)
        self.content = Content(
            kind=form.kind,
            shape=form.shape,
            dtype=form.dtype,
            codec=form.codec,
            labels="multi" if isinstance(split.labels, Lists) else "single",
            num_classes=source.num_classes,
            block=block_size(n, form.nbytes),
        )
        # Shards are cut at blocks: where no sample is rejected, only the folder's last block may be short.
        n_blocks = -(-n // self.content.block)
        n_shards = min(max(round(n * form.nbytes / shard_nbytes), 1), n_blocks)
        self._cuts = np.minimum(np.arange(n_shards + 1) * n_blocks // n_shards * self.content.block, n)
        self.shards = [f"{path.name}-{i:05d}-of-{n_shards:05d}.h5" for i in range(n_shards)]

    @property
    def nbytes(self) -> float:
        """Of all shards, about."""
        return len(self._order) * self._form.nbytes

    def samples(self, shard: int) -> int:
        """Of a shard, with those that will be rejected."""
        return int(self._cuts[shard + 1] - self._cuts[shard])

    def kept(self, shard: int, journal: Journal) -> Finished | None:
        """What is known of a shard that was finished before and is still as it was written; None for any other."""
        name = self.shards[shard]
        finished = journal.read(name)
        if finished is None or finished.shard is None:
            return finished
        try:
            verify(self.path / name, self.content, finished.shard)
        except DataError:
            return None
        return finished

    def write(self, shard: int, pool: ThreadPoolExecutor, ahead: int, look: Callable[[Part], None]) -> Finished:
        """Write a shard, without the samples that are rejected. `look` is shown its samples as they come.

        `ahead`: how many tasks the pool is given before the first is waited for.
        """
        numbers = self._order[self._cuts[shard] : self._cuts[shard + 1]]
        kept: list[bool] = []
        moments: list[Moments] = []
        rejected: list[Rejected] = []
        lengths: list[int] = []

        def samples() -> Iterator[Any]:
            for part in self._parts(numbers, pool, ahead):
                look(part)
                kept.extend(part.kept)
                rejected.extend(part.rejected)
                if part.moments is not None:
                    moments[:] = [merged([*moments, part.moments])]
                    if self.content.kind == "encoded":
                        lengths.extend(map(len, part.samples))
                    yield part.samples

        stream = samples()
        first = next(stream, None)
        path = self.path / self.shards[shard]
        if first is None:
            path.unlink(missing_ok=True)  # nothing may lie there that the manifest doesn't name
            return Finished(None, None, None, tuple(rejected))
        labels, ids = self._split.labels[numbers], self._split.ids[numbers]
        written = write_shard(path, self.content, labels, ids, chain([first], stream), kept)
        sizes = Sizes(min(lengths), sum(lengths), max(lengths)) if lengths else None
        return Finished(written, moments[0], sizes, tuple(rejected))

    def manifest(self, finished: Sequence[Finished]) -> Manifest:
        """Of all shards, in their order; DataError where no sample is left."""
        rejected = _rejected(finished)
        if not any(one.shard for one in finished):
            name, reason = rejected[0].name, rejected[0].reason
            raise DataError(f"all {len(rejected)} samples for {self.path} are bad; the first is {name}: {reason}")
        kept = np.ones(len(self._order), bool)
        kept[[one.number for one in rejected]] = False
        moments = merged([one.moments for one in finished if one.moments is not None])
        return Manifest(
            **msgspec.structs.asdict(self.content),
            samples=int(kept.sum()),
            histogram=tuple(histogram(self._split.labels[np.flatnonzero(kept)], self.content.num_classes)),
            mean=moments.mean,
            std=moments.std,
            class_names=self._class_names,
            shards=tuple(one.shard for one in finished if one.shard is not None),
        )

    def write_rejected(self, finished: Sequence[Finished]) -> None:
        """A file that names the samples that are left out, and says why; none where all are kept."""
        if rejected := _rejected(finished):
            with (
                replacing(self.path / REJECTED) as temporary,
                open(temporary, "w", newline="", encoding="utf-8") as file,
            ):
                csv.writer(file).writerows([("name", "reason"), *((one.name, one.reason) for one in rejected)])

    def _parts(self, numbers: Array, pool: ThreadPoolExecutor, ahead: int) -> Iterator[Part]:
        """The samples as they are stored, in order."""
        task = self.content.block
        if self._form.threads:
            task = max(min(task, int(_TASK_NBYTES / self._form.nbytes)), 1)
        else:
            ahead = 0
        waiting: deque[Future[Part]] = deque()
        for lo in range(0, len(numbers), task):
            waiting.append(pool.submit(self._form.part, numbers[lo : lo + task]))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _rejected(finished: Sequence[Finished]) -> list[Rejected]:
    """All that are left out, in the order of the source."""
    return sorted((sample for one in finished for sample in one.rejected), key=lambda sample: sample.number)
