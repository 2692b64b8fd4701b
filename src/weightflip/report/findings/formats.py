"""Comparison of several formats in one training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.report.findings.base import Finding, Severity
from weightflip.report.findings.phrases import percent
from weightflip.report.run import Layer, Run


def find_formats(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a finding about the formats that lose the fewest and the most updates."""
    stalls = {name: model.get("stall_ratio") for name, model in run.models.items() if name}
    fractions = {name: series.summary for name, series in stalls.items() if series is not None}
    if len(fractions) > 1:
        low, high = min(fractions, key=fractions.__getitem__), max(fractions, key=fractions.__getitem__)
        text = (
            f"Among the {len(fractions)} formats tracked in this training, {low} has the fewest stalled updates "
            f"({percent(fractions[low])}) and {high} the most ({percent(fractions[high])})"
        )
        yield Finding(Severity.INFO, "formats", text, (run.name,))
