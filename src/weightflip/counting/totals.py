"""Totals since tracking began, counts since the last record, and their checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightflip.counting import checkpoint
from weightflip.counting.columns import Columns
from weightflip.counting.history import History
from weightflip.counting.layer import Layer
from weightflip.counting.ledger import COLUMNS
from weightflip.counting.schedule import Progress, Schedule
from weightflip.counting.sharding import Sharding
from weightflip.counting.sharding import Totals as Numbers
from weightflip.counting.silent_writes import SilentWrites
from weightflip.counting.table import LayerTable
from weightflip.records import FlipRecord, LayerRecord


class Totals:
    """The totals and the current window of all layers.

    Args:
        columns: The columns of a row.
        layers: All layers, with their rows.
        schedule: The schedule of steps.
        silent_writes: Its pending values are read in the same transfer from a device.
    """

    def __init__(self, columns: Columns, layers: LayerTable, schedule: Schedule, silent_writes: SilentWrites) -> None:
        self._columns, self._layers, self._schedule, self._silent_writes = columns, layers, schedule, silent_writes
        # Restarts and totals of each layer at the end of the last window. Replaced as a whole.
        self._window_base: dict[str, tuple[int, list[float]]] = {}
        self.history = History()

    def rows(self) -> Numbers:
        """Return the number of steps and this process's rows of all layers. One transfer from each device."""
        skipped = self._schedule.progress.skipped
        pending = self._silent_writes.pending
        rows, values = self._layers.read_rows(pending if skipped is None else [*pending, skipped])
        self._silent_writes.receive(values[: len(pending)])
        return self._schedule.steps - sum(values[len(pending) :]), rows

    def read(self, sharding: Sharding) -> Numbers:
        """Return the number of steps and the totals of all layers.

        One transfer from each device; none in a run with sharded weights.
        """
        known = sharding.totals(self._schedule.steps)
        if known is not None:
            return known
        steps, rows = self.rows()
        add, local = self._columns.add, self._layers.local
        return steps, {
            name: add(layer.synchronized_counts, local(layer, rows[name])) for name, layer in self._layers.items()
        }

    def close_window(self, sharding: Sharding) -> FlipRecord:
        """End the current window and return its record."""
        steps, totals = self.read(sharding)
        layers = []
        for name, total in totals.items():
            base = self._base_of(name)
            window = self._columns.counts([now - before for now, before in zip(total, base, strict=True)])
            gauges, histograms = self._columns.gauges(total)
            layers.append(
                LayerRecord(
                    name,
                    self._layers[name].weights,
                    window,
                    self._columns.counts(total),
                    self._columns.nonfinite(total),
                    gauges,
                    histograms,
                )
            )
        self._window_base = {name: (self._layers[name].restarts, total) for name, total in totals.items()}
        self.history.add(steps, layers)
        return FlipRecord(steps, tuple(layers))

    def _base_of(self, name: str) -> list[float]:
        restarts, base = self._window_base.get(name, (None, []))
        return base if restarts == self._layers[name].restarts else self._columns.zeros()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, sharding: Sharding) -> dict[str, Any]:
        """As :meth:`WeightFlipTracker.state_dict`."""
        steps, totals = self.read(sharding)
        layers, ratios = [], []
        for name, total in totals.items():
            layer, base = self._layers[name], self._base_of(name)
            layers.append([name, layer.weights, layer.quantizer, total[:COLUMNS], base[:COLUMNS]])
            now, before = self._columns.counts(total).ratios, self._columns.counts(base).ratios
            ratios += [[name, ratio, *now[ratio], *before[ratio]] for ratio in now]
        weights = {
            name: kept
            for name, layer in self._layers.items()
            if name not in sharding and (kept := layer.metric_tensors())
        }
        return {"version": checkpoint.VERSION, "steps": steps, "layers": layers, "ratios": ratios, "weights": weights}

    def load(self, steps: int, layers: Sequence[Layer], window_base: Mapping[str, list[float]]) -> None:
        """Continue from saved totals. Nothing must have been counted yet.

        Args:
            steps: The number of steps so far.
            layers: The layers, with their synchronized_counts counts.
            window_base: For each layer, its totals at the last record.
        """
        for layer in layers:
            self._layers.put(layer)
        self._window_base = {name: (0, base) for name, base in window_base.items()}
        self._schedule.progress = Progress(steps)


def parse(
    state_dict: Any, columns: Columns, requested: set[str]
) -> tuple[int, list[Layer], dict[str, list[float]], set[str]]:
    """Parse what :meth:`Totals.state_dict` returned.

    Args:
        state_dict: Any object: a checkpoint may come from another program, or be damaged.
        columns: The columns of the resumed run.
        requested: The metric groups of the resumed run.

    Returns:
        Steps, layers, their totals at the last record, and the metric groups in the checkpoint that were not requested.

    Raises:
        TypeError: Not a dictionary.
        ValueError: Not a tracker's state, a damaged one, or one of a later version.
    """
    steps, saved = checkpoint.parse(state_dict)
    layers: list[Layer] = []
    window_base: dict[str, list[float]] = {}
    unrequested: set[str] = set()
    zeros = columns.zeros()[COLUMNS:]
    for name, saved_layer in saved.items():
        layer = Layer(name, saved_layer.weights, saved_layer.quantizer, [*saved_layer.total, *zeros], columns.zeros())
        base = window_base[name] = [*saved_layer.base, *zeros]
        for ratio, numbers in saved_layer.ratios.items():
            pair = columns.ratio(ratio)
            if pair is not None:
                layer.synchronized_counts[pair], base[pair] = numbers[:2], numbers[2:]
        layer.saved = {group: tensors for group, tensors in saved_layer.tensors.items() if group in requested}
        unrequested.update(saved_layer.tensors.keys() - requested)
        layers.append(layer)
    return steps, layers, window_base, unrequested
