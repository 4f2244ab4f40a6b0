"""`dpnn data check`: all that is wrong with a folder of shards, listed; `docs/data.md` says what is looked for.

`folder.py` and `ids.py` look at what concerns a whole folder, `shard.py` at one shard; `probe.py` opens what HDF5 might
die of.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.check.folder import differences, histogram_problems, moment_problems, stray_files
from dpnn.data.check.ids import merged, repeated, shared
from dpnn.data.check.probe import Probe
from dpnn.data.check.report import Report
from dpnn.data.check.shard import ShardCheck
from dpnn.data.manifest import NAME, VERSION, Manifest, parts
from dpnn.data.problems import Problem
from dpnn.errors import DataError

Array = NDArray[Any]

__all__ = ["Probe", "Report", "check"]


def check(
    folder: str | Path,
    *,
    quick: bool = False,
    threads: int = 1,
    probe: Probe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check a folder of shards, or one that holds such folders as train/ and test/.

    `quick`: without the samples themselves. `threads`: shards checked at a time. `probe`: one that is kept, where many
    checks are made. `progress(done, total)` counts the shards of a folder. Ctrl-C ends the check at once; the report
    says so, and has what was found until then.
    """
    report = Report(str(folder), quick)
    began = time.monotonic()
    run = _Run(report, quick, threads, probe or Probe(), progress)
    try:
        run.check(parts(Path(folder)))
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        if probe is None:
            run.probe.close()
    report.seconds = time.monotonic() - began
    return report


class _Run:
    """One check."""

    def __init__(
        self, report: Report, quick: bool, threads: int, probe: Probe, progress: Callable[[int, int], None] | None
    ) -> None:
        self._report, self._quick, self._threads = report, quick, threads
        self.probe, self._progress = probe, progress

    def check(self, folders: list[Path]) -> None:
        """Check folders, then the first against the second."""
        known = []
        for folder in folders:
            self._report.folders += 1
            try:
                manifest, problems = Manifest.inspect(folder)
            except DataError as error:
                self._tell(Problem(text=str(error), file=str(folder / NAME)))
                self._tell(*stray_files(folder, None))
                continue
            self._tell(*problems, *stray_files(folder, manifest))
            if manifest.version != VERSION or manifest.content_contradictions():
                continue
            self._tell(*moment_problems(folder, manifest))
            ids = self._check_shards(folder, manifest)
            self._tell(*repeated(folder, manifest, ids))
            known.append((folder, manifest, ids))
        if len(known) == 2:
            (train, one, _), (test, other, _) = known
            self._tell(*differences(train, one, test, other), *shared(*known))

    def _tell(self, *problems: Problem) -> None:
        self._report.problems += problems

    def _check_shards(self, folder: Path, manifest: Manifest) -> Array:
        """Check all shards; the ids found in them, sorted. A name that leads out of the folder was told already."""
        stop = threading.Event()
        check = ShardCheck(folder, manifest, self._quick, self.probe, stop)
        counts = np.zeros((), np.int64)
        shards = [shard for shard in manifest.shards if shard.is_in_folder]
        all_counted = len(shards) == len(manifest.shards)
        ids: list[Array] = []
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                futures = deque(pool.submit(check, shard) for shard in shards)
                while futures:
                    checked = futures.popleft().result()
                    self._tell(*checked.problems)
                    self._report.shards += 1
                    self._report.nbytes += checked.nbytes
                    self._report.unlabelled += checked.unlabelled
                    if checked.ids is not None:
                        self._report.samples += len(checked.ids)
                        ids.append(checked.ids)
                    if checked.counts is None:
                        all_counted = False
                    else:
                        counts = counts + checked.counts
                    if self._progress is not None:
                        self._progress(len(shards) - len(futures), len(shards))
            except BaseException:
                stop.set()
                self.probe.close()
                raise
        if shards and all_counted:
            self._tell(*histogram_problems(folder, manifest, counts))
        return merged(ids)
