"""The run folder: where one run keeps everything that it writes."""

import itertools
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpnn.comm import launch, postmortem
from dpnn.data.durable import replacing
from dpnn.errors import JobError
from dpnn.observe.metrics import Metrics, last_exit, unwritable


class RunFolder:
    """`job.toml` (as resolved), `metrics.jsonl`, `choices.json`, `checkpoints/`.

    Of a run that failed also `failure.txt`, and `post-mortem.txt` where ranks waited for others in vain.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job = path / "job.toml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.choices = path / "choices.json"
        self.failure = path / "failure.txt"

    def read_choices(self) -> dict[str, str]:
        """What an earlier part of the run chose by timing; a resumed run computes alike only with the same choices."""
        try:
            choices = json.loads(self.choices.read_text())
        except (OSError, ValueError):
            return {}
        return choices if isinstance(choices, dict) else {}

    def write_choices(self, choices: dict[str, str]) -> None:
        """Keep them. DataError where the disk doesn't take them."""
        if not choices:
            return
        try:
            with replacing(self.choices) as temporary:
                temporary.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise unwritable(self.choices, error) from error

    @classmethod
    def create(cls, wanted: str, name: str) -> "RunFolder":
        """A new folder: `wanted`, or the next free `runs/NAME-001`. JobError where it holds a run already."""
        if wanted:
            folder = cls(Path(wanted))
            if folder.job.exists():
                raise JobError(
                    f"output.dir = {wanted!r} holds a run already; go on with --resume, or name another folder"
                )
        else:
            folder = cls._next(name)
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JobError(f"the run folder {folder.path} can't be made ({error.strerror}); set output.dir") from error
        return folder

    @classmethod
    def _next(cls, name: str) -> "RunFolder":
        """The next free number, made at once: two jobs that start together get two folders."""
        newest = [int(path.name.rpartition("-")[2]) for path in cls._numbered(name)[-1:]]
        for number in itertools.count(max(newest, default=0) + 1):
            folder = cls(Path("runs") / f"{name}-{number:03d}")
            try:
                folder.path.mkdir(parents=True)
                break
            except FileExistsError:
                continue
            except OSError:
                break
        return folder

    @classmethod
    def existing(cls, wanted: str, name: str = "") -> "RunFolder":
        """The folder of an earlier run: `wanted`, or the newest `runs/NAME-...`. JobError where there is none."""
        if wanted:
            folder = cls(Path(wanted))
        else:
            found = cls._numbered(name)
            if not found:
                raise JobError(f"there is no run runs/{name}-... to go on with; start one without --resume")
            folder = cls(found[-1])
        if not folder.job.exists():
            raise JobError(
                f"{folder.path} is not a run folder (no job.toml in it); name the folder that `train` printed"
            )
        return folder

    @staticmethod
    def _numbered(name: str) -> list[Path]:
        numbered = re.compile(re.escape(name) + r"-\d+")
        found = [path for path in Path("runs").glob("*") if numbered.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def write_job(self, text: str) -> None:
        """Keep the job as it runs from now on."""
        try:
            with replacing(self.job) as temporary:
                temporary.write_text(text)
        except OSError as error:
            raise JobError(
                f"{self.job} can't be written ({error.strerror}); make room there, or set output.dir"
            ) from error

    def tell_launcher(self) -> None:
        """Tell `dpnn launch`, if that started this job, that it runs here from now on. On rank 0, before any can fail.

        With the folder goes the length of its metrics: what stands there already is of earlier parts of the run.
        """
        asked = os.environ.get(launch.RUN)
        if asked:
            size = self.metrics.stat().st_size if self.metrics.exists() else 0
            with suppress(OSError), replacing(Path(asked)) as temporary:  # which may be on another node
                temporary.write_bytes(os.fsencode(f"{size} {self.path.absolute()}"))

    @classmethod
    def told(cls, text: bytes) -> tuple["RunFolder", int | None]:
        """The folder that `tell_launcher` told of, and the exit code that the job ended with there.

        That is the one in the last `end` line; None where the job left none.
        """
        size, _, path = os.fsdecode(text).partition(" ")
        folder = cls(Path(path))
        return folder, last_exit(folder.metrics, int(size))

    def forget_failure(self) -> None:
        """The run goes on."""
        self.failure.unlink(missing_ok=True)
        postmortem.forget(self.path)

    def event(self, event: str, **values: Any) -> None:
        """A line of the metrics, by any rank: for what is rare. DataError where it can't be written."""
        metrics = Metrics(self.metrics)
        metrics.write("event", event=event, **values)
        metrics.close()

    def claim(self, message: str, code: int) -> bool:
        """Whether this process is the first to report a failure of the run: that one, of all ranks, tells it.

        Kept in `failure.txt`, and as the `end` line of the metrics. OSError, DataError where the disk takes neither.
        """
        try:
            file = os.open(self.failure, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "w") as text:
            text.write(message + "\n")
        metrics = Metrics(self.metrics)
        metrics.write("end", exit=code, error=message)
        metrics.close()
        return True
