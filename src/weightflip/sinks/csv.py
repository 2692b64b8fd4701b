"""Records as a CSV table for spreadsheets and data frames, one number per row."""

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
    """Appends one row ``step,layer,quantizer,name,value`` per number, below a single header.

    ``layer`` is a parameter name, ``model`` for the sum over all layers, or ``group:<name>`` for a layer group.
    ``quantizer`` is empty for a sum over layers with different quantizers. ``name`` is the name of the number, such as
    ``flip_rate``. Undefined numbers, such as a stall ratio without updates, have no row. Non-printable characters in
    names are escaped, and a name that a spreadsheet would run as a formula gets a leading apostrophe.

    A resumed run appends to the same file. Rows of steps after the checkpoint then occur twice; the later ones are
    valid. If a run was killed while writing, its last row is removed, since the number may be cut off.

    Args:
        path: The file. Its directory is created at the first record.

    Raises:
        OSError: The file is not writable.
        ValueError: The file has different columns.
    """

    def __init__(self, path: str) -> None:
        self._file = AppendedFile(path)
        self._quantizers: dict[str, str] = {}
        if not self._file.is_empty:
            with self._file.path.open(encoding="utf-8", newline="") as file:
                header = file.readline()
            # A run that was killed early may have left only part of the header.
            if not _HEADER.startswith(header.replace("\r", "")):
                raise ValueError(
                    f"{str(path)!r} in sinks= must be a new file or begin with the columns {','.join(_COLUMNS)!r}, got "
                    f"{header.strip()[:80]!r}; choose another file"
                )

    @property
    def destination(self) -> str:
        """The resolved path of the file. No two sinks of a run may share it."""
        return self._file.destination

    def start(self, info: RunInfo, first_step: int) -> None:
        self._quantizers.update({name: quantizer for name, (_, _, quantizer) in info.tracked.items()})
        if self._file.is_open:
            return
        if self._file.has_partial_line:
            os.truncate(self._file.path, self._file.complete_lines_nbytes())
        self._file.open()
        if self._file.is_empty:
            self._file.append(_HEADER)

    def write(self, record: FlipRecord) -> None:
        rows: list[tuple[object, ...]] = []

        def add(layer: str, quantizer: str, summed: LayerRecord) -> None:
            values = dict(summed.new_values)
            if summed.nonfinite and summed.window.weight_steps:
                values["nonfinite_weights"] = summed.nonfinite
            rows.extend((record.step, layer, quantizer, name, value) for name, value in values.items())

        for quantizer, model in record.models.items():
            add("model", quantizer or self._common_quantizer(layer.name for layer in record.layers), model)
        for layer in record.layers:
            add(split_variant(layer.name)[0], self._common_quantizer([layer.name]), layer)
        for name, summed in record.group_sums.items():
            group, quantizer = split_variant(name)
            add(f"group:{group}", quantizer or self._common_quantizer(record.groups[group]), summed)
        self._append_rows(rows)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _common_quantizer(self, names: Iterable[str]) -> str:
        """The quantizer shared by all of these weights; empty if they differ."""
        quantizers = {self._quantizers[name] for name in names if name in self._quantizers}
        return quantizers.pop() if len(quantizers) == 1 else ""

    def _append_rows(self, rows: Iterable[Iterable[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([csv_cell(value) for value in row] for row in rows)
        self._file.append(text.getvalue(), heading=_HEADER)
