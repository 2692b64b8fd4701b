"""All layers and their rows of counters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weightflip.counting.columns import Columns
from weightflip.counting.layer import Changes, Layer, TrackedWeight
from weightflip.counting.ledger import Ledger, Row
from weightflip.counting.notices import Notices
from weightflip.counting.schedule import Schedule
from weightflip.quantizers.adapt import quantizer_name
from weightflip.quantizers.protocol import Quantizer


class LayerTable(Mapping[str, Layer]):
    """Layers by name, their ledgers, and the layers that have failed.

    Args:
        columns: The columns of a row.
        schedule: Its progress says which totals the ledgers must have.
        notices: Receives warnings about layers that failed or are now another weight.

    Attributes:
        failed: Names that are no longer tracked, including weights that never became layers.
        changes: Counts the changes of all layers.
        has_new_failures: Whether a layer has failed since the reader of this flag last set it to False.
    """

    def __init__(self, columns: Columns, schedule: Schedule, notices: Notices) -> None:
        self._columns, self._schedule, self._notices = columns, schedule, notices
        self._layers: dict[str, Layer] = {}
        self.changes = Changes()
        self._ledgers: dict[torch.device, Ledger] = {}
        self._weights: list[TrackedWeight] = []
        self.failed: set[str] = set()
        self.has_new_failures = False

    def __getitem__(self, name: str) -> Layer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def by_name(self) -> dict[str, Layer]:
        """The layers as a plain dictionary, for frequent lookups."""
        return self._layers

    @property
    def weights(self) -> list[TrackedWeight]:
        """The weights passed to the last call of ``set_weights``."""
        return self._weights

    def put(self, layer: Layer) -> Layer:
        """Add a layer, or replace the one with its name."""
        layer.changes = self.changes
        self.changes.number += 1
        self._layers[layer.name] = layer
        return layer

    # ------------------------------------------------------------------ layers

    def set_weights(self, weights: list[TrackedWeight]) -> bool:
        """Set the weights of a step, and return whether they differ from those of the last one."""
        if weights == self._weights:
            return False
        self._weights = weights
        names = {tracked.name for tracked in weights}
        for name, layer in self._layers.items():
            if name not in names:
                # Frozen or removed: it may change in any way before it comes back.
                layer.drop_codes()
                layer.stamp = layer.tracked = None
        return True

    def forget_weights(self) -> None:
        """Release all weights. The next step's weights count as changed and start with a baseline."""
        self._weights = []
        for layer in self._layers.values():
            layer.drop_codes(metrics=True)
            layer.stamp = layer.tracked = None

    def open(self, tracked: TrackedWeight, weight: Tensor, quantizer: Quantizer) -> Layer:
        """Return the layer of a weight, with a row on the weight's device."""
        name, format, weights = tracked.name, quantizer_name(quantizer), tracked.parameter.numel()
        layer = self._layers.get(name)
        if layer is not None and (layer.weights, layer.quantizer) != (weights, format):
            change = (
                f"was tracked as {layer.quantizer} and is now tracked as {format}"
                if layer.weights == weights
                else f"had {layer.weights} weights and now has {weights}"
            )
            self._notices.add(f"{name!r} {change}; its counts start from zero")
            if layer.row is not None:
                layer.row.clear()
            zeros = self._columns.zeros()
            layer = self.put(Layer(name, weights, format, zeros, zeros, restarts=layer.restarts + 1, row=layer.row))
        if layer is None:
            layer = self.put(Layer(name, weights, format, self._columns.zeros(), self._columns.zeros()))
        if layer.row is None or layer.row.ledger.device != weight.device:
            layer = self.put(self._move_to_device(layer, weight.device))
        return layer

    def _move_to_device(self, layer: Layer, device: torch.device) -> Layer:
        """Return a copy of the layer with a row on another device, where it starts with a baseline.

        A new object, so that after an interrupt the layer has either moved completely or not at all.
        """
        earlier = layer.earlier_local_counts
        if layer.row is not None:
            self.commit()
            earlier = self._columns.add(earlier, layer.row.read())
        ledger = self._ledgers.setdefault(device, Ledger(device, self._columns.metric_columns))
        moved = replace(layer, earlier_local_counts=earlier, row=Row(ledger, ledger.add_row()), stamp=None)
        moved.drop_codes()
        moved.close_metrics()
        return moved

    # ------------------------------------------------------------------ failures and codes

    def fail(self, name: str, error: Exception, *, warns: bool = True) -> None:
        """Give up on a weight.

        Args:
            name: Its name.
            error: The reason.
            warns: Whether to warn; False if another process does.
        """
        self.failed.add(name)
        self.has_new_failures = True
        layer = self._layers.get(name)
        if layer is not None:
            if layer.row is not None:
                layer.row.discard()
            layer.fail()
        if warns:
            self._notices.add(f"{name!r} is no longer tracked, training continues: {type(error).__name__}: {error}")

    def abandon(self, names: Iterable[str]) -> None:
        """Give up on all layers, and weights with these names, without a warning."""
        self.failed.update(self._layers, names)
        for layer in self._layers.values():
            layer.fail()

    def invalidate(self) -> None:
        """Do not trust any codes: weights may have been written since they were made."""
        for layer in self._layers.values():
            layer.invalidate()

    def drop_codes(self) -> None:
        """Free the memory of all codes."""
        for layer in self._layers.values():
            layer.drop_codes()

    # ------------------------------------------------------------------ counting

    def begin_step(self) -> None:
        """Reset the counts of the step."""
        for ledger in self._ledgers.values():
            ledger.begin_step()

    def prepare(self, valid: Tensor | None) -> None:
        """Compute the totals including this step; ``commit`` puts them in place."""
        for ledger in self._ledgers.values():
            ledger.prepare(valid)

    def commit(self) -> None:
        """Put the totals that belong to the schedule's progress in place, even after an interrupt during this."""
        progress = self._schedule.progress
        if not progress.is_committed:
            for ledger in self._ledgers.values():
                ledger.commit()
            self._schedule.progress = progress._replace(is_committed=True)

    def keep_counts(self, names: Sequence[str], mask: Tensor) -> None:
        """Drop this step's counts of some layers.

        Args:
            names: Names of layers, or of weights that never became layers.
            mask: bool, one per name: whether to keep its counts.
        """
        for ledger in self._ledgers.values():
            rows = {
                index: layer.row.index
                for index, name in enumerate(names)
                if (layer := self._layers.get(name)) is not None and layer.row and layer.row.ledger is ledger
            }
            if rows:
                ledger.keep_counts(list(rows.values()), mask[list(rows)])

    def clear_gauges(self, columns: slice) -> None:
        """Reset a metric group's gauges of the last logging point, in these columns."""
        for ledger in self._ledgers.values():
            if ledger.metric_total is not None:
                ledger.metric_total[:, columns].zero_()

    # ------------------------------------------------------------------ reading

    def read_rows(self, scalars: Sequence[Tensor] = ()) -> tuple[dict[str, list[float]], list[int]]:
        """Read the rows of all layers. One transfer from each device.

        Args:
            scalars: 0-dim int64 tensors to read in the same transfer.

        Returns:
            The rows by name, and the values of ``scalars``.
        """
        self.commit()
        values: dict[int, int] = {}
        tables: dict[torch.device, list[list[float]]] = {}
        for device, ledger in self._ledgers.items():
            on_device = [index for index, scalar in enumerate(scalars) if scalar.device == device]
            tables[device], found = ledger.read([scalars[index] for index in on_device])
            values.update(zip(on_device, found, strict=True))
        rows = {
            name: self._columns.zeros() if layer.row is None else tables[layer.row.ledger.device][layer.row.index]
            for name, layer in self._layers.items()
        }
        return rows, [values[i] if i in values else int(scalar.item()) for i, scalar in enumerate(scalars)]

    def local(self, layer: Layer, row: Sequence[float]) -> list[float]:
        """Return this process's counts of a layer, in its current row and earlier ones."""
        return self._columns.add(layer.earlier_local_counts, row)

    @property
    def counter_bytes(self) -> int:
        """Bytes of the ledgers."""
        return sum(ledger.nbytes for ledger in self._ledgers.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weights": []}
