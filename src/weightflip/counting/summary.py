"""The totals as a plain-text table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from weightflip.overview import MANY_LAYERS, blocks_of, outliers
from weightflip.records import Counts, Quotient, printable, split_variant
from weightflip.texts import percent


class Row(NamedTuple):
    """One layer, or the sum of several."""

    name: str
    quantizer: str
    weights: int
    counts: Counts

    @property
    def cells(self) -> tuple[str, ...]:
        counts, weights = self.counts, self.weights
        per_weight = f"{counts.flips / weights:.2f}" if weights else "-"
        stall_ratio = f"{counts.stall_ratio:.1%}" if counts.updates else "-"
        updated = percent(counts.updated_fraction)
        names = printable(self.name), printable(self.quantizer)
        return *names, f"{weights:,}", f"{counts.flips:,}", per_weight, stall_ratio, updated


class Summary(NamedTuple):
    """The part of the totals to show.

    Attributes:
        caption: The first line.
        tables: For each table, the header of its first column, and its rows.
        ending: The last line; may be empty.
    """

    caption: str
    tables: list[tuple[str, list[Row]]]
    ending: str = ""


HEAD = ("quantizer", "weights", "flips", "flips/weight", "stall ratio", "updated")
"""The headers of the columns after the first."""


def summarize(steps: int, layers: Iterable[tuple[str, str, int, Counts]]) -> Summary:
    """Choose what to show: up to 30 layers one by one; of more, the model blocks and the layers that stand out.

    Args:
        steps: The number of steps so far.
        layers: For each layer, its name, quantizer, number of weights, and totals.
    """
    rows = [Row(*layer) for layer in layers]
    # One sum per quantizer, if weights are tracked with several.
    sums = [_sum_rows("all", of, "") for of in _by_quantizer(rows).values()]
    plain = [row._replace(name=split_variant(row.name)[0]) for row in rows]
    names = list(dict.fromkeys(row.name for row in plain))
    if len(names) <= MANY_LAYERS:
        return Summary(f"after step {steps}", [("layer", [*plain, *sums])])
    blocks = [
        _sum_rows(block, of, of[0].quantizer if len({row.quantizer for row in of}) == 1 else "several")
        for block, members in blocks_of(names).items()
        for of in _by_quantizer([row for row in rows if split_variant(row.name)[0] in set(members)]).values()
    ]
    tables = [("block" if blocks else "layers", [*blocks, *sums])]
    if odd := _outliers(rows):
        tables.append(("layers that stand out", odd))
    ending = "each layer: get_flip_rates(), get_stall_ratios()"
    return Summary(f"after step {steps}, {len(names)} layers", tables, ending)


def as_text(steps: int, layers: Iterable[tuple[str, str, int, Counts]], note: str = "") -> str:
    """Format the totals since tracking began, per layer and for all layers together.

    More than 30 layers are shown by model block, followed by those whose flip rate stands out.

    Args:
        steps: The number of steps so far.
        layers: For each layer, its name, quantizer, number of weights, and totals.
        note: Shown at the end.
    """
    caption, tables, ending = summarize(steps, layers)
    parts = ["\n".join(_table(what, rows)) for what, rows in tables]
    text = "\n\n".join(filter(None, [*parts, ending]))
    return "\n".join(filter(None, [caption, text, note]))


def _by_quantizer(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by the quantizer in their name, which is empty if the layer has only one."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(split_variant(row.name)[1], []).append(row)
    return found


def _sum_rows(name: str, rows: Sequence[Row], quantizer: str) -> Row:
    variant = split_variant(rows[0].name)[1]
    return Row(name, variant or quantizer, sum(row.weights for row in rows), sum((r.counts for r in rows), Counts()))


def _outliers(rows: Sequence[Row]) -> list[Row]:
    found = []
    for of in _by_quantizer(rows).values():
        by_name = {row.name: row for row in of}
        rates = {name: Quotient(row.counts.flips, row.counts.weight_steps) for name, row in by_name.items()}
        found += [by_name[name]._replace(name=split_variant(name)[0]) for name in outliers(rates)]
    return found


def _table(what: str, rows: Sequence[Row]) -> list[str]:
    cells = [
        (what, *HEAD),
        *(row.cells for row in rows),
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
