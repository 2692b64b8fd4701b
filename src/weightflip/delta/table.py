"""The numbers of a comparison as table rows for the terminal, the HTML page and the CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from os import PathLike

from weightflip.delta.compare import Diff, FormatDiff, TensorDiff
from weightflip.records import csv_cell


def percent(part: int, whole: int) -> str:
    """A fraction as a percentage, never rounded to 0 % or 100 %. Empty if ``whole`` is 0.

    Example:
        >>> [percent(part, 100_000) for part in (0, 1, 1234, 50_000, 99_999, 100_000)]
        ['0 %', '<0.01 %', '1.2 %', '50 %', '>99.99 %', '100 %']
    """
    if not whole:
        return ""
    number = 100 * part / whole
    distance = min(number, 100 - number)
    if part in (0, whole):
        return f"{number:.0f} %"
    if distance < 0.01:
        return "<0.01 %" if number < 50 else ">99.99 %"
    return f"{number:.{0 if distance >= 10 else 1 if distance >= 1 else 2}f} %"


def rank_tensors(diff: Diff) -> list[TensorDiff]:
    """Tensors that differ, the largest changed fraction first, then those that cannot be compared."""
    differing = [tensor for tensor in diff.tensors if tensor.changed != 0 or tensor.note]
    return sorted(differing, key=lambda tensor: -(tensor.changed_fraction or 0.0))


def heading(diff: Diff) -> list[tuple[str, bool]]:
    """Titles of the columns, and whether each is left-aligned."""
    columns = [("tensor", True), ("dtype", True), ("weights", False), ("changed", False), ("share", False)]
    for format in diff.formats:
        columns.append((format, False))
        if any(_scale_count(tensor, format) for tensor in diff.tensors):
            columns.append((f"{format} scales", False))
    if diff.delta_nbytes is not None:
        columns.append(("delta bytes", False))
    return [*columns, ("", True)]


def cells(diff: Diff, tensor: TensorDiff) -> list[str]:
    """The cells of one tensor, in the order of :func:`heading`."""
    diffs = {
        format: (tensor.format_diffs[format], tensor.weights)
        for format in diff.formats
        if format in tensor.format_diffs
    }
    form = tensor.new or tensor.old
    assert form is not None
    row = [tensor.name, form[0], f"{tensor.weights:,}"]
    row += ["", ""] if tensor.changed is None else [f"{tensor.changed:,}", percent(tensor.changed, tensor.weights)]
    return [*row, *_format_cells(diff, diffs, tensor.nbytes), tensor.note]


def total_cells(diff: Diff) -> list[str]:
    """The cells of the totals over all tensors."""
    row = ["all", "", f"{diff.weights:,}", f"{diff.changed:,}", percent(diff.changed, diff.weights)]
    nbytes = sum(tensor.nbytes or 0 for tensor in diff.tensors)
    return [*row, *_format_cells(diff, {format: diff.format_diff(format) for format in diff.formats}, nbytes), ""]


def summary(diff: Diff) -> list[str]:
    """The totals as sentences."""
    same = sum(tensor.changed == 0 for tensor in diff.comparable)
    lines = [
        f"{diff.changed:,} of {diff.weights:,} weights have different bits"
        + (f" ({percent(diff.changed, diff.weights)})." if diff.changed else "."),
        f"{same:,} of {len(diff.tensors):,} tensors are identical.",
    ]
    if diff.delta_nbytes is not None:
        share = f", {percent(diff.delta_nbytes, diff.new_nbytes)} of" if diff.delta_nbytes < diff.new_nbytes else " for"
        lines.append(f"The delta takes {diff.delta_nbytes:,} bytes{share} the {diff.new_nbytes:,} of all new tensors.")
    return lines


def write_csv(diff: Diff, path: str | PathLike[str]) -> None:
    """Write all tensors, including identical ones, one per row.

    Args:
        diff: The comparison.
        path: The file. An existing file is replaced.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([map(csv_cell, row) for row in _csv_rows(diff)])


def _csv_rows(diff: Diff) -> Iterator[list[object]]:
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
            *(cell for format in diff.formats for cell in tensor.format_diffs.get(format, ("", "", ""))),
            "" if tensor.nbytes is None else tensor.nbytes,
        ]


def _scale_count(tensor: TensorDiff, format: str) -> int:
    return tensor.format_diffs[format].scales if format in tensor.format_diffs else 0


def _format_cells(diff: Diff, diffs: dict[str, tuple[FormatDiff, int]], nbytes: int | None) -> list[str]:
    row = []
    for format in diff.formats:
        found, weights = diffs.get(format, (FormatDiff(0, 0, 0), 0))
        row.append(percent(found.changed, weights))
        if any(_scale_count(tensor, format) for tensor in diff.tensors):
            row.append(percent(found.scales_changed, found.scales))
    if diff.delta_nbytes is not None:
        row.append("" if nbytes is None else f"{nbytes:,}")
    return row
