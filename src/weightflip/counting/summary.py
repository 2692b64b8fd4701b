"""The totals as a table in plain text."""

from __future__ import annotations

from collections.abc import Iterable

from weightflip.records import Counts, shown, split_variant


def as_text(steps: int, layers: Iterable[tuple[str, str, int, Counts]]) -> str:
    """What each layer, and all together, did since tracking began.

    Args:
        steps: How many there were.
        layers: Of each, its name, its quantizer, how many weights it has, and its totals.
    """
    rows: list[tuple[str, ...]] = [("layer", "quantizer", "weights", "flips", "flips/weight", "stall ratio", "updated")]
    sums: dict[str, tuple[int, Counts]] = {}
    for name, quantizer, weights, counts in layers:
        rows.append(_row(split_variant(name)[0], quantizer, weights, counts))
        # Of weights that are tracked with several quantizers, a sum for each.
        _, seen_as = split_variant(name)
        before, so_far = sums.get(seen_as, (0, Counts()))
        sums[seen_as] = before + weights, so_far + counts
    rows += [_row("all", seen_as, weights, counts) for seen_as, (weights, counts) in sums.items()]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([f"after step {steps}", *lines])


def _row(name: str, quantizer: str, weights: int, counts: Counts) -> tuple[str, ...]:
    per_weight = f"{counts.flips / weights:.2f}" if weights else "-"
    stall_ratio = f"{counts.stall_ratio:.1%}" if counts.updates else "-"
    updated = _percent(counts.updated_fraction) if counts.update_steps else "-"
    return shown(name), shown(quantizer), f"{weights:,}", f"{counts.flips:,}", per_weight, stall_ratio, updated


def _percent(share: float) -> str:
    """One weight of a large layer is not 0.0%."""
    return f"{100 * share:.1g}%" if 0 < share < 0.001 else f"{share:.1%}"
