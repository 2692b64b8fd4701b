"""Runs the metric groups: lets them see the weights, and isolates their faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from weightflip import functional, kernels
from weightflip.counting.layer import Layer
from weightflip.counting.notices import Notices
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

    # ------------------------------------------------------------------ in a step

    def before(self, layer: Layer, *, is_shard: bool) -> None:
        """Open the groups of a layer that has its baseline now, and let them see the weight before the step.

        Args:
            layer: With its codes.
            is_shard: Whether other processes have parts of the same weight.
        """
        assert layer.tracked is not None
        seen = layer.seen(*layer.tracked.unwrapped())
        self._open_all(layer, self._of_steps, seen, is_shard)
        for group, metric in self._due(layer):
            self._ask(layer, group, metric.before, seen)

    def _open_all(self, layer: Layer, groups: Sequence[Group], seen: Weight, is_shard: bool) -> None:
        """Open those of the groups that are not open yet."""
        kind = seen.codes.shape, seen.codes.dtype
        if layer.metrics is None or layer.code_kind != kind:
            # Stored in another dtype now: what was remembered is of other codes.
            layer.metrics, layer.code_kind = {}, kind
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

    def observer(
        self, layer: Layer, weight: Tensor, quantizer: Quantizer, valid: Tensor | None
    ) -> functional.Observer | None:
        """What shows each slice of a weight to the groups; None if none wants to see it."""
        due = [(group, metric) for group, metric in self._due(layer) if type(metric).slice is not LayerMetric.slice]
        if not due:
            return None
        values = quantizer.grouped(weight) if isinstance(quantizer, ElementwiseQuantizer) else weight

        valid = None if valid is None else valid.to(weight.device, non_blocking=True)

        def observe(index: kernels.Index, old: Tensor, new: Tensor) -> None:
            part = Slice(index, values[index], old, new, valid, self._scratch, self._backend)
            for group, metric in due:
                self._ask(layer, group, metric.slice, part, _sums(layer, group))

        return observe

    def after(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> None:
        """Let the groups see a weight after the step, once all of it is counted."""
        for group, metric in self._due(layer):
            self._ask(layer, group, metric.after, layer.seen(weight, quantizer), _sums(layer, group))

    def _due(self, layer: Layer) -> list[tuple[Group, LayerMetric]]:
        """The groups that look at this step, with what they keep of the layer."""
        if not layer.metrics:
            return []
        tracked_steps = self._schedule.tracked_steps
        return [
            (group, metric)
            for group in self._of_steps
            if tracked_steps % group.every == 0 and (metric := layer.metrics.get(group.metric.name)) is not None
        ]

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
        if not self.uses_steps and isinstance(quantizer, ElementwiseQuantizer):
            # The routes that count many layers in one call do not keep scales.
            encoding = functional.Encoding(quantizer, self._scratch, self._backend, layer.statistic)
            layer.scale = encoding.scale(quantizer.grouped(weight))
        return layer.seen(weight, quantizer)

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
            self._notices.add(
                f"{layer.name!r} has no numbers of {group.metric.name!r} any more, all else goes on: "
                f"{type(error).__name__}: {error}"
            )


def _sums(layer: Layer, group: Group) -> Tensor:
    assert layer.row is not None
    return layer.row.more_step(group.sums).view(-1, 2)
