"""The route that counts many layers in one kernel call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from weightflip import kernels
from weightflip.counting.batch import Batch, Member, make_member
from weightflip.counting.collected import CollectedLayers, members_of
from weightflip.counting.layer import Changes, Layer
from weightflip.counting.ledger import COLUMNS, COUNTED, SCALE_CHANGES, SCALE_STEPS, WEIGHT_STEPS
from weightflip.counting.metric_runner import MetricRunner
from weightflip.counting.observations import DueGroups
from weightflip.counting.routes import ElementwiseRoute, Gradients
from weightflip.counting.table import LayerTable
from weightflip.quantizers.protocol import ElementwiseQuantizer, Quantizer


class BatchedRoute:
    """Layers that a kernel encodes from addresses alone, all layers of a device at once.

    A layer is counted on its own in a step in which its gradient has another layout, its weight has moved, or a metric
    group needs its slices.

    Args:
        layers: Receives failures.
        one_by_one: Counts layers one by one.
        runner: The metric groups.
        backend: As in :func:`weightflip.kernels.check_backend`.
        with_updates: Whether updates are counted.
    """

    counts_together: ClassVar[bool] = True

    def __init__(
        self, layers: LayerTable, one_by_one: ElementwiseRoute, runner: MetricRunner, backend: str, with_updates: bool
    ) -> None:
        self._layers, self._one_by_one, self._runner = layers, one_by_one, runner
        self._backend, self._with_updates = backend, with_updates
        self._members: list[Member] = []
        self._batches: list[tuple[list[int], _LayerBatch]] = []
        self._observed = ObservedLayers(runner, layers.changes, backend, with_updates)
        self._collected = CollectedLayers(layers.changes)
        self._has_encoded = False
        self._places = 0
        """Increases whenever the scales of layers are kept in another place."""

    @property
    def batches(self) -> list[Batch]:
        """The batches of the last step, one per device."""
        return [layer_batch.batch for _, layer_batch in self._batches]

    def release(self) -> None:
        """As in :class:`Route`."""
        self._members, self._batches = [], []
        self._collected.release()
        self._observed.release()
        self._runner.release_codes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_members": [], "_batches": []}

    # ------------------------------------------------------------------ joining

    def accepts(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> bool:
        is_observed = self._runner.uses_steps
        if not isinstance(quantizer, ElementwiseQuantizer) or (is_observed and not self._observes_on(weight.device)):
            layer.member = None
            return False
        layer.allocate_codes(weight, quantizer.code_dtype(weight))
        return self._try_join_batch(layer, weight, quantizer)

    def _observes_on(self, device: torch.device) -> bool:
        run = kernels.run(self._backend, device)
        return run is not None and run.observes

    def _try_join_batch(self, layer: Layer, weight: Tensor, quantizer: ElementwiseQuantizer) -> bool:
        """Make a layer a member of a batch, with memory for its block scales, and return whether it can be one."""
        assert layer.tracked is not None
        assert layer.codes is not None
        member = layer.member
        if member is None or not member.matches(weight, quantizer, layer.codes):
            member = None
            if layer.tracked.is_batchable:
                member = make_member(
                    weight,
                    quantizer,
                    layer.codes,
                    self._backend,
                    with_updates=self._with_updates,
                    observed=self._runner.uses_steps,
                )
            if member is not None:
                member.keeps_scale = self._runner.keeps_scale(quantizer)
        layer.member = member
        if member is None:
            return False
        current, shared = layer.scale_codes, member.scale_codes
        if current is not None and shared is not None and current is not shared:
            shared.copy_(current)
        layer.scale_codes = shared
        return True

    # ------------------------------------------------------------------ encoding and counting

    def encode(self, layers: Sequence[Layer]) -> None:
        self._has_encoded = True
        for indices in _by_device(members := members_of(layers)):
            try:
                batch = Batch([members[index] for index in indices], with_updates=False, is_persistent=False)
                failed = dict(batch.advance([]).failed)
            except Exception as error:
                failed = dict.fromkeys(range(len(indices)), error)
            for position, index in enumerate(indices):
                layer = layers[index]
                if position in failed:
                    self._layers.fail(layer.name, failed[position])
                else:
                    assert layer.tracked is not None
                    layer.scale = None
                    layer.mark_encoded(layer.tracked.parameter)

    def count(self, layers: Sequence[Layer], gradients: Gradients, valid: Tensor | None) -> None:
        unbatched: Sequence[Layer] = []
        if self._runner.uses_steps and valid is not None and valid.device.type != "cpu":
            # If layers are counted one by one, the groups use the flag on its device, without a synchronization.
            layers, unbatched = [], layers
        elif self._runner.uses_steps:
            layers, unbatched = self._observed.split(layers)
        batched, excluded = self._split(layers, gradients)
        unbatched = [*unbatched, *excluded]
        # A skipped step changes nothing, so the groups are not called.
        due = self._runner.due if batched.layers and self._runner.uses_steps and (valid is None or bool(valid)) else ()
        self._count_batched(batched, due)
        self._count_one_by_one(unbatched, gradients, valid)

    def _split(self, layers: Sequence[Layer], gradients: Gradients) -> tuple[_Batched, list[Layer]]:
        """Return the layers that can be counted by their addresses, marked as counted, and the other layers."""
        collected = self._collected
        collected.collect(layers)
        members = collected.members
        parameters = [tracked.parameter for tracked in collected.tracked]
        updates, excluded = [0] * len(layers), set[int]()
        if self._with_updates:
            updates, excluded = self._find_updates(parameters, gradients)
        excluded |= self._find_moved(parameters)
        if not excluded and collected.are_kept and collected.stamps is not None:
            collected.stamps.update_versions(parameters)
            return _Batched(layers, members, updates), []
        at = [index for index in range(len(layers)) if index not in excluded]
        for index in at:
            stamp = layers[index].stamp
            assert stamp is not None
            layers[index].mark_counted_in_place(stamp, parameters[index]._version)
        batched = _Batched([layers[i] for i in at], [members[i] for i in at], [updates[i] for i in at])
        return batched, [layers[index] for index in sorted(excluded)]

    def _find_updates(self, parameters: Sequence[Tensor], gradients: Gradients) -> tuple[list[int], set[int]]:
        """Return the addresses of gradients, 0 without one, and the indices of those not laid out as their weight."""
        # As in OneByOne, which says why.
        found = [
            gradients.get(self._collected.layers[index].name) if (gradient := parameter.grad) is None else gradient
            for index, parameter in enumerate(parameters)
        ]
        updates = _addresses_if_compatible(found, self._collected.members)
        if 0 not in updates:
            return updates, set()
        pairs = enumerate(zip(updates, found, strict=True))
        return updates, {index for index, (update, gradient) in pairs if not update and gradient is not None}

    def _find_moved(self, parameters: Sequence[Tensor]) -> set[int]:
        """Return the indices of the collected layers whose weights are not in the memory of their codes."""
        if self._collected.stamps is not None:
            return self._collected.stamps.find_moved(parameters)
        return {
            index
            for index, (layer, parameter) in enumerate(zip(self._collected.layers, parameters, strict=True))
            if layer.stamp is None or not layer.stamp.is_in_place(parameter)
        }

    def _count_batched(self, batched: _Batched, due: tuple[str, ...]) -> None:
        layers, members, updates = batched
        if members != self._members or self._observed.pop_change():
            self._build(layers, members)
            self._places += 1
        elif self._has_encoded:
            self._places += 1
            for _, layer_batch in self._batches:
                layer_batch.batch.adopt_scales()
        self._has_encoded = False
        self._runner.begin_count(layers, self._places)
        for indices, layer_batch in self._batches:
            try:
                on_device = updates if len(indices) == len(updates) else [updates[index] for index in indices]
                failed = layer_batch.count(on_device, due)
            except Exception as error:
                failed = [(at, error) for at in range(len(indices))]
            for at, reason in failed:
                self._layers.fail(layers[indices[at]].name, reason)
        if self._runner.uses_steps:
            self._runner.after_all(layers)

    def _build(self, layers: Sequence[Layer], members: list[Member]) -> None:
        self._members, self._batches = [], []
        for layer in layers:
            if layer.scale is not None:
                # It was counted on its own in the last step.
                layer.member.set_scale(layer.scale)  # type: ignore[union-attr]
                layer.scale = None
        for indices in _by_device(members):
            device_layers = [layers[index] for index in indices]
            try:
                self._batches.append((indices, _LayerBatch(device_layers, self._with_updates)))
            except Exception as error:
                for layer in device_layers:
                    self._layers.fail(layer.name, error)
        # Last, so that after an interrupt the batches are built again.
        self._members = members

    def _count_one_by_one(self, layers: Sequence[Layer], gradients: Gradients, valid: Tensor | None) -> None:
        self._one_by_one.count(layers, gradients, valid)
        for layer in layers:
            if layer.member is not None and layer.tracked is not None:
                # Check whether it can be counted with others in the next step.
                try:
                    if not self.accepts(layer, *layer.tracked.unwrapped()):
                        layer.leave_route()
                    elif layer.scale is not None:
                        # The batch that had the scale does not have this member any more.
                        layer.member.set_scale(layer.scale)
                except Exception as error:
                    self._layers.fail(layer.name, error)


class _Batched(NamedTuple):
    """The layers that are counted in one call in a step, their members, and the addresses of their gradients."""

    layers: Sequence[Layer]
    members: list[Member]
    updates: Sequence[int]


class ObservedLayers:
    """Finds the layers that can be counted in a batch while metric groups run in steps.

    Args:
        runner: The metric groups.
        changes: The changes of the layers.
        backend: As in :func:`weightflip.kernels.check_backend`.
        with_updates: Whether updates are counted.
    """

    def __init__(self, runner: MetricRunner, changes: Changes, backend: str, with_updates: bool) -> None:
        self._runner, self._backend, self._with_updates = runner, backend, with_updates
        self._collected = CollectedLayers(changes)
        self._members: list[Member | None] = []
        self._changes, self._is_new = -1, False
        self._plans: dict[tuple[str, ...], list[bool]] = {}
        self._splits: dict[tuple[str, ...], tuple[list[Layer], list[Layer]]] = {}

    def split(self, layers: Sequence[Layer]) -> tuple[Sequence[Layer], Sequence[Layer]]:
        """Return the layers that are counted in a batch in this step, and the others."""
        if self._collected.collect(layers) or self._changes != self._runner.changes:
            self._follow(layers)
        due = self._runner.due
        if due not in self._plans:
            supported: dict[tuple[Any, ...], bool] = {}
            self._plans[due] = [self._is_batched(layer, due, supported) for layer in layers]
        if due not in self._splits:
            pairs = list(zip(layers, self._plans[due], strict=True))
            self._splits[due] = (
                [one for one, is_batched in pairs if is_batched],
                [one for one, is_batched in pairs if not is_batched],
            )
        return self._splits[due]

    def _follow(self, layers: Sequence[Layer]) -> None:
        """Collect what the groups compute, if the members of layers or their groups have changed."""
        self._splits = {}
        members = [layer.member for layer in layers]
        if members != self._members or self._changes != self._runner.changes:
            self._members, self._changes, self._plans = members, self._runner.changes, {}
            self._is_new = True
            for layer in layers:
                if layer.member is not None:
                    layer.member.observations = self._runner.collect_observations(layer)

    def pop_change(self) -> bool:
        """Return whether layers or their observations have changed since the last call."""
        is_new, self._is_new = self._is_new, False
        return is_new

    def release(self) -> None:
        """Release the members, which hold codes."""
        self._members, self._plans, self._splits = [], {}, {}
        self._collected.release()

    def _is_batched(self, layer: Layer, due: tuple[str, ...], supported: dict[tuple[Any, ...], bool]) -> bool:
        member = layer.member
        if member is None or member.observations is None or self._runner.needs_slices(layer):
            return False
        groups = tuple(one.pointwise for one in member.observations if one.group in due)
        key = member.kind, groups
        if groups and key not in supported:
            supported[key] = member.can_be_observed(groups, self._backend, with_updates=self._with_updates)
        return not groups or supported[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_members": [], "_plans": {}, "_splits": {}}


class _LayerBatch:
    """A batch on one device, and the rows of its layers."""

    def __init__(self, layers: Sequence[Layer], with_updates: bool) -> None:
        rows = [layer.row for layer in layers if layer.row is not None]
        indices = [row.index for row in rows]
        self.batch = Batch(members_of(layers), with_updates=with_updates, rows=indices)
        self._ledger = rows[0].ledger
        # The counts that are the same in every step.
        known = torch.zeros(max(indices) + 1, COLUMNS, dtype=torch.int64, device="cpu")
        known[indices, WEIGHT_STEPS] = torch.tensor([layer.weights for layer in layers], device="cpu")
        scales = [0 if layer.scale_codes is None else layer.scale_codes.numel() for layer in layers]
        known[indices, SCALE_STEPS] = torch.tensor(scales, device="cpu")
        self._known = kernels.upload(known, self._ledger.device)
        self._set_table(self._ledger.step)

    def _set_table(self, step: Tensor) -> None:
        # Kept for all steps: each view takes a call of torch.
        self._step, self._rows = step, step[: len(self._known)]
        self._columns = step[:, COUNTED], step[:, SCALE_CHANGES]

    def count(self, updates: Sequence[int], groups: tuple[str, ...]) -> list[tuple[int, Exception]]:
        """Count a step, and return the layers that could not be counted, with the reasons.

        Args:
            updates: Addresses of the gradients.
            groups: The metric groups that are due.
        """
        step, sums = self._ledger.step, self._ledger.metric_step
        if step is not self._step:
            self._set_table(step)
        self._rows.add_(self._known)
        due = None if sums is None or not groups else DueGroups(groups, sums)
        return self.batch.advance(updates, self._columns, due).failed


def _by_device(members: Sequence[Member]) -> list[list[int]]:
    """Return the indices of the members on each device."""
    found: dict[torch.device, list[int]] = {}
    for index, member in enumerate(members):
        found.setdefault(member.codes.device, []).append(index)
    return list(found.values())


def _addresses_if_compatible(gradients: Sequence[Tensor | None], members: Sequence[Member]) -> list[int]:
    """Return the address of each gradient that has the layout and dtype of its member's weight; otherwise 0."""
    return [
        gradient.data_ptr()
        if type(gradient) is Tensor
        and gradient.dtype is member.dtype
        and gradient.layout is torch.strided
        and gradient.is_contiguous()
        and gradient.numel() == member.numel
        else 0
        for gradient, member in zip(gradients, members, strict=True)
    ]
