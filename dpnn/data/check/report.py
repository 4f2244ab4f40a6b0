"""What a check found, and how it is printed."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from dpnn.data.problems import Problem

MOST_LINES = 1000
"""Of errors, and of warnings: more are counted only."""


@dataclass
class Report:
    """What was found, and how much was looked at."""

    folder: str
    quick: bool
    problems: list[Problem] = field(default_factory=list)
    folders: int = 0
    shards: int = 0
    samples: int = 0
    unlabelled: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def errors(self) -> int:
        """How many things make the data unusable."""
        return sum(problem.count for problem in self.problems if not problem.warning)

    @property
    def warnings(self) -> int:
        """How many things look odd."""
        return sum(problem.count for problem in self.problems if problem.warning)

    def __str__(self) -> str:
        """One line."""
        how = "interrupted after" if self.interrupted else "checked"
        what = "all but the samples of " if self.quick else ""
        unlabelled = f", {self.unlabelled:,} of them without a label" if self.unlabelled else ""
        return (
            f"{self.folder}: {how} {what}{self.folders} folder{'s' * (self.folders != 1)}, "
            f"{self.shards:,} shard{'s' * (self.shards != 1)}, {self.samples:,} samples{unlabelled}, "
            f"{self.nbytes / 1e9:,.3f} GB in {self.seconds:,.1f} s: "
            f"{self.errors:,} error{'s' * (self.errors != 1)}, {self.warnings:,} warning{'s' * (self.warnings != 1)}"
        )


def lines(report: Report, as_json: bool) -> Iterator[str]:
    """A line for each finding, errors first, and one for the whole. As JSON: all of them, an object a line."""
    for level, is_warning in (("error", False), ("warning", True)):
        found = [problem for problem in report.problems if problem.warning == is_warning]
        for problem in found[: None if as_json else MOST_LINES]:
            if as_json:
                said = msgspec.structs.asdict(problem)
                del said["warning"]
                yield msgspec.json.encode({"level": level, **said}).decode()
            else:
                yield f"{level}: {problem.text}"
        if len(found) > MOST_LINES and not as_json:
            more = sum(problem.count for problem in found[MOST_LINES:])
            yield f"{level}: {more:,} more are not listed (--json lists them)"
    if as_json:
        numbers = {name: value for name, value in vars(report).items() if name != "problems"}
        summary = {"level": "summary", **numbers, "errors": report.errors, "warnings": report.warnings}
        yield msgspec.json.encode(summary).decode()
    else:
        yield str(report)
