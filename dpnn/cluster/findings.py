"""What a check of `dpnn doctor` found, and how it is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "attention", "wrong"]
"""What makes dpnn impossible is "wrong", what makes it slower or less safe is "attention"."""


@dataclass(frozen=True)
class Finding:
    """What a check found; `remedy` is empty where all is well."""

    what: str
    state: State
    text: str
    remedy: str = ""


def judged(what: str, state: State, text: str, remedy: str) -> Finding:
    """A finding with a remedy only where one is needed."""
    return Finding(what, state, text, remedy if state != "ok" else "")


def table(findings: Sequence[Finding]) -> str:
    """The findings as lines: state, what, text; the remedy beneath."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:9}  {finding.what:{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':9}  {'':{width}}  -> {finding.remedy}")
    counts = [sum(finding.state == state for finding in findings) for state in ("ok", "attention", "wrong")]
    lines.append("{} ok, {} to look at, {} wrong".format(*counts))
    return "\n".join(lines)
