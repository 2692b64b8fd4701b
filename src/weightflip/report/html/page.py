"""The sections and the style of the page."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from weightflip.report.findings import Finding
from weightflip.report.html.curves import curves
from weightflip.report.html.figures import Figures
from weightflip.report.html.maps import format_matrix, heat_maps
from weightflip.report.html.markup import escape
from weightflip.report.html.tables import column_explanations, findings_list, layers_table, runs_table
from weightflip.report.run import ReportError, Run

_STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --accent: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 15px; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 17px; margin: 0 0 12px; } h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 0 0 10px; } .soft { color: var(--soft); } header { margin-bottom: 20px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px;
  margin-bottom: 18px; }
ul.findings { list-style: none; margin: 0; padding: 0; }
ul.findings li { display: flex; gap: 12px; padding: 8px 0; border-top: 1px solid var(--line); }
ul.findings li:first-child { border-top: 0; }
ul.findings span.text { overflow-wrap: anywhere; }
.tag { flex: none; width: 66px; height: 22px; text-align: center; font-size: 12px; font-weight: 600;
  line-height: 22px; border-radius: 4px; }
.serious { background: #fee2e2; color: #991b1b; } .warning { background: #fef3c7; color: #92400e; }
.note { background: #e0f2fe; color: #075985; } .info { background: #dcfce7; color: #166534; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; min-width: 60%; }
th { text-align: right; font-weight: 600; color: var(--soft); white-space: nowrap; }
th, td { padding: 4px 12px 4px 6px; border-bottom: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.left, td.left { text-align: left; }
td.name { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12px; }
td.bar { background: linear-gradient(to right, #dbeafe var(--share), transparent var(--share)); }
i.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
i.serious { background: #dc2626; } i.warning { background: #f59e0b; } i.note { background: #38bdf8; }
figure { margin: 0; } figure svg { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; margin: 2px 0 14px; }
dl { display: grid; grid-template-columns: max-content auto; gap: 2px 16px; margin: 0; font-size: 13px; }
dt { font-weight: 600; } dd { margin: 0; }
"""


def write_html(runs: Sequence[Run], findings: Sequence[Finding], path: str | PathLike[str]) -> None:
    """Write the page.

    Args:
        runs: At least one run.
        findings: Findings about these runs, worst first.
        path: The file.

    Raises:
        ReportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError(
            "plots need matplotlib: pip install 'weightflip[report]' (or pip install matplotlib)"
        ) from error
    style: Any = {
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9ca3af",
        "axes.labelcolor": "#374151",
        "xtick.color": "#4b5563",
        "ytick.color": "#4b5563",
        # A name may contain a dollar sign.
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        page = _page(runs, findings)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def _page(runs: Sequence[Run], findings: Sequence[Finding]) -> str:
    figures = Figures()
    title = ", ".join(run.name for run in runs)
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        f"<header><h1>weightflip report</h1><p class=soft>{count}: {escape(title)}</p></header>",
        f"<section><h2>What stands out</h2>{findings_list(runs, findings)}</section>",
        f"<section><h2>Runs</h2>{runs_table(runs)}</section>",
        f"<section><h2>All layers combined</h2>{curves(figures, runs)}</section>",
    ]
    matrices = "".join(format_matrix(figures, run) for run in runs if len(run.models) > 1)
    if matrices:
        parts.append(f"<section><h2>Formats compared</h2>{matrices}</section>")
    parts.append(f"<section><h2>Layers over time</h2>{heat_maps(figures, runs)}</section>")
    tables = "".join(layers_table(run, findings, with_title=len(runs) > 1) for run in runs)
    parts.append(f"<section><h2>Layers</h2>{tables}</section>")
    parts.append(f"<section><h2>What the columns mean</h2>{column_explanations(runs)}</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>weightflip report: {escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
