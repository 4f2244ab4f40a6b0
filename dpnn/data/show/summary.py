"""What a manifest says, for people."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dpnn.data.manifest import Manifest

_MOST_BARS, _ENDS, _WIDTH = 40, 5, 40
_MOST_CHANNELS = 4


def summary(folder: Path, manifest: Manifest) -> str:
    """Some lines: what the samples are, how they are stored, and the number of samples of each class."""
    sizes = [shard.bytes for shard in manifest.shards]
    labels = f"one of {manifest.num_classes:,} classes each"
    if manifest.labels == "multi":
        labels = f"any of {manifest.num_classes:,} classes, {sum(manifest.histogram) / manifest.samples:.2f} a sample"
    several = f", of {min(sizes) / 1e6:,.1f} to {max(sizes) / 1e6:,.1f} MB" if len(sizes) > 1 else ""
    facts = {
        "samples": f"{manifest.samples:,}, {described(manifest)}",
        "labels": labels,
        "shards": f"{len(sizes):,}, {sum(sizes) / 1e6:,.1f} MB together{several}",
        "blocks": f"of {manifest.block:,} samples: what is read and checked at a time",
        "mean": _numbers(manifest.mean),
        "std": _numbers(manifest.std),
        "digest": manifest.digest,
    }
    return "\n".join([str(folder), *(f"  {name:<8} {text}" for name, text in facts.items()), *_bars(manifest)])


def described(manifest: Manifest) -> str:
    """The kind of samples."""
    shape = "x".join(map(str, manifest.shape))
    if manifest.codec == "image":
        return "pictures in files' own formats"
    if manifest.codec == "frames":
        return f"frames of {shape} uint8, any number a sample"
    return f"{shape} {manifest.dtype}"


def class_name(manifest: Manifest, k: int) -> str:
    """Its name where it has one, and else its number."""
    return manifest.class_names[k] if manifest.class_names else str(k)


def _numbers(values: Sequence[float]) -> str:
    if len(values) <= _MOST_CHANNELS:
        return ", ".join(f"{value:.4g}" for value in values)
    return f"{len(values):,} numbers from {min(values):.4g} to {max(values):.4g}"


def _bars(manifest: Manifest) -> Iterator[str]:
    """A line for each class, or, of many classes, for those with most and fewest samples."""
    counts = np.array(manifest.histogram)
    falling = np.argsort(-counts, kind="stable").tolist()
    chosen: list[int | None] = list(range(len(counts)))
    if len(counts) > _MOST_BARS:
        chosen = [*falling[:_ENDS], None, *falling[-_ENDS:]]
        yield (
            f"  classes  of {counts.min():,} (least), {int(np.median(counts)):,} (median) and {counts.max():,} (most) "
            f"samples; {np.count_nonzero(counts == 0):,} without any"
        )
    else:
        yield "  classes"
    width = max(len(class_name(manifest, k)[:_WIDTH]) for k in chosen if k is not None)
    digits = len(f"{counts.max():,}")
    for k in chosen:
        if k is None:
            yield f"    {'...':<{width}}"
        else:
            bar = "█" * round(_WIDTH * counts[k] / max(counts.max(), 1))
            yield f"    {class_name(manifest, k)[:_WIDTH]:<{width}} {counts[k]:>{digits},} {bar}".rstrip()
