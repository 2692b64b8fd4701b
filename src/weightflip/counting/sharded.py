"""Cooperation of processes that share sharded weights: scales before a step, sums of counts after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from weightflip import distributed
from weightflip.counting.columns import Columns
from weightflip.counting.layer import Layer, TrackedWeight
from weightflip.counting.sharding import Sharding, Totals
from weightflip.counting.table import LayerTable
from weightflip.quantizers.adapt import quantizer_name


class ShardedRun:
    """A run in which some weights are sharded over several processes.

    Whether a collective takes place must not depend on what only this process sees, or other processes would hang.
    It depends on the list of weights, the number of steps, and operations that a program applies to a DTensor on all
    processes: replacing it, or writing to it as a whole.

    Args:
        layers: All layers.
        columns: The columns of their rows.
    """

    def __init__(self, layers: LayerTable, columns: Columns) -> None:
        self._layers, self._columns = layers, columns
        self._weights = distributed.ShardedWeights()
        # The weights of the step that need a statistic, and their versions, which show whether they were written.
        self._with_statistic: dict[str, TrackedWeight] = {}
        self._versions: list[tuple[distributed.Identity, int | None]] | None = None
        self._statistics_current = False
        # Written on this process, and maybe on no other, so that their current scale is unknown.
        self._locally_written: set[str] = set()
        self._must_compare = self._membership_unknown = False
        # For each layer, its restarts, and those counts of this process that are part of its synchronized counts.
        self._local_synchronized: dict[str, tuple[int, list[float]]] = {}
        self._synchronized_totals: Totals | None = None

    def __bool__(self) -> bool:
        return bool(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def for_weights(self, weights: Sequence[TrackedWeight]) -> Sharding:
        return self

    def request_comparison(self, *, is_selection_known: bool) -> Sharding:
        self._must_compare, self._membership_unknown = True, not is_selection_known
        return self

    # ------------------------------------------------------------------ before a step

    def begin(self, weights: Sequence[TrackedWeight], *, have_changed: bool, force: bool) -> None:
        if have_changed or self._must_compare:
            self._update_weights(weights)
        self._locally_written = set()
        requested = {name for _, names in self._weights.tables for name in names}
        self._with_statistic = {tracked.name: tracked for tracked in weights if tracked.name in requested}
        for name, layer in self._layers.items():
            if name not in requested:
                layer.statistic = None
        self._statistics_current = False
        if self._with_statistic and (force or self._versions != self._current_versions()):
            self._combine_statistics()
            self._statistics_current = True

    def _update_weights(self, weights: Sequence[TrackedWeight]) -> None:
        before = set(self._weights)
        was_compared = self._weights.update(
            [(tracked.name, tracked.parameter, tracked.quantizer) for tracked in weights],
            quantizer_name,
            compare=self._must_compare,
            is_membership_unknown=self._membership_unknown,
        )
        self._must_compare = self._membership_unknown = False
        if not was_compared:
            return
        self._versions = None
        for name, reason in self._weights.rejected.items():
            if name in before:
                self._stop_reducing(name)
            if name not in self._layers.failed:
                self._layers.fail(name, ValueError(reason), warns=name not in self._weights.reported_elsewhere)
        self._open_layers(weights)

    def _stop_reducing(self, name: str) -> None:
        """Stop summing a weight: keep the synchronized counts, and drop those that only this process has."""
        layer = self._layers.get(name)
        if layer is not None:
            if layer.row is not None:
                layer.row.clear()
            layer.earlier_local_counts = self._columns.zeros()
            self._local_synchronized.pop(name, None)

    def _open_layers(self, weights: Sequence[TrackedWeight]) -> None:
        """Open all layers in the order of the weights. Otherwise those with a statistic would be opened first."""
        for tracked in weights:
            if tracked.name not in self._layers.failed and tracked.is_active:
                try:
                    self._layers.open(tracked, *tracked.unwrapped())
                except Exception as error:
                    self._layers.fail(tracked.name, error)

    def _current_versions(self) -> list[tuple[distributed.Identity, int | None]]:
        parameters = [tracked.parameter for tracked in self._with_statistic.values()]
        return [(distributed.Identity(p), None if p.is_inference() else p._version) for p in parameters]

    def _combine_statistics(self) -> None:
        """Combine the statistics of sharded weights that quantizers need. One collective per group."""
        failed = self._layers.failed
        for table, names in self._weights.tables:
            table.clear()
            statistics: dict[int, Tensor] = {}
            for index, name in enumerate(names):
                if name not in failed:
                    try:
                        weight, quantizer = self._with_statistic[name].unwrapped()
                        statistic = quantizer.statistic(weight)
                        table.put(index, statistic, weight.numel())
                        statistics[index] = statistic
                        self._layers.open(self._with_statistic[name], weight, quantizer)
                    except Exception as error:
                        self._layers.fail(name, error)
                if name in failed or name in self._locally_written:
                    table.flag(index, 2 if name in failed else 1)
            table.reduce()
            for index, statistic in statistics.items():
                try:
                    if (layer := self._layers.get(names[index])) is not None:
                        layer.statistic = table.get(index, statistic)
                except Exception as error:
                    self._layers.fail(names[index], error)

    def may_keep(self, name: str, is_unwritten: bool) -> bool:
        if name not in self._with_statistic:
            return is_unwritten
        if not self._statistics_current and not is_unwritten:
            self._locally_written.add(name)
        return is_unwritten and not self._statistics_current

    # ------------------------------------------------------------------ after a step

    def exchange_statistics(self, *, is_next_due: bool) -> None:
        self._statistics_current = False
        self._combine_statistics()
        # Set now: a later failure on this process must not change whether it joins a collective before the next step.
        self._versions = self._current_versions() if self._with_statistic and is_next_due else None

    def discard_flagged(self) -> None:
        for table, names in self._weights.tables:
            self._layers.keep_counts(names, table.is_counted)

    def invalidate(self) -> None:
        self._versions = None

    @property
    def names(self) -> Iterable[str]:
        return self._weights

    def release(self) -> None:
        self._with_statistic, self._versions = {}, None

    # ------------------------------------------------------------------ sums

    def reduce_counts(self, steps: int, rows: Mapping[str, Sequence[float]]) -> None:
        columns = self._columns
        local = {name: self._layers.local(layer, rows[name]) for name, layer in self._layers.items()}
        totals = {name: columns.add(layer.synchronized_counts, local[name]) for name, layer in self._layers.items()}
        for group, members in self._weights.rank_groups:
            numbers: list[float] = []
            for member in members:
                name = member.name
                new_counts = columns.subtract(self._local_synchronized_counts(name), local.get(name, columns.zeros()))
                numbers += new_counts if group.is_counted(member.layout) else columns.zeros()
                numbers.append(group.failure if name in self._layers.failed else 0)
            sums = distributed.all_reduce_sum(numbers, group)
            size = len(columns) + 1
            for i, member in enumerate(members):
                *new_counts, failures = sums[i * size : (i + 1) * size]
                # In some steps, only part of the weight was counted.
                new_counts = columns.zeros() if failures else new_counts
                local_counts = local.get(member.name, columns.zeros())
                totals[member.name] = self._add_new_counts(member, new_counts, local_counts)
                if failures and member.name not in self._layers.failed:
                    error = RuntimeError("it is no longer tracked on another process")
                    self._layers.fail(member.name, error, warns=group.is_reporter(failures))
        self._synchronized_totals = steps, totals

    def _add_new_counts(
        self, member: distributed.ShardedWeight, new_counts: Sequence[float], local: list[float]
    ) -> list[float]:
        """Add the new counts of all processes to a layer's totals."""
        columns = self._columns
        layer = self._layers.get(member.name)
        if layer is None:
            # The layer failed on this process before anything was counted.
            zeros = columns.zeros()
            layer = self._layers.put(Layer(member.name, member.weights, member.quantizer, zeros, zeros))
        totals = columns.add(layer.synchronized_counts, columns.to_integers(new_counts))
        layer.synchronized_counts = columns.without_gauges(totals)
        self._local_synchronized[member.name] = layer.restarts, local
        return totals

    def _local_synchronized_counts(self, name: str) -> list[float]:
        layer = self._layers.get(name)
        restarts, synchronized_counts = self._local_synchronized.get(name, (None, []))
        return synchronized_counts if layer is not None and layer.restarts == restarts else self._columns.zeros()

    def totals(self, steps: int) -> Totals | None:
        if not self._weights:
            return None
        return self._synchronized_totals or (
            steps,
            {name: layer.synchronized_counts for name, layer in self._layers.items()},
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_with_statistic": {}, "_versions": None}
