"""What was packed, told to a person."""

from collections import Counter
from collections.abc import Sequence
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
        # What stands in brackets differs from sample to sample.
        reasons = Counter(sample.reason.split(" (")[0] for one in finished for sample in one.rejected)
        return cls(
            folder,
            manifest,
            (min(size.least for size in sizes), mean, max(size.most for size in sizes)) if sizes else None,
            dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
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
            shown = [f"{n:,} x {reason}" for reason, n in list(self.rejected.items())[:_MOST_REASONS]]
            if len(self.rejected) > len(shown):
                shown.append(f"{len(self.rejected) - len(shown)} more reasons")
            lines.append(
                f"{sum(self.rejected.values()):,} left out, named in {self.folder / REJECTED}: {'; '.join(shown)}"
            )
        return "\n  ".join(lines)


@dataclass(frozen=True)
class Summary:
    """What was packed, part by part; as text, some lines for each."""

    parts: tuple[Packed, ...]

    def __str__(self) -> str:
        return "\n".join(str(part) for part in self.parts)
