"""Reports on finished or running trainings: ``weightflip report RUN_DIR [RUN_DIR ...]``."""

from __future__ import annotations

from weightflip.report.findings import Finding, Severity, find
from weightflip.report.read import read_runs
from weightflip.report.run import Layer, ReportError, Run, Series

__all__ = ["Finding", "Layer", "ReportError", "Run", "Series", "Severity", "find", "read_runs"]
