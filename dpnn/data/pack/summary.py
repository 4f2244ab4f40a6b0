"""What was packed, told to a person."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dpnn.data.manifest import Manifest
from dpnn.data.pack.journal import REJECTED, Finished

_MOST_REASONS = 5
_KINDS = {"": "", "image": "pictures", "frames": "frames of "}


@dataclass(frozen=True)
class Packed:
    """What one folder holds now."""

    folder: Path
    manifest: Manifest
    sizes: tuple[int, float, int] | None
    """Bytes of a sample, where they differ: the least, the mean, the most."""
    rejected: dict[str, int]
    """How many samples were left out, by reason; the most frequent first."""

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, finished: Sequence[Finished]) -> Self:
        """Of a folder with these shards."""
        sizes = [one.sizes for one in finished if one.sizes is not None]
        mean = sum(size.total for size in sizes) / manifest.samples
        return cls(
            folder,
            manifest,
            (min(size.least for size in sizes), mean, max(size.most for size in sizes)) if sizes else None,
            count_reasons(sample.reason for one in finished for sample in one.rejected),
        )

    def __str__(self) -> str:
        manifest, n = self.manifest, len(self.manifest.shards)
        nbytes = sum(shard.bytes for shard in manifest.shards)
        what = _KINDS[manifest.codec]
        if manifest.shape:
            what += f"{'x'.join(map(str, manifest.shape))} {manifest.dtype}"
        lines = [
            f"{self.folder}: {manifest.samples:,} samples of {what}, {manifest.num_classes} classes, "
            f"{nbytes / 1e6:,.1f} MB in {n} shard{'s' if n > 1 else ''}"
        ]
        if self.sizes:
            least, mean, most = self.sizes
            lines.append(f"a sample has {least:,} to {most:,} bytes, {mean:,.0f} on average")
        if self.rejected:
            lines.append(_told(self.rejected, self.folder))
        return "\n  ".join(lines)


@dataclass(frozen=True)
class Summary:
    """What was packed, part by part; as text, some lines for each."""

    folder: Path
    parts: tuple[Packed, ...]
    left_out: dict[str, int]
    """How much of the source belongs to no part, by reason: files, games."""

    def __str__(self) -> str:
        lines = [str(part) for part in self.parts]
        if self.left_out:
            lines.append(f"of the source, {_told(self.left_out, self.folder)}")
        return "\n".join(lines)


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How often each is given, the most frequent first; what stands in brackets differs from case to case."""
    counts = Counter(reason.split(" (")[0] for reason in reasons)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _told(reasons: dict[str, int], folder: Path) -> str:
    shown = [f"{n:,} x {reason}" for reason, n in list(reasons.items())[:_MOST_REASONS]]
    if len(reasons) > len(shown):
        shown.append(f"{len(reasons) - len(shown)} more reasons")
    return f"{sum(reasons.values()):,} left out, named in {folder / REJECTED}: {'; '.join(shown)}"
