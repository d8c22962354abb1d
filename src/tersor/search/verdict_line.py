"""What a search gained, in words. Does not import torch."""

from __future__ import annotations

from tersor.search.folder import Front


def verdict_lines(front: Front) -> list[str]:
    """The gain over the fastest free baseline, the limits that are exceeded, and advice."""
    best, original = front.point(front.best), front.point(front.original)
    split, after, before = ("test", best.test, original.test)
    if after is None or before is None:
        split, after, before = "validation", best.validation, original.validation
    metric = f"{front.metric} {after:.2f} %, {after - before:+.2f} points on the {split} images"
    smaller = f"{original.bytes / best.bytes:.1f} times smaller than the original"
    if best.free:
        first = f"{best.description}: {metric}, {smaller}. No faster network was found within the budget."
    else:
        faster = " and ".join(
            f"{ratio.value:.2f} times faster at batch {size}" for size, ratio in front.speedup.items()
        )
        gained = f"{faster} than the fastest free baseline, " if faster else ""
        first = f"{best.description}: {gained}{smaller}, {metric}."
    lines = [first]
    if not front.met:
        lines.append(f"This network does not meet the budget ({front.budget}): {front.shortfall}.")
    images = f"{front.validation_images} validation images"
    if best.name == original.name:
        lines.append(f"One standard error of the metric is {front.validation_error:.2f} points ({images}).")
    else:
        change = best.validation - original.validation
        lines.append(f"On the {images}: {change:+.2f} points, with a standard error of {best.drop_error:.2f}.")
    return [*lines, *front.advice]
