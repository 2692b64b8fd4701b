"""The route that gathers many layers into one tensor, and encodes and counts them in plain torch."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from weightflip import kernels
from weightflip.counting.layer import Layer
from weightflip.counting.ledger import COLUMNS, COUNTED, SCALE_CHANGES, SCALE_STEPS, WEIGHT_STEPS
from weightflip.counting.routes import ElementwiseRoute, Gradients
from weightflip.quantizers.protocol import ElementwiseQuantizer, Quantizer

logger = logging.getLogger("weightflip")

# On these devices, a call costs less than extra passes over memory, which slices that fit the cache avoid.
_EXCLUDED_DEVICES = frozenset({"cpu"})
_MAX_SCRATCH_BYTES = 1 << 26


class _Kind(NamedTuple):
    """The key by which layers are gathered. The same key and rounding of quantizers means the same codes."""

    quantizer: Hashable
    rounding: object
    format: object
    weight: torch.dtype
    codes: torch.dtype
    device: torch.device
    group: int | None


class GatheredRoute:
    """Small weights on a device where a call costs more than the work on such a weight.

    A layer is counted on its own in a step in which its gradient or weight has another layout. If counting a bucket
    fails, its layers are counted one by one from then on.

    Args:
        one_by_one: Counts layers one by one.
        scratch: Provides temporary buffers.
        with_updates: Whether updates are counted.
        is_open: Whether the route accepts layers; False if metric groups run in steps.
    """

    counts_together: ClassVar[bool] = True

    def __init__(
        self, one_by_one: ElementwiseRoute, scratch: kernels.ScratchPool, with_updates: bool, is_open: bool
    ) -> None:
        self._one_by_one, self._scratch = one_by_one, scratch
        self._with_updates, self._is_open = with_updates, is_open
        self._kinds: dict[str, tuple[_Kind, torch.Size]] = {}
        self._ungathered: set[str] = set()
        self.buckets: list[Bucket] = []
        """The buckets of the last step."""

    def release(self) -> None:
        """As in :class:`Route`."""
        self.buckets = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "buckets": [], "_kinds": {}}

    def accepts(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> bool:
        assert layer.tracked is not None
        if (
            not self._is_open
            or weight.device.type in _EXCLUDED_DEVICES
            or not isinstance(quantizer, ElementwiseQuantizer)
        ):
            return False
        can_scale = quantizer.only_needs_amax or quantizer.is_two_level
        if quantizer.tile is not None and quantizer.tile[0] > 1:
            return False
        if not can_scale or quantizer.scope is None or not layer.tracked.is_batchable:
            return False
        if layer.tracked.quantizer is not quantizer:
            return False
        if type(weight) is not Tensor or not weight.is_floating_point() or not weight.is_contiguous():
            return False
        if not kernels.is_small(weight.numel(), _group(quantizer, weight)):
            return False
        kind = _Kind(
            quantizer.key,
            quantizer.rounding(weight),
            quantizer.format,
            weight.dtype,
            quantizer.code_dtype(weight),
            weight.device,
            quantizer.group,
        )
        if self._kinds.get(layer.name) != (kind, weight.shape):
            self.release()
            self._kinds[layer.name] = kind, weight.shape
            self._ungathered.discard(layer.name)
        return True

    def encode(self, layers: Sequence[Layer]) -> None:
        ungathered = [layer for layer in layers if layer.name in self._ungathered]
        for bucket in self._buckets_of(
            [layer for layer in layers if layer.name not in self._ungathered], have_codes=False
        ):
            try:
                bucket.encode(self._scratch)
            except Exception as error:
                self._stop_gathering(bucket, error)
                ungathered += bucket.layers
            else:
                for layer in bucket.layers:
                    assert layer.tracked is not None
                    layer.mark_encoded(layer.tracked.parameter)
        self._one_by_one.encode(ungathered)

    def count(self, layers: Sequence[Layer], gradients: Gradients, valid: Tensor | None) -> None:
        updates: dict[str, Tensor | None] = {}
        gathered, ungathered, changed = [], [], []
        for layer in layers:
            parameter = layer.tracked.parameter  # type: ignore[union-attr]
            update = None
            if self._with_updates:
                # As in OneByOne, which says why.
                update = gradients.get(layer.name) if parameter.grad is None else parameter.grad
            if not _is_same_kind(layer, parameter):
                changed.append(layer)
            elif layer.name not in self._ungathered and (update is None or _has_same_layout(update, parameter)):
                updates[layer.name] = update
                gathered.append(layer)
            else:
                ungathered.append(layer)
        for bucket in self._buckets_of(gathered, have_codes=True):
            try:
                bucket.count([updates[layer.name] for layer in bucket.layers], self._scratch)
            except Exception as error:
                self._stop_gathering(bucket, error)
                ungathered += bucket.layers
            else:
                for layer in bucket.layers:
                    assert layer.tracked is not None
                    layer.mark_counted(layer.tracked.parameter)
        if self._scratch.nbytes > _MAX_SCRATCH_BYTES:
            # Leave the memory to the training between two steps.
            self._scratch.clear()
        self._one_by_one.count([*ungathered, *changed], gradients, valid)
        for layer in changed:
            # It may belong to another bucket now, or to none.
            layer.leave_route()

    def _buckets_of(self, layers: Sequence[Layer], *, have_codes: bool) -> list[Bucket]:
        """Return as few buckets as possible for the layers. Reuses the last buckets if the layers are the same."""
        held = {id(layer) for bucket in self.buckets for layer in bucket.layers}
        if held != {id(layer) for layer in layers} or not all(bucket.is_intact for bucket in self.buckets):
            self.release()
            self.buckets = list(self._gathered(layers, have_codes))
        return self.buckets

    def _gathered(self, layers: Sequence[Layer], have_codes: bool) -> Iterator[Bucket]:
        kinds: dict[_Kind, list[Layer]] = {}
        for layer in layers:
            kinds.setdefault(self._kinds[layer.name][0], []).append(layer)
        for kind, alike in kinds.items():
            parameters = [layer.tracked.parameter for layer in alike if layer.tracked]
            groups = [_group(_quantizer(layer), parameter) for layer, parameter in zip(alike, parameters, strict=True)]
            for indices in kernels.pack([parameter.numel() for parameter in parameters], groups):
                yield Bucket([alike[index] for index in indices], [groups[i] for i in indices], kind, have_codes)

    def _stop_gathering(self, bucket: Bucket, error: Exception) -> None:
        """Count layers one by one from now on, so that a failure of one does not affect the others."""
        logger.info("%d weights are counted one by one: %s: %s", len(bucket.layers), type(error).__name__, error)
        self._ungathered.update(layer.name for layer in bucket.layers)


class Bucket:
    """Layers of one kind, with their codes in one tensor."""

    def __init__(self, layers: Sequence[Layer], groups: Sequence[int], kind: _Kind, have_codes: bool) -> None:
        self.layers = list(layers)
        self._quantizer, self._dtype = _quantizer(layers[0]), kind.weight
        shapes = [layer.tracked.parameter.shape for layer in layers]  # type: ignore[union-attr]
        numels = [shape.numel() for shape in shapes]
        width = kind.group if self._quantizer.is_two_level else None
        self._layout = kernels.Layout(numels, groups, kind.device, width)
        if have_codes:
            self._codes = self._layout.gather([layer.codes for layer in layers])  # type: ignore[misc]
        else:
            self._codes = torch.empty(sum(numels), dtype=kind.codes, device=kind.device)
        self._views = [part.view(shape) for part, shape in zip(torch.split(self._codes, numels), shapes, strict=True)]
        self._scale_codes: Tensor | None = None
        scales = [0] * len(layers)
        if kind.group is not None:
            scales = [numel // kind.group for numel in numels]
            if have_codes:
                self._scale_codes = self._layout.gather([layer.scale_codes for layer in layers])  # type: ignore[misc]
        for layer, view in zip(layers, self._views, strict=True):
            layer.codes = view
        rows = [layer.row for layer in layers if layer.row is not None]
        self._ledger = rows[0].ledger
        self._rows = kernels.upload(torch.tensor([row.index for row in rows], device="cpu"), kind.device)
        known = torch.zeros(len(layers), COLUMNS, dtype=torch.int64, device="cpu")
        known[:, WEIGHT_STEPS] = torch.tensor(numels, device="cpu")
        known[:, SCALE_STEPS] = torch.tensor(scales, device="cpu")
        self._known = kernels.upload(known, kind.device)
        self._scales = scales
        if self._scale_codes is not None:
            self._assign_scale_codes()

    @property
    def is_intact(self) -> bool:
        """Whether the codes of all layers are still those of this bucket."""
        return all(layer.codes is view for layer, view in zip(self.layers, self._views, strict=True))

    def encode(self, scratch: kernels.ScratchPool) -> None:
        """Encode the current weights."""
        scale = self._encode_into(self._codes, scratch)
        if self._quantizer.group is None or scale is None:
            for layer in self.layers:
                layer.scale_codes = layer.scale = None
        else:
            self._scale_codes = self._quantizer.scale_codes(scale).flatten()
            self._assign_scale_codes()

    def count(self, updates: Sequence[Tensor | None], scratch: kernels.ScratchPool) -> None:
        """Count a step, and keep the new codes. Writes results only after all of them are computed."""
        layout, codes = self._layout, self._codes
        new = scratch.flat("new", codes.numel(), codes.dtype, codes.device)
        scale = self._encode_into(new, scratch)
        has_updates = any(update is not None for update in updates)
        flags = scratch.flat("flags", 3 * codes.numel(), torch.bool, codes.device).view(3, -1)
        flipped, updated, stalled = flags
        torch.ne(new, codes, out=flipped)
        if has_updates:
            updated.copy_(layout.gather(self._fill_missing(updates)))
            torch.gt(updated, flipped, out=stalled)
        new_scale_codes = has_changed = None
        if self._scale_codes is not None:
            assert scale is not None
            new_scale_codes = self._quantizer.scale_codes(scale).flatten()
            has_changed = new_scale_codes != self._scale_codes
        rows = 3 if has_updates else 1
        found = layout.sums(flags[:rows], has_changed)
        step = self._ledger.step
        step.index_add_(0, self._rows, self._known)
        step[:, COUNTED][:, :rows].index_add_(0, self._rows, found[:rows].T)
        codes.copy_(new)
        if self._scale_codes is not None and new_scale_codes is not None:
            step[:, SCALE_CHANGES].index_add_(0, self._rows, found[rows])
            self._scale_codes.copy_(new_scale_codes)

    def _encode_into(self, out: Tensor, scratch: kernels.ScratchPool) -> Tensor | None:
        """Write the current codes to ``out``, and return the scales."""
        layout, quantizer = self._layout, self._quantizer
        chunks = layout.chunks(layout.gather([layer.tracked.parameter for layer in self.layers]))  # type: ignore[union-attr]
        if quantizer.scope == "element":
            quantizer.encode_into(chunks, None, layout.chunks(out), scratch)
            return None
        scales, magnitudes = layout.scales_of_chunks(), layout.magnitudes(chunks)
        scale = layout.largest(magnitudes, scales)
        if not quantizer.is_two_level:
            scale = quantizer.scale_of(scale)
        of_chunks = scale if scales is None else scale.index_select(0, scales)
        if quantizer.is_two_level:
            scale = of_chunks = quantizer.scale_of_groups(magnitudes, of_chunks)
        quantizer.encode_into(chunks, of_chunks, layout.chunks(out), scratch)
        return scale

    def _fill_missing(self, updates: Sequence[Tensor | None]) -> list[Tensor]:
        """Replace missing updates by zeros."""
        numels = self._layout.numels
        missing = [numel for numel, update in zip(numels, updates, strict=True) if update is None]
        zeros = self._codes.new_zeros(max(missing, default=0), dtype=self._dtype)
        return [zeros[:numel] if update is None else update for numel, update in zip(numels, updates, strict=True)]

    def _assign_scale_codes(self) -> None:
        assert self._scale_codes is not None
        group = self._quantizer.group
        assert group is not None
        for layer, view, part in zip(
            self.layers, self._views, torch.split(self._scale_codes, self._scales), strict=True
        ):
            layer.scale_codes, layer.scale = part.view(*view.shape[:-1], view.shape[-1] // group, 1), None


def _quantizer(layer: Layer) -> ElementwiseQuantizer:
    assert layer.tracked is not None
    quantizer = layer.tracked.quantizer
    assert isinstance(quantizer, ElementwiseQuantizer)
    return quantizer


def _group(quantizer: ElementwiseQuantizer, weight: Tensor) -> int:
    """Return the number of adjacent weights that share a scale; all of them if there is no scale."""
    if quantizer.scope == "group":
        return quantizer.grouped(weight).shape[-1]
    return weight.shape[-1] if quantizer.scope == "row" and weight.ndim else weight.numel()


def _is_same_kind(layer: Layer, parameter: Tensor) -> bool:
    """Whether a weight has the same shape, dtype and device as when its codes were made. It may have moved."""
    stamp, codes = layer.stamp, layer.codes
    assert codes is not None
    return (
        stamp is not None
        and parameter.shape == stamp.shape
        and parameter.dtype is stamp.dtype
        and parameter.device == codes.device
        and parameter.is_contiguous()
    )


def _has_same_layout(update: Tensor, parameter: Tensor) -> bool:
    return (
        type(update) is Tensor
        and update.layout is torch.strided
        and update.shape == parameter.shape
        and update.device == parameter.device
    )
