"""The command line: ``weightflip report RUN_DIR [RUN_DIR ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from weightflip.delta.cli import COMMANDS, add_commands, run
from weightflip.records import printable
from weightflip.report.findings import find
from weightflip.report.follow import follow
from weightflip.report.live import progress_bar, watch
from weightflip.report.read import read_runs
from weightflip.report.run import ReportError
from weightflip.report.table import write_csv
from weightflip.report.terminal import make_console, print_report
from weightflip.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command-line program ``weightflip``.

    Args:
        argv: Command-line arguments; None for those of the process.

    Returns:
        Exit status: 0, or 1 after an error, which is printed to standard error.
    """
    parser = argparse.ArgumentParser(
        prog="weightflip", description="Show how quantized weights move while a network trains."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="report on the event files or JSONL files of trainings, layer by layer",
        description="Read event files or JSONL files, during or after training, and report what stands out: on the "
        "terminal, as an HTML page, or as a table for other programs. Several runs are compared.",
    )
    report.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", help="directory of a run, directory that contains runs, or .jsonl file"
    )
    report.add_argument("--html", metavar="FILE", help="write a self-contained HTML page with plots")
    report.add_argument("--csv", metavar="FILE", help="write all numbers: run, step, layer, quantizer, value, number")
    report.add_argument(
        "--follow", action="store_true", help="update the report when a training adds points, until Ctrl+C"
    )
    add_commands(commands)
    args = parser.parse_args(argv)
    if args.command in COMMANDS:
        return run(args)
    if args.follow and (args.html or args.csv):
        parser.error("--follow is for the terminal only; use --html and --csv without it")
    try:
        if args.follow:
            watch(follow(args.runs), make_console())
        else:
            _write_report(args.runs, args.html, args.csv)
    except ReportError as error:
        print(f"weightflip: {printable(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader is gone, as in `weightflip report ... | head`. Otherwise the interpreter fails to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"weightflip: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _write_report(paths: Sequence[str], html: str | None, csv: str | None) -> None:
    try:
        console = make_console()
    except ReportError:
        # Reported after the HTML page and CSV file are written, which do not need rich.
        console = None
    with progress_bar(paths, console) as progress:
        runs = read_runs(paths, progress=progress)
    findings = find(runs)
    if html is not None:
        from weightflip.report.html import write_html

        write_html(runs, findings, html)
    if csv is not None:
        write_csv(read_runs(paths, every_record=True) if any(run.notes for run in runs) else runs, csv)
    print_report(runs, findings)
    for file in (html, csv):
        if file is not None:
            print(f"Wrote {printable(file)}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
