"""Records as a table for spreadsheets and data frames: one number a row."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable

from weightflip.records import FlipRecord, LayerRecord, RunInfo, csv_cell, split_variant
from weightflip.sinks.background import BackgroundSink
from weightflip.sinks.files import AppendedFile

_COLUMNS = ("step", "layer", "quantizer", "name", "value")
_HEADER = ",".join(_COLUMNS) + "\n"


class CSVSink(BackgroundSink):
    """Appends a row ``step,layer,quantizer,name,value`` for each number of each record; one header, at the top.

    ``layer`` is a parameter's name, ``model`` for the sum of all, ``group:<name>`` for a group of layers. ``quantizer``
    is empty for a sum of layers with different ones. ``name`` is that of the value, such as ``flip_rate``; what has no
    value, such as a stall ratio without updates, has no row. In names, what does not print is escaped, and one that a
    spreadsheet would take for a formula begins with an apostrophe; numbers are numbers.

    A resumed run appends to the same file; rows of steps after the checkpoint stand there twice, the later one counts.
    The last row of a run that was killed while it wrote is removed: its number may be cut off.

    Args:
        path: The file; its directory is made when the first record comes.

    Raises:
        OSError: The file cannot be written.
        ValueError: The file has other columns.
    """

    def __init__(self, path: str) -> None:
        self._file = AppendedFile(path)
        self._quantizers: dict[str, str] = {}
        if not self._file.is_empty:
            with self._file.path.open(encoding="utf-8", newline="") as file:
                header = file.readline()
            # The beginning of it: what a run that was killed at once may have left.
            if not _HEADER.startswith(header.replace("\r", "")):
                raise ValueError(
                    f"{str(path)!r} in sinks= begins with {header.strip()[:80]!r}, not with the columns of an earlier "
                    f"run, {','.join(_COLUMNS)!r}; choose another file"
                )

    @property
    def place(self) -> str:
        """Where it writes; no two sinks of a run have the same."""
        return self._file.place

    def start(self, info: RunInfo, first_step: int) -> None:
        self._quantizers.update({name: quantizer for name, (_, _, quantizer) in info.tracked.items()})
        if self._file.is_open:
            return
        if self._file.is_torn:
            os.truncate(self._file.path, self._file.whole_lines())
        self._file.open()
        if self._file.is_empty:
            self._file.append(_HEADER)

    def write(self, record: FlipRecord) -> None:
        rows: list[tuple[object, ...]] = []

        def add(layer: str, quantizer: str, summed: LayerRecord) -> None:
            values = dict(summed.news)
            if summed.nonfinite and summed.window.weight_steps:
                values["nonfinite_weights"] = summed.nonfinite
            rows.extend((record.step, layer, quantizer, name, value) for name, value in values.items())

        for seen_as, model in record.models.items():
            add("model", seen_as or self._common(layer.name for layer in record.layers), model)
        for layer in record.layers:
            add(split_variant(layer.name)[0], self._common([layer.name]), layer)
        for name, summed in record.group_sums.items():
            group, seen_as = split_variant(name)
            add(f"group:{group}", seen_as or self._common(record.groups[group]), summed)
        self._rows(rows)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _common(self, names: Iterable[str]) -> str:
        """The quantizer that all of these weights have; empty for different ones."""
        quantizers = {self._quantizers[name] for name in names if name in self._quantizers}
        return quantizers.pop() if len(quantizers) == 1 else ""

    def _rows(self, rows: Iterable[Iterable[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([csv_cell(value) for value in row] for row in rows)
        self._file.append(text.getvalue(), heading=_HEADER)
