"""Interprets the numbers of runs: pure functions from runs to sentences.

A check yields a finding only if its sentence is literally true. What is normal in healthy training, such as stall
ratios near 1 for float32 weights tracked in 8 bits, is not a finding.

A new finding is a function in its own file, a line in ``CHECKS`` and a test.
"""

from __future__ import annotations

from collections.abc import Sequence

from weightflip.report.findings.alerts import find_alerts
from weightflip.report.findings.base import Check, Finding, Severity
from weightflip.report.findings.bursts import BURST_POINTS, find_bursts
from weightflip.report.findings.comparison import compare
from weightflip.report.findings.dead import find_dead
from weightflip.report.findings.formats import find_formats
from weightflip.report.findings.gradients import find_few_gradients
from weightflip.report.findings.lagging import find_lagging
from weightflip.report.findings.lost import find_lost_updates
from weightflip.report.findings.nonfinite import find_nonfinite
from weightflip.report.findings.oscillation import find_oscillating
from weightflip.report.findings.ranges import find_saturated, find_underflow, find_zeros
from weightflip.report.findings.rank import find_lost_rank
from weightflip.report.findings.resting import find_resting
from weightflip.report.findings.scale import find_scale_driven
from weightflip.report.findings.steps import find_small_steps
from weightflip.report.findings.stuck import find_stuck
from weightflip.report.findings.syncs import find_empty_deltas
from weightflip.report.run import Run

__all__ = ["CHECKS", "Check", "Finding", "Severity", "compare", "find", "find_in_run"]

# Findings of equal severity are sorted in this order.
CHECKS = (
    Check(find_alerts),
    Check(find_nonfinite, "non-finite weights"),
    Check(find_lost_updates),
    Check(find_small_steps),
    Check(find_dead, "layers without updates"),
    Check(find_few_gradients),
    Check(find_stuck, "layers that do not move"),
    Check(find_empty_deltas, "empty deltas", needs=("changed_fraction",)),
    Check(find_lagging),
    Check(find_bursts, "bursts of flips"),
    Check(find_oscillating, "oscillation", needs=("oscillation_ratio", "oscillating_fraction")),
    Check(find_resting, "resting weights", needs=("travel_ratio",)),
    Check(find_scale_driven, "moving scales", needs=("weight_driven_fraction",)),
    Check(find_zeros, "range", needs=("zero_fraction", "saturated_fraction", "underflow_fraction")),
    Check(find_underflow),
    Check(find_saturated),
    Check(find_lost_rank, "rank", needs=("effective_rank",)),
    Check(find_formats),
)


def find(runs: Sequence[Run]) -> list[Finding]:
    """Return all findings about some runs, worst first.

    Args:
        runs: Runs from :func:`weightflip.report.read.read_runs`. Several runs are also compared.

    Returns:
        At least one finding per run. If nothing stands out, it says so.
    """
    found = [finding for run in runs for finding in find_in_run(run)]
    found += compare(runs)
    return sorted(found, key=lambda finding: (-finding.severity, finding.rule != "comparison"))


def find_in_run(run: Run) -> list[Finding]:
    """Return all findings about one run."""
    # Other numbers of layers with non-finite weights mean nothing: their codes do not move or are all equal.
    healthy = [layer for layer in run.layers.values() if not layer.get("nonfinite_weights")]
    found = [finding for check in CHECKS for finding in check.find(run, healthy)]
    if not any(finding.severity for finding in found):
        found.append(_nothing_found(run))
    return found


def _nothing_found(run: Run) -> Finding:
    values = {value for layer in run.layers.values() for value in layer.values}
    checked = [check.looks_for for check in CHECKS if check.looks_for and check.can_check(values)]
    text = f"Nothing stands out up to step {run.end:,} (checked for: {', '.join(checked)})"
    if len(run.steps) < BURST_POINTS:
        text += f". {len(run.steps)} points are too few for a reliable conclusion"
    return Finding(Severity.INFO, "healthy", text, (run.name,))
