"""The numbers of a comparison as rows of a table: for the terminal, for a page, and as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from os import PathLike

from weightflip.delta.compare import Diff, Seen, TensorDiff
from weightflip.records import csv_cell


def percent(part: int, whole: int) -> str:
    """A share in percent, never rounded to 0 or 100; empty where there is nothing to share.

    Example:
        >>> [percent(part, 100_000) for part in (0, 1, 1234, 50_000, 99_999, 100_000)]
        ['0 %', '<0.01 %', '1.2 %', '50 %', '>99.99 %', '100 %']
    """
    if not whole:
        return ""
    number = 100 * part / whole
    room = min(number, 100 - number)
    if part in (0, whole):
        return f"{number:.0f} %"
    if room < 0.01:
        return "<0.01 %" if number < 50 else ">99.99 %"
    return f"{number:.{0 if room >= 10 else 1 if room >= 1 else 2}f} %"


def ranked(diff: Diff) -> list[TensorDiff]:
    """Tensors that differ, the largest changed share first, then those that cannot be compared."""
    differing = [tensor for tensor in diff.tensors if tensor.changed != 0 or tensor.note]
    return sorted(differing, key=lambda tensor: -(tensor.changed_fraction or 0.0))


def heading(diff: Diff) -> list[tuple[str, bool]]:
    """Titles of the columns, and whether each is flush left."""
    columns = [("tensor", True), ("dtype", True), ("weights", False), ("changed", False), ("share", False)]
    for format in diff.formats:
        columns.append((format, False))
        if any(_scales(tensor, format) for tensor in diff.tensors):
            columns.append((f"{format} scales", False))
    if diff.delta_nbytes is not None:
        columns.append(("delta bytes", False))
    return [*columns, ("", True)]


def cells(diff: Diff, tensor: TensorDiff) -> list[str]:
    """What stands in these columns of a tensor."""
    seen = {format: (tensor.seen[format], tensor.weights) for format in diff.formats if format in tensor.seen}
    form = tensor.new or tensor.old
    assert form is not None
    row = [tensor.name, form[0], f"{tensor.weights:,}"]
    row += ["", ""] if tensor.changed is None else [f"{tensor.changed:,}", percent(tensor.changed, tensor.weights)]
    return [*row, *_rest(diff, seen, tensor.nbytes), tensor.note]


def sums(diff: Diff) -> list[str]:
    """The same of all tensors together."""
    row = ["all", "", f"{diff.weights:,}", f"{diff.changed:,}", percent(diff.changed, diff.weights)]
    nbytes = sum(tensor.nbytes or 0 for tensor in diff.tensors)
    return [*row, *_rest(diff, {format: diff.seen(format) for format in diff.formats}, nbytes), ""]


def summary(diff: Diff) -> list[str]:
    """The sums as sentences."""
    same = sum(tensor.changed == 0 for tensor in diff.comparable)
    lines = [
        f"{diff.changed:,} of {diff.weights:,} weights have other bits"
        + (f" ({percent(diff.changed, diff.weights)})." if diff.changed else "."),
        f"{same:,} of {len(diff.tensors):,} tensors are the same.",
    ]
    if diff.delta_nbytes is not None:
        share = f", {percent(diff.delta_nbytes, diff.new_nbytes)} of" if diff.delta_nbytes < diff.new_nbytes else " for"
        lines.append(f"The delta takes {diff.delta_nbytes:,} bytes{share} the {diff.new_nbytes:,} of all new tensors.")
    return lines


def write_csv(diff: Diff, path: str | PathLike[str]) -> None:
    """All tensors, also those that are the same, one a row.

    Args:
        diff: What was found.
        path: The file; one that is there is replaced.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([map(csv_cell, row) for row in _rows(diff)])


def _rows(diff: Diff) -> Iterator[list[object]]:
    names = ["changed", "scales", "scales_changed"]
    yield [
        *("tensor", "old_dtype", "new_dtype", "old_shape", "new_shape", "weights", "changed", "same_as"),
        *(f"{format} {name}" for format in diff.formats for name in names),
        "delta_bytes",
    ]
    for tensor in diff.tensors:
        forms = [
            ("", "") if form is None else (form[0], "x".join(map(str, form[1]))) for form in (tensor.old, tensor.new)
        ]
        (old_dtype, old_shape), (new_dtype, new_shape) = forms
        yield [
            *(tensor.name, old_dtype, new_dtype, old_shape, new_shape, tensor.weights),
            *("" if value is None else value for value in (tensor.changed, tensor.same_as)),
            *(cell for format in diff.formats for cell in tensor.seen.get(format, ("", "", ""))),
            "" if tensor.nbytes is None else tensor.nbytes,
        ]


def _scales(tensor: TensorDiff, format: str) -> int:
    return tensor.seen[format].scales if format in tensor.seen else 0


def _rest(diff: Diff, seen: dict[str, tuple[Seen, int]], nbytes: int | None) -> list[str]:
    row = []
    for format in diff.formats:
        found, weights = seen.get(format, (Seen(0, 0, 0), 0))
        row.append(percent(found.changed, weights))
        if any(_scales(tensor, format) for tensor in diff.tensors):
            row.append(percent(found.scales_changed, found.scales))
    if diff.delta_nbytes is not None:
        row.append("" if nbytes is None else f"{nbytes:,}")
    return row
