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
    """Add both commands to the program."""
    compare = commands.add_parser(
        "diff",
        help="show what changed between two checkpoints, tensor by tensor",
        description="Compare the stored bits of two checkpoints, and optionally their codes in number formats. No "
        "model is needed. A checkpoint is a .safetensors file, a directory of .safetensors files with an index, or a "
        "file written by torch.save.",
    )
    compare.add_argument("old", metavar="OLD", help="the earlier checkpoint")
    compare.add_argument("new", metavar="NEW", help="the later checkpoint")
    compare.add_argument(
        "--quantizer",
        action="append",
        default=[],
        metavar="NAME",
        help="also compare in this format; can be repeated",
    )
    compare.add_argument("--csv", metavar="FILE", help="write the numbers of all tensors")
    compare.add_argument("--html", metavar="FILE", help="write an HTML page with all tensors that differ")
    compare.add_argument("--write", metavar="DELTA", help="write the delta from OLD to NEW, a .safetensors file")
    compare.add_argument("--force", action="store_true", help="replace an existing DELTA")
    make = commands.add_parser(
        "apply",
        help="create the new checkpoint from the old one and a delta",
        description="Create the checkpoint that was NEW for weightflip diff --write. If OLD does not have exactly the "
        "same weights, or if the delta is truncated or modified, the command fails and writes nothing.",
    )
    make.add_argument("old", metavar="OLD", help="the checkpoint that the delta starts from")
    make.add_argument("delta", metavar="DELTA", help="the file written by weightflip diff --write")
    make.add_argument("new", metavar="NEW", help="the file to write; for a sharded checkpoint, a new directory")
    make.add_argument("--force", action="store_true", help="replace an existing file, which may be OLD")


def run(args: argparse.Namespace) -> int:
    """Run one of the commands.

    Returns:
        Exit status: 0, 1 after an error, which is printed to standard error, or 130 after an interrupt.
    """
    try:
        (_diff if args.command == "diff" else _apply)(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader is gone, as in `weightflip diff ... | head`. Otherwise the interpreter fails to flush at exit.
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
    # Chunks of tensors already run in separate threads.
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
    """Check that a report can be written and does not overwrite an input or the delta."""
    if not path.parent.is_dir():
        raise DeltaError(f"the directory {path.parent} does not exist; create it first")
    if any(other is not None and os.path.abspath(other) == os.path.abspath(path) for other in others):
        raise DeltaError(f"{path} would overwrite OLD, NEW or DELTA; choose another name")


def _apply(args: argparse.Namespace) -> None:
    from weightflip.delta.apply import apply

    apply(args.old, args.delta, args.new, force=args.force)
    print(f"Wrote {printable(args.new)}")
