"""Samples of weights that are counted together: a kernel compares them all with those before the step, in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weightflip import kernels
from weightflip.counting.batch import Member
from weightflip.counting.layer import CodeState, Layer
from weightflip.counting.observations import KeptScale
from weightflip.metrics import LayerMetric, Metric, Weight
from weightflip.metrics.columns import Group
from weightflip.quantizers.protocol import ElementwiseQuantizer

logger = logging.getLogger("weightflip")


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
        self._alone: list[Layer] = []
        self._plan: tuple[list[Layer], list[Member | None], int] | None = None
        self._calls: list[_Call] = []
        self._moving: list[tuple[_Call, kernels.Addresses, _Addresses]] = []
        self._taken_after: int | None = None
        """The step after which the samples of all layers were taken last."""

    def __getstate__(self) -> dict[str, Any]:
        return {"group": self.group, "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state.values())  # type: ignore[misc]

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
        counted, name = set(layers), self.group.metric.name
        self._moving, self._alone = [], []
        for call in self._calls:
            indices = [index for index, layer in enumerate(call.layers) if layer in counted]
            self._moving.append((call, np.array(indices, dtype=np.int64), call.scale_addresses(places)))
        if sum(len(indices) for _, indices, _ in self._moving) < len(layers):
            for layer in counted.difference(self.layers):
                metric = (layer.metrics or {}).get(name)
                if metric is not None and metric.sample is not None:
                    metric.sample.scale = layer.scale_of_codes
                    self._alone.append(layer)

    def after(self, steps: int) -> list[Layer]:
        """Compare the samples of the layers that were counted together with those before the step.

        Returns:
            Those of these layers for which ``after`` must be called.
        """
        self._taken_after = None
        moving, self._moving = self._moving, []
        are_all = bool(moving)
        for call, indices, old in moving:
            is_counted = [call.layers[index].state is not CodeState.FAILED for index in indices]
            are_all = are_all and all(is_counted) and len(indices) == len(call.layers)
            call.move(indices[is_counted], old, self.group.sums)
        if are_all:
            self._taken_after = steps + 1
        return [layer for layer in self._alone if layer.state is not CodeState.FAILED]

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
            weight = self._find(layer, metric)
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
        if not _is_usable(kernel, self.group.metric, _Kind(quantizer, member.dtype, member.codes.dtype)):
            return None
        assert metric.sample is not None
        group = 0 if member.group >= member.numel else member.group
        address, codes = member.address, member.codes.data_ptr()
        return _sampled(quantizer, address, codes, metric.sample, group, bool(member.group), row.index)


def _kernel(backend: str, member: Member | None) -> type[kernels.Samples] | None:
    run = None if member is None else kernels.run(backend, member.codes.device)
    return None if run is None else run.samples


def _sampled(
    quantizer: ElementwiseQuantizer,
    address: int,
    codes: int,
    sample: kernels.Sample,
    group: int,
    is_scaled: bool,
    row: int,
) -> kernels.SampledWeight:
    """Return the kernel's argument for a weight.

    Size: the parameters are independent numbers.
    """
    limits = torch.iinfo(sample.codes.dtype)
    known = torch.arange(limits.min, limits.max + 1, dtype=sample.codes.dtype, device="cpu")
    numbers = quantizer.values(known, None).contiguous()
    divides = quantizer.value_rule() == "divides" if is_scaled else None
    return kernels.SampledWeight(address, codes, sample, group, numbers, divides, row)


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
            assert member.scale is not None
            tensor = _value_scale(member, member.scale)
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
            known = self._scales[index] = held.scale, _value_scale(member, held.scale)
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


def _value_scale(member: Member, scale: Tensor) -> Tensor:
    quantizer: Any = member.quantizer
    found: Tensor = quantizer.value_scale(scale).reshape(-1).contiguous()
    if found.dtype is not torch.float32:
        raise TypeError(f"expected value_scale() of quantizer {quantizer.name!r} to be float32, got {found.dtype}")
    return found


# ---------------------------------------------------------------------- equal


class _Kind(NamedTuple):
    """What a kernel is tested for."""

    quantizer: ElementwiseQuantizer
    weight: torch.dtype
    codes: torch.dtype

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for quantizers that make the same values."""
        return type(self.quantizer), self.quantizer.name, self.weight, self.codes


