"""Alerts that were given during the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.records import printable
from weightflip.report.findings.base import Finding, Severity
from weightflip.report.findings.words import named
from weightflip.report.run import Alert, Layer, Run


def find_alerts(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """One finding for each rule, however many layers it came true for."""
    alerts: dict[str, list[Alert]] = {}
    for alert in sorted(run.alerts):
        alerts.setdefault(alert.rule, []).append(alert)
    for group in alerts.values():
        names = tuple(dict.fromkeys(alert.layer for alert in group if alert.layer in run.layers))
        text = _of_one(group) if len({alert.layer for alert in group}) == 1 else _of_many(run, group, names)
        yield Finding(Severity.WARNING, "alert", text, (run.name,), names, group[0].step)


def _of_one(alerts: Sequence[Alert]) -> str:
    first, *later = alerts
    again = f" (and {len(later)} times more, last at step {later[-1].step:,})" if later else ""
    where = f" for {first.layer}" if first.layer else ""
    # As weightflip writes it, the message begins with the step and repeats the layer.
    message = first.message.removeprefix(f"step {first.step}: ").replace(f": {printable(first.layer)} (", " (")
    return f"Alert at step {first.step:,}{where}: {message or first.rule}{again}"


def _of_many(run: Run, alerts: Sequence[Alert], names: Sequence[str]) -> str:
    begin, end = alerts[0].step, alerts[-1].step
    when = f"Alert at step {begin:,}" if begin == end else f"Alerts from step {begin:,} to step {end:,}"
    unnamed = max(alert.layers if alert.layers > 1 or not alert.layer else 0 for alert in alerts)
    # The sum of all layers.
    whose = list(dict.fromkeys(alert.layer for alert in alerts if alert.layer and alert.layer not in run.layers))
    if names or unnamed:
        whose.append(named(names, len(run.layers), unnamed))
    return f"{when} for {' and '.join(whose)}: {alerts[0].rule}"
