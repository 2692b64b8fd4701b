"""Samples of weights that are counted together: a kernel compares them all with those before the step, in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from weightflip import kernels
from weightflip.counting import sample_proof
from weightflip.counting.batch import Member
from weightflip.counting.layer import CodeState, Layer
from weightflip.counting.observations import KeptScale
from weightflip.metrics import LayerMetric
from weightflip.metrics.columns import Group
from weightflip.quantizers.protocol import ElementwiseQuantizer


class SampledLayers:
    """The layers for which a kernel does what ``before`` and ``after`` of a metric group would do.

    The sample after a step is that before the next one if all codes are kept, which means that no weight was written in
    between.

    After a fault in one of ``before``, ``begin_count`` and ``after``, :meth:`stop_using_kernel` and another call of the
    same method continue with the group's own methods, from the layers that the kernel has not compared yet.

    Args:
        group: The group.
        backend: As in :func:`weightflip.kernels.check_backend`.
    """

    def __init__(self, group: Group, backend: str) -> None:
        self.group, self._backend = group, backend
        self._uses_kernel = True
        self.release()

    def release(self) -> None:
        """Release the codes of all layers. The next step takes them again."""
        self.layers: list[Layer] = []
        """The layers whose samples the kernel compares."""
        self._others: list[Layer] = []
        self._one_by_one: list[Layer] = []
        self._plan: tuple[list[Layer], list[Member | None], int] | None = None
        self._calls: list[_Call] = []
        self._moving: list[tuple[_Call, list[int], _Scales]] = []
        """The calls that this step still has to make: the indices of their layers, and the scales before the step."""
        self._scales_before: dict[Layer, tuple[_Call, int, _Scales]] = {}
        """Where to find the scale before the step, for layers that a kernel should have compared."""
        self._taken_after: int | None = None
        """The step after which the samples of all layers were taken last."""

    def stop_using_kernel(self) -> None:
        """From now on, let the caller compare all samples, also those of this step that are not compared yet."""
        self._uses_kernel = False
        self.layers, self._calls, self._plan = [], [], None
        moving, self._moving = self._moving, []
        self._scales_before = {call.layers[at]: (call, at, old) for call, indices, old in moving for at in indices}
        self._one_by_one += self._scales_before

    def __getstate__(self) -> tuple[Group, str, bool]:
        return self.group, self._backend, self._uses_kernel

    def __setstate__(self, state: tuple[Group, str, bool]) -> None:
        self.group, self._backend, self._uses_kernel = state
        self.release()

    # ------------------------------------------------------------------ in a step

    def before(self, layers: Sequence[Layer], changes: int, steps: int) -> list[Layer]:
        """Take the samples before a step, unless they are the same as after the last one.

        Args:
            layers: All layers of the step.
            changes: Increases whenever the group starts or stops running for a layer.
            steps: The number of steps so far.

        Returns:
            The layers for which ``before`` must be called.
        """
        self._follow(layers, changes)
        if self._taken_after != steps or any(layer.state is not CodeState.KEPT for layer in self.layers):
            for call in self._calls:
                call.samples.take()
        return self._others

    def begin_count(self, layers: Sequence[Layer], places: int) -> list[Layer]:
        """Note the scales of the codes before they are replaced.

        Args:
            layers: The layers that are counted together in this step.
            places: Increases whenever the scales of a layer are kept in another place.

        Returns:
            Those of these layers whose scale the caller must note in the sample.
        """
        self._moving, self._one_by_one, self._scales_before = [], [], {}
        counted = None if layers == self.layers else set(layers)
        for call in self._calls:
            indices = [i for i, layer in enumerate(call.layers) if counted is None or layer in counted]
            self._moving.append((call, indices, call.scales(places)))
        if counted is not None:
            self._one_by_one = list(counted.difference(self.layers))
        return list(self._one_by_one)

    def after(self, steps: int) -> list[Layer]:
        """Compare the samples of the layers that were counted together with those before the step.

        Returns:
            Those of these layers for which ``after`` must be called.
        """
        self._taken_after = None
        number = 0
        while self._moving:
            call, indices, old = self._moving[0]
            counted = [index for index in indices if call.layers[index].state is not CodeState.FAILED]
            call.move(np.array(counted, dtype=np.int64), old, self.group.sums)
            del self._moving[0]
            number += len(counted)
        if number == len(self.layers):
            self._taken_after = steps + 1
        return [layer for layer in self._one_by_one if layer.state is not CodeState.FAILED]

    def restore_scale_before(self, layer: Layer, sample: kernels.Sample) -> None:
        """Set the scale before the step in a sample that a kernel should have compared, before ``after`` is called."""
        if layer in self._scales_before:
            call, index, scales = self._scales_before[layer]
            sample.scale = call.scale_of_layer(index, scales)

    # ------------------------------------------------------------------ joining

    def _follow(self, layers: Sequence[Layer], changes: int) -> None:
        plan = list(layers), [layer.member for layer in layers], changes
        if plan == self._plan:
            return
        self.release()
        kinds: dict[tuple[torch.dtype, torch.dtype], list[tuple[Layer, kernels.SampledWeight]]] = {}
        name = self.group.metric.name
        for layer in layers:
            metric = (layer.metrics or {}).get(name)
            if metric is None or metric.sample is None:
                continue
            try:
                weight = self._find(layer, metric)
            except Exception:
                # If the group's own methods fail, too, only this layer is affected.
                weight = None
            if weight is None:
                self._others.append(layer)
            else:
                self.layers.append(layer)
                sample = metric.sample
                kinds.setdefault((sample.weights.dtype, sample.codes.dtype), []).append((layer, weight))
        for of_kind in kinds.values():
            kernel = _kernel(self._backend, of_kind[0][0].member)
            assert kernel is not None
            self._calls.append(_Call([layer for layer, _ in of_kind], kernel([weight for _, weight in of_kind])))
        # Last, so that after an interrupt this is done again.
        self._plan = plan

    def _find(self, layer: Layer, metric: LayerMetric) -> kernels.SampledWeight | None:
        """Return a weight as the kernel's argument; None if no kernel does the same as the group's methods."""
        member, row = layer.member, layer.row
        kernel = _kernel(self._backend, member) if self._uses_kernel else None
        if kernel is None or member is None or row is None or member.width:
            return None
        quantizer = member.quantizer
        if not isinstance(quantizer, ElementwiseQuantizer) or (member.group and not member.keeps_scale):
            return None
        kind = sample_proof.Kind(quantizer, member.dtype, member.codes.dtype)
        numbers = sample_proof.numbers_if_usable(kernel, self.group.metric, kind)
        if numbers is None:
            return None
        assert metric.sample is not None
        if metric.sample.weights.dtype is not member.dtype:
            # The codes of a converted weight have the same dtype, so that the group is not opened again.
            metric.sample.weights = metric.sample.weights.to(member.dtype)
        group = 0 if member.group >= member.numel else member.group
        divides = quantizer.value_rule() == "divides" if member.group else None
        codes = member.codes.data_ptr()
        return kernels.SampledWeight(member.address, codes, metric.sample, group, numbers, divides, row.index)


def _kernel(backend: str, member: Member | None) -> type[kernels.Samples] | None:
    run = None if member is None else kernels.run(backend, member.codes.device)
    return None if run is None else run.samples


class _Scales(NamedTuple):
    """The scales of all layers of a call at one moment.

    Attributes:
        addresses: The address of each layer's scales, as numbers are multiplied or divided by them.
        tensors: The tensors that they are in.
        held: The scales as the quantizer returned them, one tensor for each place where scales are kept.
        in_parts: The same for the layers whose scales are in several places, by index.
    """

    addresses: kernels.Addresses
    tensors: list[Tensor]
    held: list[Tensor]
    in_parts: dict[int, Tensor]


class _Call:
    """Layers whose samples are compared in one call."""

    def __init__(self, layers: list[Layer], samples: kernels.Samples) -> None:
        self.layers, self.samples = layers, samples
        self._places: int | None = None
        self._value_scales: dict[int, tuple[Tensor, Tensor]] = {}

    def scales(self, places: int | None = None) -> _Scales:
        """Return the current scales.

        Args:
            places: As in :meth:`SampledLayers.begin_count`; None if it has not changed.
        """
        if places is not None and places != self._places:
            self._find_places()
            self._places = places
        held = [self._held_scale(index) for index in range(len(self._held))]
        tensors = [self._value_scale(index, scale) for index, scale in enumerate(held)]
        addresses = np.array([0, *(tensor.data_ptr() for tensor in tensors)], dtype=np.int64)
        of_layers = addresses[self._held_of] + self._offsets
        in_parts = {}
        for index, member in self._in_parts:
            scale = member.scale
            if scale is None:
                raise RuntimeError(f"expected the scale of the codes of {self.layers[index].name!r}, but there is none")
            in_parts[index] = scale
            tensor = sample_proof.value_scale(member.quantizer, scale)
            of_layers[index] = tensor.data_ptr()
            tensors.append(tensor)
        return _Scales(of_layers, tensors, held, in_parts)

    def scale_of_layer(self, index: int, scales: _Scales) -> Tensor | None:
        """Return the scale of one layer as its quantizer returned it; None if it has none."""
        member = self.layers[index].member
        if index in scales.in_parts or member is None or not member.group:
            return scales.in_parts.get(index)
        first = int(self._offsets[index]) // 4
        of_layer = scales.held[int(self._held_of[index]) - 1][first:][: math.prod(member.scale_shape)]
        return of_layer.view(member.scale_shape)

    def _find_places(self) -> None:
        """Find where the scales of each layer are kept."""
        self._held: list[tuple[KeptScale, Member]] = []
        self._in_parts: list[tuple[int, Member]] = []
        self._value_scales = {}
        known: dict[KeptScale, int] = {}
        held_of, offsets = [0] * len(self.layers), [0] * len(self.layers)
        for index, layer in enumerate(self.layers):
            member = layer.member
            assert member is not None
            if not member.group:
                continue
            if len(member.scale_slices) != 1:
                self._in_parts.append((index, member))
                continue
            held, first, _ = member.scale_slices[0]
            if held not in known:
                known[held] = len(self._held)
                self._held.append((held, member))
            # The first address is that of layers without a scale.
            held_of[index], offsets[index] = known[held] + 1, 4 * first
        self._held_of, self._offsets = np.array(held_of), np.array(offsets, dtype=np.int64)

    def _held_scale(self, index: int) -> Tensor:
        scale = self._held[index][0].scale
        if scale is None:
            raise RuntimeError("expected the scales of all codes, but there are none")
        return scale

    def _value_scale(self, index: int, scale: Tensor) -> Tensor:
        """Return scales as numbers are multiplied or divided by them. They are computed once in each step."""
        known = self._value_scales.get(index)
        if known is None or known[0] is not scale:
            found = sample_proof.value_scale(self._held[index][1].quantizer, scale)
            known = self._value_scales[index] = scale, found
        return known[1]

    def move(self, indices: kernels.Addresses, old: _Scales, columns: slice) -> None:
        """Compare the samples of some layers, and add to the sums of the step.

        Args:
            indices: The layers.
            old: The scales before the step.
            columns: The columns of the sums.
        """
        row = self.layers[0].row
        assert row is not None
        assert row.ledger.metric_step is not None
        new = self.scales()
        self.samples.move(indices, old.addresses, new.addresses, row.ledger.metric_step[:, columns])
