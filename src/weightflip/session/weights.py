"""The tracked weights of an optimizer: selected again when its parameters change, and held only during a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weightflip import distributed
from weightflip.counting.layer import TrackedWeight
from weightflip.counting.tracker import WeightFlipTracker
from weightflip.quantizers.adapt import quantizer_name
from weightflip.quantizers.protocol import Quantizer
from weightflip.records import RunInfo, printable, split_variant, variant
from weightflip.selection import (
    Plan,
    QuantizerSources,
    Selection,
    is_positional,
    make_layer_groups,
    make_plan,
    name_parameters,
    owner_types,
)
from weightflip.session.log import Log, Source, restrict_groups
from weightflip.session.options import Options
from weightflip.session.steps import parameters_of, weak_reference

logger = logging.getLogger("weightflip")


class Weights:
    """The tracked weights of one optimizer.

    Args:
        tracker: Counts the flips.
        log: The log of the run. Its other optimizers may track weights with the same names.
        source: The optimizer's part of the log; holds the description of the tracked weights.
        model: The model that holds the weights, for names and quantizers.
        options: The user's options.
        settings: More settings to show in the run's description.
    """

    def __init__(
        self,
        tracker: WeightFlipTracker,
        log: Log,
        source: Source,
        model: nn.Module | None,
        options: Options,
        settings: Mapping[str, str],
    ) -> None:
        self._tracker = tracker
        self._log = log
        self._source = source
        self._model = model
        # Do not keep options itself: what is in sinks= and alerts= may be impossible to copy or pickle.
        self._selection = Selection(options.quantizer, options.include, options.exclude)
        self._groups = options.groups
        self._settings = dict(settings)
        self._names: list[list[str]] = []
        self._logged_notes: set[str] = set()
        self._remembered: dict[str, tuple[Quantizer, ...] | str] = {}
        self._types: dict[str, str] = {}
        self._reset()

    def _reset(self) -> None:
        self.tracked: list[TrackedWeight] = []
        """The tracked weights. They hold their parameters only during a step."""
        self.needs_reselection = True
        """Whether the next step selects again even if the parameters have not changed."""
        self._positions: list[int] = []
        self._optimizer: Callable[[], Optimizer | None] | None = None
        self._plan = Plan()
        self._signature = _Signature.of([])
        self._is_selecting = False
        self._shards: tuple[tuple[object, distributed.Layout], ...] = ()
        self._have_shards_changed = self._has_compared = self._has_diverged = False

    # ------------------------------------------------------------------ selection

    def select(self, optimizer: Optimizer, *, strict: bool) -> None:
        """Select the weights again if the optimizer's parameters have changed since the last step.

        They are read from the param groups each time: Accelerate with FSDP2 replaces them in place, and users add
        param groups, freeze and unfreeze.
        """
        if self._has_diverged:
            return
        parameters = parameters_of(optimizer)
        signature = _Signature.of(parameters)
        if signature == self._signature and not (self.needs_reselection or self._is_selecting):
            return
        if signature != self._signature:
            layouts = [distributed.layout(parameter) for parameter in parameters]
            signed = zip(signature.by_parameter(), layouts, strict=True)
            shards = tuple((one, layout) for one, layout in signed if layout is not None)
            if shards != self._shards:
                if self._has_compared and not self._have_all_changed(shards):
                    self._diverge(signature)
                    return
                self._have_shards_changed = True
            self._shards = shards
        # Set before selecting, not after: a selection that fails is not retried on one process alone.
        self._signature, self.needs_reselection = signature, False
        # One that is interrupted is retried.
        self._is_selecting = True
        try:
            self._select(optimizer, parameters, strict)
        except Exception:
            self._is_selecting = False
            raise
        self._is_selecting = False

    def _select(self, optimizer: Optimizer, every: Sequence[Tensor], strict: bool) -> None:
        parameters = name_parameters(optimizer.param_groups, self._model, self._names)
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        others = [source for source in self._log.sources if source is not self._source]
        plan = make_plan(
            parameters,
            QuantizerSources(self._model, optimizer, self._remembered),
            self._selection,
            strict=strict,
            may_be_empty=bool(others),
        )
        self._plan = plan
        weights = [
            TrackedWeight(
                variant(name, quantizer_name(quantizer)) if name in plan.listed else name, parameters[name], quantizer
            )
            for name, quantizers in plan.tracked.items()
            for quantizer in quantizers
        ]
        weights, taken = _exclude_already_tracked(weights, others, strict)
        positional = self._note_positional_names(weights)
        notes = (*plan.notes, *positional)
        self._log_notes(plan.notes, _log_from_writer)
        self._log_notes(positional, _log_once_from_writer)
        if strict and not weights and not others:
            _log_from_writer(
                f"{plan.nothing_to_track_message}; they are checked again at the first step and whenever they change"
            )
        # Select again at the first step: until then the model may be converted with its parameters unchanged.
        self.needs_reselection = strict
        positions = {id(parameter): position for position, parameter in reversed(list(enumerate(every)))}
        self.tracked, self._positions = weights, [positions[id(weight.parameter)] for weight in weights]
        descriptions = _describe_weights(weights)
        self.optimizer = optimizer
        self.release()
        # Remember the types: a copy of an optimizer does not hold the model.
        self._types.update(owner_types(parameters, self._model))
        tracked = list(dict.fromkeys(split_variant(weight.name)[0] for weight in weights))
        self._source.groups = make_layer_groups(
            self._groups, list(parameters), self._types, tracked=tracked, strict=strict
        )
        groups = restrict_groups(self._source.groups, set(tracked))
        if strict and self._groups == "blocks" and not groups and not others:
            _log_from_writer(
                "groups='blocks' finds no repeated model block, such as layers.0 and layers.1, in the parameter names"
            )
        skipped = {**plan.skipped, **taken}
        self._source.info = RunInfo(descriptions, skipped, self._settings, notes, groups, self._tracker.declared_values)
        if not strict:
            # The strict call may still raise; after it, Session.begin adds the source.
            self._log.add_source(self._source)

    def _note_positional_names(self, weights: Sequence[TrackedWeight]) -> tuple[str, ...]:
        names = [weight.name for weight in weights if is_positional(split_variant(weight.name)[0])]
        if self._model is not None or not names:
            return ()
        examples = names[0] + (", ..." if len(names) > 1 else "")
        return (
            "Weights are named by their position in the param groups; pass model= to use the model's names "
            f"({examples})",
        )

    def _log_notes(self, notes: Sequence[str], log: Callable[[str], None]) -> None:
        for note in notes:
            # Ignore the names at the end: under ZeRO-3 they may change in each step.
            sentence = note.rpartition(" (")[0]
            if sentence not in self._logged_notes:
                self._logged_notes.add(sentence)
                log(note)

    # ------------------------------------------------------------------ other processes

    def compare_changed_shards(self, *, is_selection_known: bool) -> None:
        """Have the tracker compare the sharded weights with those of the other processes, if they have changed.

        Args:
            is_selection_known: Whether this process has successfully selected its own.
        """
        if self._have_shards_changed:
            self._tracker.request_comparison(is_selection_known=is_selection_known)
            self._have_shards_changed, self._has_compared = False, True

    def _have_all_changed(self, shards: Sequence[tuple[object, distributed.Layout]]) -> bool:
        """Whether the sharded parameters have changed on all processes, so that all take part in comparing them."""
        layouts = [layout for _, layout in (*self._shards, *shards) if layout.shard is not None]
        try:
            return distributed.try_barrier(layouts, str([layout.shape for _, layout in self._shards]))
        except Exception:
            return False

    def _diverge(self, signature: _Signature) -> None:
        """Keep the previous selection, without the weights that changed on this process alone."""
        self._has_diverged = True
        seconds = int(distributed.collectives.BARRIER_TIMEOUT.total_seconds())
        reason = f"sharded parameters were frozen, added or replaced on this process alone within {seconds} s"
        self._log.pending_warnings.append(
            f"weightflip: {reason}: tracking keeps its previous selection, without the changed parameters; make the "
            "same changes on all processes"
        )
        old, new = self._signature.by_parameter(), signature.by_parameter()
        if max(self._positions, default=0) >= len(new):
            self._tracker.abandon()
            return
        for weight, position in zip(self.tracked, self._positions, strict=True):
            if new[position] != old[position]:
                self._tracker.give_up(weight.name, reason)
        self._signature, self.needs_reselection = signature, False

    # ------------------------------------------------------------------ holding parameters

    def hold(self, optimizer: Optimizer) -> None:
        """Reference the parameters until ``release``."""
        parameters = parameters_of(optimizer)
        for weight, position in zip(self.tracked, self._positions, strict=True):
            weight.parameter = parameters[position]

    def release(self) -> None:
        """Release the parameters: frameworks replace them, and the old ones take as much memory as a model."""
        for weight in self.tracked:
            weight.release()

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer whose parameters were selected last, or that of a copy; None if it no longer exists."""
        return None if self._optimizer is None else self._optimizer()

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self._optimizer = weak_reference(optimizer)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Reference the parameters between two tracked steps, if they have not changed since the last one."""
        optimizer = self.optimizer
        are_held = any(weight.is_held for weight in self.tracked)
        if are_held or optimizer is None or _Signature.of(parameters_of(optimizer)) != self._signature:
            yield
            return
        self.hold(optimizer)
        try:
            yield
        finally:
            self.release()

    def clear(self) -> None:
        """Free memory at the end of tracking."""
        self._model, self.tracked, self._positions = None, [], []

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer does not hold the model, so it remembers what the model determined.
        remembered: dict[str, tuple[Quantizer, ...] | str] = {
            name: self._plan.skipped[name] for name in self._plan.skipped_by_model
        }
        remembered.update({n: q for n, q in self._plan.tracked.items() if (len(q) > 1) == (n in self._plan.listed)})
        not_copied = ("tracked", "_positions", "_optimizer", "_signature", "_shards", "_plan")
        state = {k: v for k, v in self.__dict__.items() if k not in not_copied}
        return {**state, "_model": None, "_remembered": {**self._remembered, **remembered}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _exclude_already_tracked(
    weights: Sequence[TrackedWeight], others: Sequence[Source], strict: bool
) -> tuple[list[TrackedWeight], dict[str, str]]:
    """Exclude the weights that another optimizer of the run already tracks under the same name.

    Returns:
        The remaining weights, and the names of the excluded ones with the reason.
    """
    names = {name for source in others if source.is_live for name in source.info.tracked}
    taken = [weight.name for weight in weights if weight.name in names]
    if strict and taken:
        raise ValueError(
            f"another optimizer of the same run already tracks a weight named {min(taken)!r}; pass model= to both, so "
            "that each weight has its own name, or exclude= it from one"
        )
    left = [weight for weight in weights if weight.name not in names]
    return left, dict.fromkeys(taken, "another optimizer of this run tracks a weight with this name")


def _describe_weights(weights: Sequence[TrackedWeight]) -> dict[str, tuple[str, str, str]]:
    """Map each name to its shape, dtype and quantizer."""
    return {
        weight.name: (
            "x".join(str(size) for size in weight.parameter.shape) or "scalar",
            str(weight.parameter.dtype).removeprefix("torch."),
            quantizer_name(weight.quantizer),
        )
        for weight in weights
    }


def _log_from_writer(text: str) -> None:
    """Log a line on the writer process only; the others would log the same."""
    if distributed.is_writer():
        logger.warning("weightflip: %s", printable(text))


_logged: set[str] = set()
"""The texts that this process has passed to ``_log_once_from_writer``."""


def _log_once_from_writer(text: str) -> None:
    """As ``_log_from_writer``, but each text once: a script may have one optimizer per parameter."""
    if text not in _logged:
        _logged.add(text)
        _log_from_writer(text)


class _Signature(NamedTuple):
    """Describes parameters without holding them, so that a change can be detected. Each list has all parameters.

    Reading attribute by attribute takes less than half as long as reading parameter by parameter.
    """

    identities: list[object]
    types: list[type[Tensor]]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    requires_grad: list[bool]

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> _Signature:
        types = [type(parameter) for parameter in parameters]
        # Ids can be reused; Identity detects that on all processes alike, which sharded weights require.
        identities: list[object] = [
            id(parameter) if kind is nn.Parameter else distributed.Identity(parameter)
            for parameter, kind in zip(parameters, types, strict=True)
        ]
        return cls(
            identities,
            types,
            [parameter.dtype for parameter in parameters],
            [parameter.device for parameter in parameters],
            [parameter.requires_grad for parameter in parameters],
        )

    def by_parameter(self) -> list[tuple[object, ...]]:
        """Return the same as a list with one element per parameter."""
        return list(zip(*self, strict=True))