_answers: dict[tuple[Any, ...], bool] = {}


def _is_usable(kernel: type[kernels.Samples], metric: Metric, kind: _Kind) -> bool:
    """Whether a kernel does the same as the methods of a metric group. The first call for a kind tests it."""
    key = kernel, type(metric), *kind.key
    if key not in _answers:
        _answers[key] = _passes_test(kernel, metric, kind)
    return _answers[key]


@torch.no_grad()
def _passes_test(kernel: type[kernels.Samples], metric: Metric, kind: _Kind) -> bool:
    fault, what = None, f"samples of {kind.quantizer.name} ({kind.weight}) for {metric.name!r}"
    try:
        if kind.quantizer.value_rule() is None or not kernel.can_do(kind.weight, kind.codes):
            return False
        # All weights, and a sample of more.
        for rows, is_finite in ((3, True), (3, False), (70, True), (70, False)):
            fault = fault or find_fault(kernel, metric, kind, rows, is_finite=is_finite)
    except Exception as error:
        fault = f"it raised {type(error).__name__}: {error}"
    if fault is not None:
        logger.warning("%s: the kernel is not used, plain torch compares them instead: %s", what, fault)
    else:
        logger.info("%s: equal", what)
    return fault is None


def find_fault(kernel: type[kernels.Samples], metric: Metric, kind: _Kind, rows: int, *, is_finite: bool) -> str | None:
    """Describe how a kernel's results differ from those of a metric group's own methods; None if they do not.

    Args:
        kernel: The kernel.
        metric: The group.
        kind: The format and the dtypes.
        rows: The number of rows of the weight.
        is_finite: Whether all weights are finite.
    """
    quantizer = kind.quantizer
    moments = [_moment(kind, rows, number, is_finite=is_finite) for number in range(3)]
    expected, found = (metric.open("weight", moments[0]) for _ in range(2))
    if expected is None or found is None:
        return None
    assert found.sample is not None
    weight, codes = moments[0].values.clone(), moments[0].codes.clone()
    scales = [None if moment.scale is None else quantizer.value_scale(moment.scale).reshape(-1) for moment in moments]
    group = 0 if scales[0] is None or len(scales[0]) == 1 else codes.numel() // len(scales[0])
    is_scaled = scales[0] is not None
    addresses = [np.array([0 if scale is None else scale.contiguous().data_ptr()]) for scale in scales]
    samples = kernel([_sampled(quantizer, weight.data_ptr(), codes.data_ptr(), found.sample, group, is_scaled, 0)])
    samples.take()
    for before, after, old, new in zip(moments, moments[1:], addresses, addresses[1:], strict=False):
        sums = torch.zeros(2, 4, dtype=torch.float64, device="cpu")
        expected.before(before)
        expected.after(after, sums[0].view(2, 2))
        weight.copy_(after.values)
        codes.copy_(after.codes)
        samples.move(np.zeros(1, dtype=np.int64), old, new, sums[1:])
        if not torch.equal(*sums):
            return f"its sums are {sums[1].tolist()}, those of plain torch {sums[0].tolist()}"
    differ = [name for name, state in expected.tensors.items() if not torch.equal(state, found.tensors[name])]
    return f"{differ} differ" if differ else None


def _moment(kind: _Kind, rows: int, number: int, *, is_finite: bool) -> Weight:
    """Return a weight with numbers of many magnitudes; others for another number."""
    quantizer = kind.quantizer
    columns = 10 * quantizer.group if quantizer.group else 331
    numbers = torch.arange(rows * columns, device="cpu").mul_(7919).remainder_(100003).sub_(50001).double()
    numbers.mul_(torch.exp2(torch.arange(len(numbers), device="cpu") % 23 - 20.0)).mul_(1e-5)
    # Some move by more than a cell, some by less, and some not at all.
    numbers.mul_(1 + number * torch.tensor([0.3, 0.004, 0.0], device="cpu").repeat(len(numbers))[: len(numbers)])
    if not is_finite:
        for at, value in ((5, torch.nan), (columns + 7, torch.inf), (2 * columns - 9, -torch.inf)):
            numbers[at : at + number + 1] = value
    weight = numbers.view(rows, columns).to(kind.weight)
    codes = quantizer.encode(weight)
    return Weight(quantizer.grouped(weight), quantizer.grouped(codes.ordinals), codes.scale, quantizer)
