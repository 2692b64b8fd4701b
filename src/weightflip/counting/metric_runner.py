"""Runs the metric groups: lets them see the weights, and isolates their faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightflip import functional, kernels
from weightflip.counting.layer import Layer, Looks
from weightflip.counting.notices import Notices
from weightflip.counting.observed import Observation
from weightflip.counting.schedule import Schedule
from weightflip.counting.table import LayerTable
from weightflip.metrics import LayerMetric, Slice, Weight
from weightflip.metrics.columns import Group
from weightflip.quantizers.protocol import ElementwiseQuantizer, Quantizer


class MetricRunner:
    """The groups beside flips and stalls, and when each looks at a layer.

    Args:
        groups: What was asked for.
        schedule: Says which step it is.
        notices: Where faults are noted.
        scratch: Where temporaries come from.
        backend: What encodes.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        schedule: Schedule,
        notices: Notices,
        scratch: kernels.ScratchPool,
        backend: str,
    ) -> None:
        self._groups, self._schedule, self._notices = groups, schedule, notices
        self._scratch, self._backend = scratch, backend
        self._measured: dict[str, int] = {}
        self._of_steps = [group for group in groups if group.metric.uses_steps]
        self._of_marks = [group for group in groups if group.metric.uses_marks]
        self.changes = 0
        """Rises whenever a group begins or ends with a layer."""
        self.has_news = False
        """Whether anything was counted since the last logging point."""

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def uses_steps(self) -> bool:
        """Whether any group runs in steps."""
        return bool(self._of_steps)

    @property
    def uses_marks(self) -> bool:
        """Whether any group runs at marks."""
        return bool(self._of_marks)

    def keeps_scale(self, quantizer: ElementwiseQuantizer) -> bool:
        """Whether layers that are counted in one call keep the scale of their codes for the groups.

        For marks, only where one number per weight or row saves reading the weight again. Scales of blocks would take
        up to half a byte per weight.
        """
        return self.uses_steps or (self.uses_marks and quantizer.group is None)

    # ------------------------------------------------------------------ in a step

    def before(self, layer: Layer, *, is_shard: bool) -> None:
        """Open the groups of a layer that has its baseline now, and let them see the weight before the step.

        Args:
            layer: With its codes.
            is_shard: Whether other processes have parts of the same weight.
        """
        assert layer.tracked is not None
        assert layer.codes is not None
        weight, quantizer = layer.tracked.unwrapped()
        if layer.looks is None or layer.code_kind != _code_kind(layer.codes, quantizer):
            self._open_all(layer, self._of_steps, layer.seen(weight, quantizer), is_shard)
            self._find_looks(layer)
        assert layer.looks is not None
        for group, metric in self._due(layer.looks.before):
            self._ask(layer, group, metric.before, layer.seen(weight, quantizer))

    def _open_all(self, layer: Layer, groups: Sequence[Group], seen: Weight, is_shard: bool) -> None:
        """Open those of the groups that are not open yet."""
        kind = seen.codes.shape, seen.codes.dtype
        if layer.metrics is None or layer.code_kind != kind:
            # Stored in another dtype now: what was remembered is of other codes.
            layer.metrics, layer.code_kind, layer.looks = {}, kind, None
        for group in groups:
            if group.metric.name not in layer.metrics:
                self._ask(layer, group, self._open, layer, group, seen, is_shard)

    def _open(self, layer: Layer, group: Group, seen: Weight, is_shard: bool) -> None:
        assert layer.metrics is not None
        if is_shard and not group.metric.of_shards:
            layer.metrics[group.metric.name] = None
            return
        metric = layer.metrics[group.metric.name] = group.metric.open(layer.name, seen)
        saved = layer.saved.pop(group.metric.name, {})
        for name, tensor in {} if metric is None else metric.tensors.items():
            kept = saved.get(name)
            if kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype):
                tensor.copy_(kept)

    def _find_looks(self, layer: Layer) -> None:
        """What to call for a layer in each step: methods that do nothing are left out."""
        found = [
            (group, metric)
            for group in self._of_steps
            if layer.metrics is not None and (metric := layer.metrics.get(group.metric.name)) is not None
        ]
        layer.looks = Looks(
            before=tuple((g, metric) for g, metric in found if type(metric).before is not LayerMetric.before),
            slices=tuple((g, metric) for g, metric in found if type(metric).slice is not LayerMetric.slice),
            after=tuple((g, metric) for g, metric in found if type(metric).after is not LayerMetric.after),
        )
        self.changes += 1

    def observer(
        self, layer: Layer, weight: Tensor, quantizer: Quantizer, valid: Tensor | None
    ) -> functional.Observer | None:
        """What shows each slice of a weight to the groups; None if none wants to see it."""
        due = self._due(layer.looks.slices) if layer.looks is not None else []
        if not due:
            return None
        values = quantizer.grouped(weight) if isinstance(quantizer, ElementwiseQuantizer) else weight

        valid = None if valid is None else valid.to(weight.device, non_blocking=True)
        old_scale = layer.scale_of_codes

        def observe(index: kernels.Index, old: Tensor, new: Tensor) -> None:
            part = Slice(index, values[index], old, new, old_scale, valid, self._scratch, self._backend)
            for group, metric in due:
                self._ask(layer, group, metric.slice, part, _sums(layer, group))

        return observe

    def observations(self, layer: Layer) -> tuple[Observation, ...] | None:
        """What the groups do with each weight of a layer, for a kernel; None where it cannot read what they keep.

        Groups that can only be shown slices are not among them: see :meth:`needs_slices`.
        """
        assert layer.codes is not None
        found = []
        for group, metric in () if layer.looks is None else layer.looks.slices:
            if metric.pointwise is None:
                continue
            states = []
            for state, _ in metric.pointwise.states:
                name, dtype = state.operands
                kept = metric.tensors.get(name)
                if kept is None or kept.dtype is not (dtype or layer.codes.dtype):
                    return None
                if kept.numel() != layer.codes.numel() or kept.device != layer.codes.device or not kept.is_contiguous():
                    return None
                states.append(kept)
            columns = tuple(range(group.sums.start, group.sums.stop, 2))
            if len(columns) != len(metric.pointwise.counts):
                return None
            found.append(Observation(group.metric.name, metric.pointwise, tuple(states), columns))
        return tuple(found)

    def needs_slices(self, layer: Layer) -> bool:
        """Whether a group that looks at this step has to be shown the slices of a layer."""
        return layer.looks is not None and any(metric.pointwise is None for _, metric in self._due(layer.looks.slices))

    def after(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> None:
        """Let the groups see a weight after the step, once all of it is counted."""
        for group, metric in () if layer.looks is None else self._due(layer.looks.after):
            self._ask(layer, group, metric.after, layer.seen(weight, quantizer), _sums(layer, group))

    def after_all(self, layers: Sequence[Layer]) -> None:
        """As :meth:`after`, of layers that are counted together."""
        for layer in layers:
            if layer.looks is not None and layer.looks.after and layer.tracked is not None:
                self.after(layer, *layer.tracked.unwrapped())

    @property
    def due(self) -> tuple[str, ...]:
        """The names of the groups that look at this step."""
        steps = self._schedule.tracked_steps
        return tuple(group.metric.name for group in self._of_steps if steps % group.every == 0)

    def _due(self, looks: Sequence[tuple[Group, LayerMetric]]) -> list[tuple[Group, LayerMetric]]:
        """Those of some groups that look at this step."""
        steps = self._schedule.tracked_steps
        return [(group, metric) for group, metric in looks if steps % group.every == 0]

    # ------------------------------------------------------------------ at a mark

    def mark(self, layer: Layer, *, is_shard: bool) -> None:
        """Call the groups that run at marks.

        Args:
            layer: A layer with its current codes.
            is_shard: Whether other processes have parts of the same weight.
        """
        assert layer.row is not None
        seen = self._seen(layer)
        self._open_all(layer, self._of_marks, seen, is_shard)
        for group in self._of_marks:
            metric = (layer.metrics or {}).get(group.metric.name)
            if metric is not None:
                sums = layer.row.more_total(group.sums).view(-1, 2)
                self._ask(layer, group, metric.mark, seen, sums, self._scratch)
        self.has_news = True

    def forget_mark(self, layer: Layer) -> None:
        """Drop what the groups remember of the last mark: the layer is not part of the current one."""
        for group in self._of_marks:
            layer.saved.pop(group.metric.name, None)
            if layer.metrics and layer.metrics.get(group.metric.name) is not None:
                del layer.metrics[group.metric.name]

    # ------------------------------------------------------------------ at a logging point

    def begin_measure(self, layers: LayerTable) -> list[Group]:
        """Forget what was found at the last logging point; the groups that look at this one.

        Args:
            layers: All layers.
        """
        for group in self._groups:
            layers.clear_found(slice(group.gauges.start, group.bins.stop))
        steps = self._schedule.steps
        due = [
            group
            for group in self._groups
            if group.gauges.start < group.bins.stop
            and steps - self._measured.get(group.metric.name, -group.every) >= group.every
        ]
        has_news, self.has_news = self.has_news, False
        return due if has_news else []

    def measure(self, layer: Layer, due: Sequence[Group]) -> None:
        """Let groups look at a layer that has its codes.

        Args:
            layer: One of the last step.
            due: As ``begin_measure`` has it.
        """
        assert layer.row is not None
        seen = self._seen(layer)
        for group in due:
            metric = (layer.metrics or {}).get(group.metric.name)
            if metric is not None:
                gauges, bins = layer.row.more_total(group.gauges).view(-1, 2), layer.row.more_total(group.bins)
                self._ask(layer, group, metric.gauge, seen, gauges, bins)

    def _seen(self, layer: Layer) -> Weight:
        """Return a weight between two steps as the groups see it."""
        assert layer.tracked is not None
        weight, quantizer = layer.tracked.unwrapped()
        seen = layer.seen(weight, quantizer)._replace(backend=self._backend)
        member = layer.member
        has_scale = self.uses_steps or (member is not None and member.keeps_scale and seen.scale is not None)
        if has_scale or not isinstance(quantizer, ElementwiseQuantizer):
            return seen
        encoding = functional.Encoding(quantizer, self._scratch, self._backend, layer.statistic)
        return seen._replace(scale=encoding.scale(seen.values))

    def measured(self, due: Sequence[Group]) -> None:
        """These groups have looked now."""
        self._measured.update({group.metric.name: self._schedule.steps for group in due})

    def _ask(self, layer: Layer, group: Group, action: Callable[..., None], *args: Any) -> None:
        """A group that fails on a layer is warned about once; everything else goes on."""
        try:
            action(*args)
        except Exception as error:
            assert layer.metrics is not None
            layer.metrics[group.metric.name] = None
            self._find_looks(layer)
            self._notices.add(
                f"{layer.name!r} has no numbers of {group.metric.name!r} any more, all else goes on: "
                f"{type(error).__name__}: {error}"
            )


def _code_kind(codes: Tensor, quantizer: Quantizer) -> tuple[torch.Size, torch.dtype]:
    grouped = quantizer.grouped(codes) if isinstance(quantizer, ElementwiseQuantizer) else codes
    return grouped.shape, grouped.dtype


def _sums(layer: Layer, group: Group) -> Tensor:
    assert layer.row is not None
    return layer.row.more_step(group.sums).view(-1, 2)
