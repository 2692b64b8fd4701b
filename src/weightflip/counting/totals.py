"""What was counted altogether: since tracking began, since the last record, and in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightflip.counting import checkpoint
from weightflip.counting.columns import Columns
from weightflip.counting.course import Course
from weightflip.counting.layer import Layer
from weightflip.counting.ledger import COLUMNS
from weightflip.counting.schedule import Progress, Schedule
from weightflip.counting.shards import Shards
from weightflip.counting.shards import Totals as Numbers
from weightflip.counting.silent import SilentWrites
from weightflip.counting.table import LayerTable
from weightflip.records import FlipRecord, LayerRecord


class Totals:
    """History and window of all layers.

    Args:
        columns: What the numbers mean.
        layers: Where they are counted.
        schedule: The steps.
        silent: What wants to come along with a transfer from a device.
    """

    def __init__(self, columns: Columns, layers: LayerTable, schedule: Schedule, silent: SilentWrites) -> None:
        self._columns, self._layers, self._schedule, self._silent = columns, layers, schedule, silent
        # At the end of the last window, with the layer's restarts of then. Replaced as a whole.
        self._window_base: dict[str, tuple[int, list[float]]] = {}
        self.course = Course()

    def rows(self) -> Numbers:
        """Steps, and what this process has in the rows of all layers. One transfer from each device."""
        skipped = self._schedule.progress.skipped
        pending = self._silent.pending
        rows, values = self._layers.rows(pending if skipped is None else [*pending, skipped])
        self._silent.answered(values[: len(pending)])
        return self._schedule.steps - sum(values[len(pending) :]), rows

    def read(self, shards: Shards) -> Numbers:
        """Steps, and the totals of all layers: one transfer from each device, or none in a sharded run."""
        known = shards.totals(self._schedule.steps)
        if known is not None:
            return known
        steps, rows = self.rows()
        add, local = self._columns.add, self._layers.local
        return steps, {name: add(layer.settled, local(layer, rows[name])) for name, layer in self._layers.items()}

    def close_window(self, shards: Shards) -> FlipRecord:
        """A record of the window since the last one, which ends here."""
        steps, totals = self.read(shards)
        layers = []
        for name, total in totals.items():
            base = self._base_of(name)
            window = self._columns.counts([now - then for now, then in zip(total, base, strict=True)])
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
        self.course.add(steps, layers)
        return FlipRecord(steps, tuple(layers))

    def _base_of(self, name: str) -> list[float]:
        restarts, base = self._window_base.get(name, (None, []))
        return base if restarts == self._layers[name].restarts else self._columns.zeros()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, shards: Shards) -> dict[str, Any]:
        """As :meth:`WeightFlipTracker.state_dict`."""
        steps, totals = self.read(shards)
        layers, ratios = [], []
        for name, total in totals.items():
            layer, base = self._layers[name], self._base_of(name)
            layers.append([name, layer.weights, layer.quantizer, total[:COLUMNS], base[:COLUMNS]])
            now, then = self._columns.counts(total).ratios, self._columns.counts(base).ratios
            ratios += [[name, of, *now[of], *then[of]] for of in now]
        weights = {
            name: kept
            for name, layer in self._layers.items()
            if name not in shards and (kept := layer.metric_tensors())
        }
        return {"version": checkpoint.VERSION, "steps": steps, "layers": layers, "ratios": ratios, "weights": weights}

    def load(self, steps: int, layers: Sequence[Layer], window_base: Mapping[str, list[float]]) -> None:
        """Go on from here, where nothing has been counted yet.

        Args:
            steps: How many there were.
            layers: With what is settled of each.
            window_base: Of each, what was counted up to the last record.
        """
        for layer in layers:
            self._layers.put(layer)
        self._window_base = {name: (0, base) for name, base in window_base.items()}
        self._schedule.progress = Progress(steps)


def parse(
    state_dict: Any, columns: Columns, asked: set[str]
) -> tuple[int, list[Layer], dict[str, list[float]], set[str]]:
    """What :meth:`Totals.state_dict` gave.

    Args:
        state_dict: Anything: a checkpoint may be of another program, or damaged.
        columns: Of the run that goes on.
        asked: The metric groups of the run that goes on.

    Returns:
        Steps, layers, what was counted up to the last record, and the groups that kept something and are not asked for.

    Raises:
        TypeError: Not a dictionary.
        ValueError: Not a tracker's state, a damaged one, or one of a later version.
    """
    steps, saved = checkpoint.parse(state_dict)
    layers: list[Layer] = []
    window_base: dict[str, list[float]] = {}
    unasked: set[str] = set()
    more = columns.zeros()[COLUMNS:]
    for name, of in saved.items():
        layer = Layer(name, of.weights, of.quantizer, [*of.total, *more], columns.zeros())
        base = window_base[name] = [*of.base, *more]
        for ratio, numbers in of.ratios.items():
            at = columns.ratio(ratio)
            if at is not None:
                layer.settled[at], base[at] = numbers[:2], numbers[2:]
        layer.saved = {group: tensors for group, tensors in of.tensors.items() if group in asked}
        unasked.update(of.tensors.keys() - asked)
        layers.append(layer)
    return steps, layers, window_base, unasked
