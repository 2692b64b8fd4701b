"""Run the metric groups, and isolate their failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from weightflip import functional, kernels
from weightflip.counting import expressions
from weightflip.counting.layer import CodeState, Layer, MetricCalls
from weightflip.counting.notices import Notices
from weightflip.counting.observations import Observation
from weightflip.counting.sampled import SampledLayers
from weightflip.counting.schedule import Schedule
from weightflip.counting.sharding import Sharding
from weightflip.counting.table import LayerTable
from weightflip.metrics import LayerMetric, Slice, Weight
from weightflip.metrics.base import RunFlag
from weightflip.metrics.columns import Group
from weightflip.quantizers.protocol import ElementwiseQuantizer, Quantizer


class MetricRunner:
    """Runs the metric groups when they are due.

    Args:
        groups: The requested groups.
        schedule: Counts the steps.
        notices: Receives warnings about failures.
        scratch: Provides temporary buffers.
        backend: As in :func:`weightflip.kernels.check_backend`.
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
        self._samples: dict[str, SampledLayers] = {}
        self._step_groups = [group for group in groups if group.metric.uses_steps]
        self._mark_groups = [group for group in groups if group.metric.uses_marks]
        self._run_flags = {group.metric.name: RunFlag() for group in self._mark_groups if group.metric.uses_steps}
        """Whether each group that runs in steps and at marks has run in a step since the last mark."""
        self.changes = 0
        """Increases whenever a group starts or stops running for a layer."""
        self.has_new_counts = False
        """Whether anything was counted since the last logging point."""

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def uses_steps(self) -> bool:
        """Whether any group runs in steps."""
        return bool(self._step_groups)

    @property
    def uses_marks(self) -> bool:
        """Whether any group runs at marks."""
        return bool(self._mark_groups)

    def keeps_scale(self, quantizer: ElementwiseQuantizer) -> bool:
        """Whether layers that are counted in one call keep the scale of their codes for the groups.

        For marks, only where one number per weight or row saves reading the weight again. Scales of blocks would take
        up to half a byte per weight.
        """
        return self.uses_steps or (self.uses_marks and quantizer.group is None)

    # ------------------------------------------------------------------ in a step

    def before_all(self, layers: Sequence[Layer], shards: Sharding) -> None:
        """Before the step, open the groups that are not open yet, and call them.

        Args:
            layers: The layers of the step, with their current codes.
            shards: Tells of which weights other processes have parts.
        """
        for layer in layers:
            calls = layer.metric_calls
            # Kept codes have the shape and dtype of the last step. Do not call anything for each layer in each step.
            if calls is None or calls.before or layer.state is not CodeState.KEPT:
                self._before(layer, is_shard=layer.name in shards)
        for samples in self._due_samples:
            alone = self._try_kernel(samples, samples.before, layers, self.changes, self._schedule.steps)
            for layer, metric in self._with_sample(samples.group, alone):
                self._call(layer, samples.group, _take_sample, layer, metric)

    def _before(self, layer: Layer, *, is_shard: bool) -> None:
        """Open the groups of a layer that are not open yet, and call them, except those with a sample.

        Args:
            layer: A layer with its current codes.
            is_shard: Whether other processes have parts of the same weight.
        """
        assert layer.tracked is not None
        assert layer.codes is not None
        weight, quantizer = layer.tracked.unwrapped()
        if layer.metric_calls is None or layer.code_kind != _code_kind(layer.codes, quantizer):
            self._open_all(layer, self._step_groups, layer.view_for_metrics(weight, quantizer), is_shard)
            self._set_metric_calls(layer)
        assert layer.metric_calls is not None
        for group, metric in self._due(layer.metric_calls.before):
            self._call(layer, group, metric.before, layer.view_for_metrics(weight, quantizer))

    def _open_all(self, layer: Layer, groups: Sequence[Group], weight: Weight, is_shard: bool) -> None:
        """Open the groups that are not open yet."""
        kind = weight.codes.shape, weight.codes.dtype
        if layer.metrics is None or layer.code_kind != kind:
            # The codes have a new shape or dtype, so the old state does not fit.
            layer.metrics, layer.code_kind, layer.metric_calls = {}, kind, None
        for group in groups:
            if group.metric.name not in layer.metrics:
                self._call(layer, group, self._open, layer, group, weight, is_shard)

    def _open(self, layer: Layer, group: Group, weight: Weight, is_shard: bool) -> None:
        assert layer.metrics is not None
        if is_shard and not group.metric.supports_shards:
            layer.metrics[group.metric.name] = None
            return
        metric = layer.metrics[group.metric.name] = group.metric.open(layer.name, weight)
        saved = layer.saved.pop(group.metric.name, {})
        flag = self._run_flags.get(group.metric.name)
        if metric is not None and flag is not None:
            metric.run_flag = flag
            if "has_run" in saved:
                # Other layers share the flag, and may have set it in a step before this layer was opened.
                flag.note_step(saved["has_run"])
                saved = {name: tensor for name, tensor in saved.items() if name != "has_run"}
        tensors = {} if metric is None else metric.tensors
        pairs = [(saved[name], tensor) for name, tensor in tensors.items() if name in saved]
        # All or nothing: the weight may have another shape than when this was saved.
        if all((kept.shape, kept.dtype) == (tensor.shape, tensor.dtype) for kept, tensor in pairs):
            for kept, tensor in pairs:
                tensor.copy_(kept)

    def _set_metric_calls(self, layer: Layer) -> None:
        """Find the methods to call for a layer in each step. Methods that are not overridden are left out."""
        found = [
            (group, metric)
            for group in self._step_groups
            if layer.metrics is not None and (metric := layer.metrics.get(group.metric.name)) is not None
        ]
        whole = [(group, metric) for group, metric in found if metric.sample is None]
        layer.metric_calls = MetricCalls(
            before=tuple((g, metric) for g, metric in whole if type(metric).before is not LayerMetric.before),
            slices=tuple((g, metric) for g, metric in found if type(metric).slice is not LayerMetric.slice),
            after=tuple((g, metric) for g, metric in whole if type(metric).after is not LayerMetric.after),
            samples=tuple((g, metric) for g, metric in found if metric.sample is not None),
        )
        for group, _ in layer.metric_calls.samples:
            if group.metric.name not in self._samples:
                self._samples[group.metric.name] = SampledLayers(group, self._backend)
        self.changes += 1

    def make_observer(
        self, layer: Layer, weight: Tensor, quantizer: Quantizer, valid: Tensor | None
    ) -> functional.Observer | None:
        """Return a function that passes each slice of a weight to the groups; None if no group needs it.

        Called before the codes are replaced, for a layer that is counted alone.
        """
        for _, metric in () if layer.metric_calls is None else layer.metric_calls.samples:
            assert metric.sample is not None
            # A kernel that took the sample did not need it.
            metric.sample.scale = layer.scale_of_codes
        due = self._due(layer.metric_calls.slices) if layer.metric_calls is not None else []
        if not due:
            return None
        values = quantizer.grouped(weight) if isinstance(quantizer, ElementwiseQuantizer) else weight

        valid = None if valid is None else valid.to(weight.device, non_blocking=True)
        old_scale = layer.scale_of_codes

        def observe(index: kernels.Index, old: Tensor, new: Tensor) -> None:
            part = Slice(index, values[index], old, new, old_scale, valid, self._scratch, self._backend)
            for group, metric in due:
                self._call(layer, group, metric.slice, part, _sums(layer, group))

        return observe

    def collect_observations(self, layer: Layer) -> tuple[Observation, ...] | None:
        """Return what the groups compute for each weight of a layer; None if a kernel cannot access their state.

        Groups that need slices are not included. See :meth:`needs_slices`.
        """
        assert layer.codes is not None
        found = []
        for group, metric in () if layer.metric_calls is None else layer.metric_calls.slices:
            if not self._has_usable_expression(layer, group, metric):
                continue
            assert metric.pointwise is not None
            states = []
            for state, _ in metric.pointwise.states:
                name, dtype = state.operands
                kept = metric.tensors.get(name)
                if kept is None or not _is_state_of(layer.codes, kept, dtype):
                    return None
                states.append(kept)
            columns = tuple(range(group.sums.start, group.sums.stop, 2)) if metric.pointwise.counts else ()
            if len(columns) != len(metric.pointwise.counts):
                return None
            found.append(Observation(group.metric.name, metric.pointwise, tuple(states), columns))
        return tuple(found)

    def _has_usable_expression(self, layer: Layer, group: Group, metric: LayerMetric) -> bool:
        if metric.pointwise is not None:
            assert layer.tracked is not None
            if not expressions.is_usable(group.metric, metric, layer.name, *layer.tracked.unwrapped()):
                # From now on, it needs slices.
                metric.pointwise = None
        return metric.pointwise is not None

    def needs_slices(self, layer: Layer) -> bool:
        """Whether a group that is due in this step needs the slices of a layer."""
        return layer.metric_calls is not None and any(
            metric.pointwise is None for _, metric in self._due(layer.metric_calls.slices)
        )

    def after(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> None:
        """Call the groups after the step, once the whole weight is counted alone."""
        calls = layer.metric_calls
        for group, metric in () if calls is None else self._due(calls.after + calls.samples):
            self._call(layer, group, metric.after, layer.view_for_metrics(weight, quantizer), _sums(layer, group))

    def begin_count(self, layers: Sequence[Layer], places: int) -> None:
        """Prepare for replacing the codes of layers that are counted together.

        Args:
            layers: The layers.
            places: Increases whenever the scales of a layer are kept in another place.
        """
        for samples in self._due_samples:
            alone = self._try_kernel(samples, samples.begin_count, layers, places)
            for layer, metric in self._with_sample(samples.group, alone):
                self._call(layer, samples.group, _note_scale, layer, metric)

    def after_all(self, layers: Sequence[Layer]) -> None:
        """As :meth:`after`, for layers that are counted together."""
        for samples in self._due_samples:
            alone = self._try_kernel(samples, samples.after, self._schedule.steps)
            for layer, metric in self._with_sample(samples.group, alone):
                self._call(layer, samples.group, _compare_sample, layer, metric, samples)
        for layer in layers:
            if layer.metric_calls is not None and layer.metric_calls.after and layer.tracked is not None:
                self.after(layer, *layer.tracked.unwrapped())

    def release_codes(self) -> None:
        """Release the codes of all layers. The next step takes them again."""
        for samples in self._samples.values():
            samples.release()

    @staticmethod
    def _with_sample(group: Group, layers: Sequence[Layer]) -> Iterator[tuple[Layer, LayerMetric]]:
        """Yield the layers of which a group keeps a sample, with its state."""
        for layer in layers:
            metric = (layer.metrics or {}).get(group.metric.name)
            if metric is not None and metric.sample is not None and layer.tracked is not None:
                yield layer, metric

    @property
    def _due_samples(self) -> list[SampledLayers]:
        due = self.due if self._samples else ()
        return [samples for name, samples in self._samples.items() if name in due]

    def _try_kernel(self, samples: SampledLayers, action: Callable[..., list[Layer]], *args: Any) -> list[Layer]:
        """Call a method that uses a kernel for many layers, and return the layers for which it does not.

        If it fails, warn once, and do without the kernel from now on.
        """
        try:
            return action(*args)
        except Exception as error:
            self._notices.add(
                f"the samples of {samples.group.metric.name!r} are compared one layer at a time from now on, which is "
                f"slower, everything else continues: {type(error).__name__}: {error}"
            )
        samples.stop_using_kernel()
        return action(*args)

    @property
    def due(self) -> tuple[str, ...]:
        """The names of the groups that are due in this step."""
        steps = self._schedule.tracked_steps
        return tuple(group.metric.name for group in self._step_groups if steps % group.every == 0)

    def note_step(self, valid: Tensor | None) -> None:
        """Note that the groups that are due have run in this step.

        Args:
            valid: 0-dim: False if the step was skipped. None: it was not.
        """
        for name in self.due if self._run_flags else ():
            if name in self._run_flags:
                self._run_flags[name].note_step(valid)

    def _due(self, calls: Sequence[tuple[Group, LayerMetric]]) -> list[tuple[Group, LayerMetric]]:
        """Return those of the calls that are due in this step."""
        steps = self._schedule.tracked_steps
        return [(group, metric) for group, metric in calls if steps % group.every == 0]

    # ------------------------------------------------------------------ at a mark

    def mark(self, layer: Layer, *, is_shard: bool) -> None:
        """Call the groups that run at marks.

        Args:
            layer: A layer with its current codes.
            is_shard: Whether other processes have parts of the same weight.
        """
        assert layer.row is not None
        weight = self._view_between_steps(layer, self._mark_groups)
        self._open_all(layer, self._mark_groups, weight, is_shard)
        for group in self._mark_groups:
            metric = (layer.metrics or {}).get(group.metric.name)
            if metric is None:
                continue
            sums = layer.row.metric_total(group.sums).view(-1, 2)
            self._call_between_steps(layer, group, metric, metric.mark, weight, sums, self._scratch)
        self.has_new_counts = True

    def end_mark(self) -> None:
        """Start new windows, once all layers are marked."""
        for flag in self._run_flags.values():
            flag.clear()

    def forget_mark(self, layer: Layer) -> None:
        """Drop the state of the last mark, because the layer is not part of the current one."""
        for group in self._mark_groups:
            layer.saved.pop(group.metric.name, None)
            if layer.metrics and layer.metrics.get(group.metric.name) is not None:
                del layer.metrics[group.metric.name]
                if group.metric.uses_steps:
                    # The next step opens it again.
                    layer.metric_calls = None

    # ------------------------------------------------------------------ at a logging point

    def begin_measure(self, layers: LayerTable) -> list[Group]:
        """Reset the gauges of the last logging point, and return the groups that are due at this one.

        Args:
            layers: All layers.
        """
        for group in self._groups:
            layers.clear_gauges(slice(group.gauges.start, group.bins.stop))
        steps = self._schedule.steps
        due = [
            group
            for group in self._groups
            if group.gauges.start < group.bins.stop
            and steps - self._measured.get(group.metric.name, -group.every) >= group.every
        ]
        has_new_counts, self.has_new_counts = self.has_new_counts, False
        return due if has_new_counts else []

    def measure(self, layer: Layer, due: Sequence[Group]) -> None:
        """Compute the gauges of a layer.

        Args:
            layer: A layer of the last step, with its current codes.
            due: The groups that ``begin_measure`` returned.
        """
        assert layer.row is not None
        weight = self._view_between_steps(layer, due)
        for group in due:
            metric = (layer.metrics or {}).get(group.metric.name)
            if metric is not None:
                gauges, bins = layer.row.metric_total(group.gauges).view(-1, 2), layer.row.metric_total(group.bins)
                self._call_between_steps(layer, group, metric, metric.gauge, weight, gauges, bins)

    def _call_between_steps(
        self, layer: Layer, group: Group, metric: LayerMetric, action: Callable[..., None], *args: Any
    ) -> None:
        """Call a method of a group that may replace the tensors of its state."""
        state = metric.tensors
        self._call(layer, group, action, *args)
        if any(tensor is not state.get(name) for name, tensor in metric.tensors.items()):
            # The kernel must not go on with the old tensors.
            self.changes += 1

    def _view_between_steps(self, layer: Layer, groups: Sequence[Group]) -> Weight:
        """Return a weight between two steps in the form that these metric groups receive."""
        assert layer.tracked is not None
        weight, quantizer = layer.tracked.unwrapped()
        seen = layer.view_for_metrics(weight, quantizer)
        seen = seen._replace(backend=self._backend, scale_codes=layer.scale_codes)
        member = layer.member
        has_scale = self.uses_steps or (member is not None and member.keeps_scale and seen.scale is not None)
        needs_scale = layer.scale_codes is None or any(group.metric.reads_scale for group in groups)
        if has_scale or not needs_scale or not isinstance(quantizer, ElementwiseQuantizer):
            return seen
        scale = None if member is None else member.computed_scale(self._backend)
        if scale is None:
            encoding = functional.Encoding(quantizer, self._scratch, self._backend, layer.statistic)
            scale = encoding.scale(seen.values)
        return seen._replace(scale=scale)

    def mark_measured(self, due: Sequence[Group]) -> None:
        """Note that the gauges of these groups are computed at this logging point."""
        self._measured.update({group.metric.name: self._schedule.steps for group in due})

    def _call(self, layer: Layer, group: Group, action: Callable[..., None], *args: Any) -> None:
        """Call a method of a group. If it fails, warn once, and stop running the group for this layer."""
        try:
            action(*args)
        except Exception as error:
            assert layer.metrics is not None
            layer.metrics[group.metric.name] = None
            self._set_metric_calls(layer)
            self._notices.add(
                f"{layer.name!r} no longer has numbers of {group.metric.name!r}, everything else continues: "
                f"{type(error).__name__}: {error}"
            )


def _code_kind(codes: Tensor, quantizer: Quantizer) -> tuple[torch.Size, torch.dtype]:
    grouped = quantizer.grouped(codes) if isinstance(quantizer, ElementwiseQuantizer) else codes
    return grouped.shape, grouped.dtype


def _is_state_of(codes: Tensor, kept: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a kernel can access a tensor as a state of the codes. ``dtype`` is as in an expression."""
    if kept.device != codes.device or not kept.is_contiguous():
        return False
    if dtype is torch.bool:
        return kept.dtype is torch.uint8 and 8 * kept.numel() >= codes.numel()
    return kept.dtype is (dtype or codes.dtype) and kept.numel() == codes.numel()


def _view(layer: Layer) -> Weight:
    assert layer.tracked is not None
    return layer.view_for_metrics(*layer.tracked.unwrapped())


def _take_sample(layer: Layer, metric: LayerMetric) -> None:
    metric.before(_view(layer))


def _note_scale(layer: Layer, metric: LayerMetric) -> None:
    assert metric.sample is not None
    metric.sample.scale = layer.scale_of_codes


def _compare_sample(layer: Layer, metric: LayerMetric, samples: SampledLayers) -> None:
    assert metric.sample is not None
    samples.restore_scale_before(layer, metric.sample)
    metric.after(_view(layer), _sums(layer, samples.group))


def _sums(layer: Layer, group: Group) -> Tensor:
    assert layer.row is not None
    return layer.row.metric_step(group.sums).view(-1, 2)
