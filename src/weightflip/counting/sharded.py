"""What processes have to agree on where weights are sharded over them: scales before, sums after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from weightflip import distributed
from weightflip.counting.columns import Columns
from weightflip.counting.layer import Layer, TrackedWeight
from weightflip.counting.shards import Shards, Totals
from weightflip.counting.table import LayerTable
from weightflip.quantizers.adapt import quantizer_name


class ShardedRun:
    """Some weights lie in parts on several processes.

    Whether there is a collective must not depend on what this process alone can see, or it would wait for ever. So it
    depends on the list of weights, the number of steps, and on what a program has to do to a DTensor on all processes:
    replace it, or write to it as a whole.

    Args:
        layers: All layers.
        columns: Of their rows.
    """

    def __init__(self, layers: LayerTable, columns: Columns) -> None:
        self._layers, self._columns = layers, columns
        self._weights = distributed.ShardedWeights()
        # The weights of the step that a statistic of the whole is asked of, and what would show that they were written.
        self._asked: dict[str, TrackedWeight] = {}
        self._marks: list[tuple[distributed.Identity, int | None]] | None = None
        self._statistics_current = False
        # Written on this process, and maybe on no other: the scale of now is not known.
        self._locally_written: set[str] = set()
        self._compares = self._membership_unknown = False
        # Of what this process has counted since a layer's latest restart, what is in the layer's settled counts.
        self._local_settled: dict[str, tuple[int, list[float]]] = {}
        self._synchronized_totals: Totals | None = None

    def __bool__(self) -> bool:
        return bool(self._weights)

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def for_weights(self, weights: Sequence[TrackedWeight]) -> Shards:
        return self

    def expect_others(self, *, are_known: bool) -> Shards:
        self._compares, self._membership_unknown = True, not are_known
        return self

    # ------------------------------------------------------------------ before a step

    def begin(self, weights: Sequence[TrackedWeight], *, are_others: bool, anew: bool) -> None:
        if are_others or self._compares:
            self._follow(weights)
        self._locally_written = set()
        asked = {name for _, names in self._weights.tables for name in names}
        self._asked = {tracked.name: tracked for tracked in weights if tracked.name in asked}
        for name, layer in self._layers.items():
            if name not in asked:
                layer.statistic = None
        self._statistics_current = False
        if self._asked and (anew or self._marks != self._marks_now()):
            self._bring_together()
            self._statistics_current = True

    def _follow(self, weights: Sequence[TrackedWeight]) -> None:
        before = set(self._weights)
        was_compared = self._weights.update(
            [(tracked.name, tracked.parameter, tracked.quantizer) for tracked in weights],
            quantizer_name,
            compare=self._compares,
            is_membership_unknown=self._membership_unknown,
        )
        self._compares = self._membership_unknown = False
        if not was_compared:
            return
        self._marks = None
        for name, reason in self._weights.refused.items():
            if name in before:
                self._part_with(name)
            if name not in self._layers.failed:
                self._layers.fail(name, ValueError(reason), tells=name not in self._weights.reported_elsewhere)
        self._open_layers(weights)

    def _part_with(self, name: str) -> None:
        """A weight is not added up any more: what all have counted is settled; what this process has, is a part."""
        layer = self._layers.get(name)
        if layer is not None:
            if layer.row is not None:
                layer.row.clear()
            layer.local_before = self._columns.zeros()
            self._local_settled.pop(name, None)

    def _open_layers(self, weights: Sequence[TrackedWeight]) -> None:
        """Have all layers there in the order of the weights, which those with a statistic would else be ahead of."""
        for tracked in weights:
            if tracked.name not in self._layers.failed and tracked.is_active:
                try:
                    self._layers.open(tracked, *tracked.unwrapped())
                except Exception as error:
                    self._layers.fail(tracked.name, error)

    def _marks_now(self) -> list[tuple[distributed.Identity, int | None]]:
        parameters = [tracked.parameter for tracked in self._asked.values()]
        return [(distributed.Identity(p), None if p.is_inference() else p._version) for p in parameters]

    def _bring_together(self) -> None:
        """What quantizers have to know of whole weights, of which each process holds a part. One collective a team."""
        failed = self._layers.failed
        for table, names in self._weights.tables:
            table.clear()
            handed: dict[int, Tensor] = {}
            for index, name in enumerate(names):
                if name not in failed:
                    try:
                        weight, quantizer = self._asked[name].unwrapped()
                        statistic = quantizer.statistic(weight)
                        table.put(index, statistic, weight.numel())
                        handed[index] = statistic
                        self._layers.open(self._asked[name], weight, quantizer)
                    except Exception as error:
                        self._layers.fail(name, error)
                if name in failed or name in self._locally_written:
                    table.flag(index, 2 if name in failed else 1)
            table.reduce()
            for index, statistic in handed.items():
                try:
                    if (layer := self._layers.get(names[index])) is not None:
                        layer.statistic = table.get(index, statistic)
                except Exception as error:
                    self._layers.fail(names[index], error)

    def may_keep(self, name: str, is_unwritten: bool) -> bool:
        if name not in self._asked:
            return is_unwritten
        if not self._statistics_current and not is_unwritten:
            self._locally_written.add(name)
        return is_unwritten and not self._statistics_current

    # ------------------------------------------------------------------ after it

    def share(self, *, is_next_due: bool) -> None:
        self._statistics_current = False
        self._bring_together()
        # At once: what fails later on this process must not make it ask the others before the next step, nor not ask.
        self._marks = self._marks_now() if self._asked and is_next_due else None

    def drop_uncertain(self) -> None:
        for table, names in self._weights.tables:
            self._layers.keep(names, table.is_counted)

    def forget(self) -> None:
        self._marks = None

    @property
    def names(self) -> Iterable[str]:
        return self._weights

    def release(self) -> None:
        self._asked, self._marks = {}, None

    # ------------------------------------------------------------------ sums

    def add_up(self, steps: int, rows: Mapping[str, Sequence[float]]) -> None:
        columns = self._columns
        local = {name: self._layers.local(layer, rows[name]) for name, layer in self._layers.items()}
        totals = {name: columns.add(layer.settled, local[name]) for name, layer in self._layers.items()}
        for team, members in self._weights.teams:
            numbers: list[float] = []
            for member in members:
                name = member.name
                news = columns.since(self._settled_of(name), local.get(name, columns.zeros()))
                numbers += news if team.is_counted(member.layout) else columns.zeros()
                numbers.append(team.failure if name in self._layers.failed else 0)
            sums = distributed.add_up(numbers, team)
            size = len(columns) + 1
            for i, member in enumerate(members):
                *news, failures = sums[i * size : (i + 1) * size]
                # Of some steps only a part was counted.
                news = columns.zeros() if failures else news
                own = local.get(member.name, columns.zeros())
                totals[member.name] = self._settle(member, news, own)
                if failures and member.name not in self._layers.failed:
                    error = RuntimeError("it is not on another process")
                    self._layers.fail(member.name, error, tells=team.is_reporter(failures))
        self._synchronized_totals = steps, totals

    def _settle(self, member: distributed.ShardedWeight, news: Sequence[float], local: list[float]) -> list[float]:
        """Add what all processes have counted to a layer's totals."""
        columns = self._columns
        layer = self._layers.get(member.name)
        if layer is None:
            # It has failed here before anything was counted.
            zeros = columns.zeros()
            layer = self._layers.put(Layer(member.name, member.weights, member.quantizer, zeros, zeros))
        totals = columns.add(layer.settled, columns.whole(news))
        layer.settled = columns.without_gauges(totals)
        self._local_settled[member.name] = layer.restarts, local
        return totals

    def _settled_of(self, name: str) -> list[float]:
        layer = self._layers.get(name)
        restarts, settled = self._local_settled.get(name, (None, []))
        return settled if layer is not None and layer.restarts == restarts else self._columns.zeros()

    def totals(self, steps: int) -> Totals | None:
        if not self._weights:
            return None
        return self._synchronized_totals or (steps, {name: layer.settled for name, layer in self._layers.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_asked": {}, "_marks": None}
