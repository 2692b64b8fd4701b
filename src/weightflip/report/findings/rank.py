"""Weight matrices that lose rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import POINTS, Finding, Severity
from weightflip.report.findings.phrases import list_layers
from weightflip.report.run import Layer, Run

_RANK_LEFT = 0.5


def find_lost_rank(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding if the effective rank has fallen to less than half."""
    hit: dict[str, tuple[float, float, int]] = {}
    for layer in layers:
        rank = layer.get("effective_rank")
        if len(rank) >= POINTS and rank.values[-1] < _RANK_LEFT * rank.values[0]:
            hit[layer.name] = float(rank.values[0]), float(rank.values[-1]), int(rank.steps[0])
    if hit:
        name, (first, last, step) = min(hit.items(), key=lambda item: item[1][1] / item[1][0])
        text = (
            f"The effective rank of {list_layers(list(hit), len(run.layers))} fell to less than half"
            + (f", most in {name}" if len(hit) > 1 else "")
            + f": from {first:.1f} at step {step:,} to {last:.1f}. Its weights have lost directions. Some loss is "
            "normal in training; a low-precision format can add to it"
        )
        yield Finding(Severity.NOTE, "rank", text, (run.name,), tuple(hit))
