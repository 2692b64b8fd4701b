"""The commands ``weightflip diff`` and ``weightflip apply``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from weightflip.delta.errors import DeltaError
from weightflip.records import printable

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

COMMANDS = ("diff", "apply")


def add_commands(commands: Commands) -> None:
    """Add the two to the program's commands."""
    compare = commands.add_parser(
        "diff",
        help="what changed between two checkpoints, tensor by tensor",
        description="Compare two checkpoints in their stored bits, and as number formats show them. No model is "
        "needed. A checkpoint is a .safetensors file, a directory of them with an index, or a file of torch.save.",
    )
    compare.add_argument("old", metavar="OLD", help="the earlier checkpoint")
    compare.add_argument("new", metavar="NEW", help="the later checkpoint")
    compare.add_argument(
        "--quantizer", action="append", default=[], metavar="NAME", help="compare in this format, too; several times"
    )
    compare.add_argument("--csv", metavar="FILE", help="write the numbers of every tensor")
    compare.add_argument("--html", metavar="FILE", help="write a page with every tensor that differs")
    compare.add_argument("--write", metavar="DELTA", help="write what makes NEW from OLD, a .safetensors file")
    compare.add_argument("--force", action="store_true", help="replace a DELTA that is there")
    make = commands.add_parser(
        "apply",
        help="make the new checkpoint from the old one and a delta",
        description="Make the checkpoint that weightflip diff --write saw as NEW. Anything but the exact old weights, "
        "and a delta that is cut short or altered, is refused, and nothing is written then.",
    )
    make.add_argument("old", metavar="OLD", help="the checkpoint that the delta starts from")
    make.add_argument("delta", metavar="DELTA", help="what weightflip diff --write wrote")
    make.add_argument("new", metavar="NEW", help="the file to write; for shards a new directory")
    make.add_argument("--force", action="store_true", help="replace a file that is there, which may be OLD")


def run(args: argparse.Namespace) -> int:
    """Run one of them.

    Returns:
        0; 1 where it could not be done, and the reason is on standard error; 130 where it was interrupted.
    """
    try:
        (_diff if args.command == "diff" else _apply)(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # `weightflip diff ... | head`: nobody reads on. The interpreter would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DeltaError, OSError) as error:
        print(f"weightflip: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("weightflip: interrupted", file=sys.stderr)
        return 130
    return 0


def _diff(args: argparse.Namespace) -> None:
    import torch

    from weightflip.delta.diff import diff
    from weightflip.delta.show import check_terminal, print_diff, write_html
    from weightflip.delta.table import write_csv
    from weightflip.quantizers import resolve

    check_terminal()
    try:
        quantizers = [resolve(name) for name in args.quantizer]
    except ValueError as error:
        raise DeltaError(str(error)) from error
    for file in (args.html, args.csv):
        if file is not None:
            _check_report(Path(file), (args.old, args.new, args.write))
    threads = torch.get_num_threads()
    # Parts of tensors already run in threads of their own.
    torch.set_num_threads(1)
    try:
        found = diff(args.old, args.new, quantizers=quantizers, write=args.write, force=args.force)
    finally:
        torch.set_num_threads(threads)
    if args.html is not None:
        write_html(found, args.html)
    if args.csv is not None:
        write_csv(found, args.csv)
    print_diff(found)
    for file in (args.write, args.html, args.csv):
        if file is not None:
            print(f"Wrote {printable(file)}")


def _check_report(path: Path, others: tuple[str | None, ...]) -> None:
    """See that a report can be written, before anything is, and takes the place of nothing that this run is about."""
    if not path.parent.is_dir():
        raise DeltaError(f"the directory {path.parent} is not there; make it first")
    if any(other is not None and os.path.abspath(other) == os.path.abspath(path) for other in others):
        raise DeltaError(f"{path} would take the place of OLD, NEW or DELTA; choose another name")


def _apply(args: argparse.Namespace) -> None:
    from weightflip.delta.apply import apply

    apply(args.old, args.delta, args.new, force=args.force)
    print(f"Wrote {printable(args.new)}")
