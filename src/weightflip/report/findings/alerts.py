"""Alerts that fired during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightflip.records import printable
from weightflip.report.findings.base import Finding, Severity
from weightflip.report.findings.phrases import list_layers
from weightflip.report.run import Alert, Layer, Run


def find_alerts(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield one finding per rule, for any number of layers."""
    alerts: dict[str, list[Alert]] = {}
    for alert in sorted(run.alerts):
        alerts.setdefault(alert.rule, []).append(alert)
    for group in alerts.values():
        names = tuple(dict.fromkeys(alert.layer for alert in group if alert.layer in run.layers))
        is_one_layer = len({alert.layer for alert in group}) == 1
        text = _describe_one_layer(group) if is_one_layer else _describe_many_layers(run, group, names)
        yield Finding(Severity.WARNING, "alert", text, (run.name,), names, group[0].step)


def _describe_one_layer(alerts: Sequence[Alert]) -> str:
    first, *later = alerts
    again = f" (and {len(later)} more time{'s' * (len(later) > 1)}, last at step {later[-1].step:,})" if later else ""
    where = f" for {first.layer}" if first.layer else ""
    # Default messages begin with the step and repeat the layer.
    message = first.message.removeprefix(f"step {first.step}: ").replace(f": {printable(first.layer)} (", " (")
    return f"Alert at step {first.step:,}{where}: {message or first.rule}{again}"


def _describe_many_layers(run: Run, alerts: Sequence[Alert], names: Sequence[str]) -> str:
    begin, end = alerts[0].step, alerts[-1].step
    when = f"Alert at step {begin:,}" if begin == end else f"Alerts from step {begin:,} to step {end:,}"
    unnamed = max(alert.layers if alert.layers > 1 or not alert.layer else 0 for alert in alerts)
    # Names that are not layers, such as the model.
    whose = list(dict.fromkeys(alert.layer for alert in alerts if alert.layer and alert.layer not in run.layers))
    if names or unnamed:
        whose.append(list_layers(names, len(run.layers), unnamed))
    return f"{when} for {' and '.join(whose)}: {alerts[0].rule}"
