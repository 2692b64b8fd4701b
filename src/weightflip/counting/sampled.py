"""Samples of weights that are counted together: a kernel compares them all with those before the step, in one call."""

from __future__ import annotations

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

    Args:
        group: The group.
        backend: As in :func:`weightflip.kernels.check_backend`.
    """

    def __init__(self, group: Group, backend: str) -> None:
        self.group, self._backend = group, backend
        self.release()

    def release(self) -> None:
        """Release the codes of all layers. The next step takes them again."""
        self.layers: list[Layer] = []
        """The layers whose samples the kernel compares."""
        self._others: list[Layer] = []
        self._one_by_one: list[Layer] = []
        self._plan: tuple[list[Layer], list[Member | None], int] | None = None
        self._calls: list[_Call] = []
        self._moving: list[tuple[_Call, list[int], _Addresses]] = []
        self._taken_after: int | None = None
        """The step after which the samples of all layers were taken last."""

    def __getstate__(self) -> tuple[Group, str]:
        return self.group, self._backend

    def __setstate__(self, state: tuple[Group, str]) -> None:
        self.group, self._backend = state
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

    def begin_count(self, layers: Sequence[Layer], places: int) -> None:
        """Note the scales of the codes before they are replaced.

        Args:
            layers: The layers that are counted together in this step.
            places: Increases whenever the scales of a layer are kept in another place.
        """
        self._moving, self._one_by_one = [], []
        counted = None if layers == self.layers else set(layers)
        for call in self._calls:
            indices = [i for i, layer in enumerate(call.layers) if counted is None or layer in counted]
            self._moving.append((call, indices, call.scale_addresses(places)))
        for layer in () if counted is None else counted.difference(self.layers):
            metric = (layer.metrics or {}).get(self.group.metric.name)
            if metric is not None and metric.sample is not None:
                metric.sample.scale = layer.scale_of_codes
                self._one_by_one.append(layer)

    def after(self, steps: int) -> list[Layer]:
        """Compare the samples of the layers that were counted together with those before the step.

        Returns:
            Those of these layers for which ``after`` must be called.
        """
        self._taken_after = None
        number = 0
        moving, self._moving = self._moving, []
        for call, indices, old in moving:
            counted = [index for index in indices if call.layers[index].state is not CodeState.FAILED]
            call.move(np.array(counted, dtype=np.int64), old, self.group.sums)
            number += len(counted)
        if number == len(self.layers):
            self._taken_after = steps + 1
        return [layer for layer in self._one_by_one if layer.state is not CodeState.FAILED]

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
        kernel = _kernel(self._backend, member)
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


class _Addresses(NamedTuple):
    """The address of each layer's scales, and the tensors that they are in."""

    of_layers: kernels.Addresses
    tensors: list[Tensor]


class _Call:
    """Layers whose samples are compared in one call."""

    def __init__(self, layers: list[Layer], samples: kernels.Samples) -> None:
        self.layers, self.samples = layers, samples
        self._places: int | None = None
        self._scales: dict[int, tuple[Tensor, Tensor]] = {}

    def scale_addresses(self, places: int | None = None) -> _Addresses:
        """Return the addresses of the current scales.

        Args:
            places: As in :meth:`SampledLayers.begin_count`; None if it has not changed.
        """
        if places is not None and places != self._places:
            self._find_places()
            self._places = places
        tensors = [self._scale_of(index) for index in range(len(self._held))]
        addresses = np.array([0, *(tensor.data_ptr() for tensor in tensors)], dtype=np.int64)
        of_layers = addresses[self._held_of] + self._offsets
        for index, member in self._in_parts:
            if member.scale is None:
                raise RuntimeError(f"expected the scale of the codes of {self.layers[index].name!r}, but there is none")
            tensor = sample_proof.value_scale(member.quantizer, member.scale)
            of_layers[index] = tensor.data_ptr()
            tensors.append(tensor)
        return _Addresses(of_layers, tensors)

    def _find_places(self) -> None:
        """Find where the scales of each layer are kept."""
        self._held: list[tuple[KeptScale, Member]] = []
        self._in_parts: list[tuple[int, Member]] = []
        self._scales = {}
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

    def _scale_of(self, index: int) -> Tensor:
        """Return the scales as numbers are multiplied or divided by them. They are computed once in each step."""
        held, member = self._held[index]
        if held.scale is None:
            raise RuntimeError("expected the scales of all codes, but there are none")
        known = self._scales.get(index)
        if known is None or known[0] is not held.scale:
            known = self._scales[index] = held.scale, sample_proof.value_scale(member.quantizer, held.scale)
        return known[1]

    def move(self, indices: kernels.Addresses, old: _Addresses, columns: slice) -> None:
        """Compare the samples of some layers, and add to the sums of the step.

        Args:
            indices: The layers.
            old: The scales before the step.
            columns: The columns of the sums.
        """
        row = self.layers[0].row
        assert row is not None
        assert row.ledger.metric_step is not None
        new = self.scale_addresses()
        self.samples.move(indices, old.of_layers, new.of_layers, row.ledger.metric_step[:, columns])
