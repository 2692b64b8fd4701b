"""Which weights of an optimizer are tracked: selected anew when its parameters change, and held only in a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from weightflip import distributed
from weightflip.counting.layer import TrackedWeight
from weightflip.counting.tracker import WeightFlipTracker
from weightflip.quantizers.adapt import quantizer_name
from weightflip.quantizers.protocol import Quantizer
from weightflip.records import RunInfo, shown, split_variant, variant
from weightflip.selection import (
    Plan,
    Selection,
    Sources,
    is_by_place,
    make_groups,
    make_plan,
    name_parameters,
    owner_types,
)
from weightflip.session.log import Log, Source, restricted
from weightflip.session.options import Options
from weightflip.session.steps import parameters_of, reference

logger = logging.getLogger("weightflip")


class Weights:
    """The tracked weights of one optimizer.

    Args:
        tracker: What counts them.
        log: Where the run is written, whose other optimizers may track weights of the same names.
        source: Where it is kept which weights there are.
        model: What holds them, for names and quantizers.
        options: Which are asked for.
        settings: What else is said of the run.
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
        # Not the options as a whole: copies and pickles cannot take what is in sinks= and alerts=.
        self._selection = Selection(options.quantizer, options.include, options.exclude)
        self._groups = options.groups
        self._settings = dict(settings)
        self._names: list[list[str]] = []
        self._noted: set[str] = set()
        self._known: dict[str, tuple[Quantizer, ...] | str] = {}
        self._types: dict[str, str] = {}
        self._start()

    def _start(self) -> None:
        self.tracked: list[TrackedWeight] = []
        """Without their parameters, except in a step."""
        self.looks_again = True
        """Whether the next step selects anew where the parameters are the same."""
        self._places: list[int] = []
        self._optimizer: Callable[[], Optimizer | None] | None = None
        self._plan = Plan()
        self._seen: tuple[object, ...] = ()
        self._is_selecting = False
        self._shards: tuple[tuple[object, distributed.Layout], ...] = ()
        self._has_other_shards = self._has_compared = self._is_apart = False

    # ------------------------------------------------------------------ which there are

    def select(self, optimizer: Optimizer, *, strict: bool) -> None:
        """Look at the optimizer's parameters again, if they are not the ones of the last step.

        They are read from the groups each time: FSDP2 under Accelerate replaces them in place, and users add groups,
        freeze and unfreeze.
        """
        if self._is_apart:
            return
        every = parameters_of(optimizer)
        seen = _described(every)
        if seen == self._seen and not (self.looks_again or self._is_selecting):
            return
        if seen != self._seen:
            layouts = [distributed.layout(parameter) for parameter in every]
            shards = tuple((of, lies) for of, lies in zip(seen, layouts, strict=True) if lies is not None)
            if shards != self._shards:
                if self._has_compared and not self._do_others_come(shards):
                    self._part(seen)
                    return
                self._has_other_shards = True
            self._shards = shards
        # Now, and not where all went well: what fails is not tried again on one process alone.
        self._seen, self.looks_again = seen, False
        # What is interrupted is.
        self._is_selecting = True
        try:
            self._select(optimizer, every, strict)
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
            Sources(self._model, optimizer, self._known),
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
        weights, taken = _shared_out(weights, others, strict)
        notes = (*plan.notes, *self._note_on_names(weights))
        self._tell_notes(notes)
        if strict and not weights and not others:
            _say(f"{plan.nothing_to_track}; they are looked at again at the first step, and whenever they change")
        # Again at the first step: until then a model may still be converted, which leaves its parameters what they are.
        self.looks_again = strict
        places = {id(parameter): place for place, parameter in reversed(list(enumerate(every)))}
        self.tracked, self._places = weights, [places[id(weight.parameter)] for weight in weights]
        described = _table(weights)
        self._optimizer = reference(optimizer)
        self.release()
        # Kept, because a copy of an optimizer has no model in it.
        self._types.update(owner_types(parameters, self._model))
        tracked = list(dict.fromkeys(split_variant(weight.name)[0] for weight in weights))
        self._source.groups = make_groups(self._groups, list(parameters), self._types, tracked=tracked, strict=strict)
        groups = restricted(self._source.groups, set(tracked))
        if strict and self._groups == "blocks" and not groups and not others:
            _say("groups='blocks' finds no block that repeats, such as layers.0 and layers.1, in the names")
        skipped = {**plan.skipped, **taken}
        self._source.info = RunInfo(described, skipped, self._settings, notes, groups, self._tracker.declared_values)
        if not strict:
            # Else it is not sure yet that there will be a run; see Session.begin.
            self._log.join(self._source)

    def _note_on_names(self, weights: Sequence[TrackedWeight]) -> tuple[str, ...]:
        names = [weight.name for weight in weights if is_by_place(split_variant(weight.name)[0])]
        if self._model is not None or not names:
            return ()
        such = names[0] + (", ..." if len(names) > 1 else "")
        return (f"Weights are named by their place in the optimizer's groups; model= gives them their names ({such})",)

    def _tell_notes(self, notes: Sequence[str]) -> None:
        for note in notes:
            # Whatever the names behind it: under ZeRO-3 they may be others in each step.
            sentence = note.rpartition(" (")[0]
            if sentence not in self._noted:
                self._noted.add(sentence)
                _say(note)

    # ------------------------------------------------------------------ what processes share

    def expect_others(self, *, are_known: bool) -> None:
        """Have the tracker compare the sharded weights with those of the other processes, if they have become others.

        Args:
            are_known: Whether this process could select its own.
        """
        if self._has_other_shards:
            self._tracker.expect_others(are_known=are_known)
            self._has_other_shards, self._has_compared = False, True

    def _do_others_come(self, shards: Sequence[tuple[object, distributed.Layout]]) -> bool:
        """Whether the sharded parameters have become others on all processes, that are going to compare them."""
        layouts = [layout for _, layout in (*self._shards, *shards) if layout.shard is not None]
        try:
            return distributed.have_all_come(layouts, str([layout.shape for _, layout in self._shards]))
        except Exception:
            return False

    def _part(self, seen: tuple[object, ...]) -> None:
        """Go on with the weights that all processes know of, without those that are others on this one alone."""
        self._is_apart = True
        seconds = int(distributed.collectives.PATIENCE.total_seconds())
        reason = f"sharded parameters were frozen, added or replaced on this process alone in {seconds} s"
        self._log.untold.append(
            f"weightflip: {reason}: what is tracked stays as it was before, without what is another one now; do the "
            "same to the parameters on all processes"
        )
        if max(self._places, default=0) >= len(seen):
            self._tracker.abandon()
            return
        for weight, place in zip(self.tracked, self._places, strict=True):
            if seen[place] != self._seen[place]:
                self._tracker.give_up(weight.name, reason)
        self._seen, self.looks_again = seen, False

    # ------------------------------------------------------------------ in a step

    def hold(self, optimizer: Optimizer) -> None:
        """Take the parameters at hand, until ``release``."""
        every = parameters_of(optimizer)
        for weight, place in zip(self.tracked, self._places, strict=True):
            weight.parameter = every[place]

    def release(self) -> None:
        """Let go of the parameters: frameworks replace them, and the old ones are a whole model."""
        for weight in self.tracked:
            weight.release()

    @property
    def optimizer(self) -> Optimizer | None:
        """The one whose parameters were selected last; None where it is gone."""
        return None if self._optimizer is None else self._optimizer()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Have the parameters at hand between two tracked steps, if they are still those of the last one."""
        optimizer = self.optimizer
        are_held = any(weight.is_held for weight in self.tracked)
        if are_held or optimizer is None or _described(parameters_of(optimizer)) != self._seen:
            yield
            return
        self.hold(optimizer)
        try:
            yield
        finally:
            self.release()

    def forget(self) -> None:
        """Give memory back, at the end."""
        self._model, self.tracked, self._places = None, [], []

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer has no model in it: what the model was asked is known from here on.
        known: dict[str, tuple[Quantizer, ...] | str] = {
            name: self._plan.skipped[name] for name in self._plan.skipped_by_model
        }
        known.update({n: q for n, q in self._plan.tracked.items() if (len(q) > 1) == (n in self._plan.listed)})
        of_process = ("tracked", "_places", "_optimizer", "_seen", "_shards", "_plan")
        state = {k: v for k, v in self.__dict__.items() if k not in of_process}
        return {**state, "_model": None, "_known": {**self._known, **known}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _shared_out(
    weights: Sequence[TrackedWeight], others: Sequence[Source], strict: bool
) -> tuple[list[TrackedWeight], dict[str, str]]:
    """Share weights out among the optimizers of one run.

    Returns:
        The weights that no other one tracks; names of the others, with the reason.
    """
    names = {name for source in others if source.is_live for name in source.info.tracked}
    taken = [weight.name for weight in weights if weight.name in names]
    if strict and taken:
        raise ValueError(
            f"another optimizer of the same run tracks a weight called {min(taken)!r}; give model= to both, so that "
            "each weight has its own name, or exclude= it from one"
        )
    left = [weight for weight in weights if weight.name not in names]
    return left, dict.fromkeys(taken, "another optimizer of this run tracks a weight of this name")


def _table(weights: Sequence[TrackedWeight]) -> dict[str, tuple[str, str, str]]:
    """Name to shape, dtype and quantizer."""
    return {
        weight.name: (
            "x".join(str(size) for size in weight.parameter.shape) or "scalar",
            str(weight.parameter.dtype).removeprefix("torch."),
            quantizer_name(weight.quantizer),
        )
        for weight in weights
    }


def _say(text: str) -> None:
    """A line in the log that all processes would have: on the first one alone."""
    if distributed.is_writer():
        logger.warning("weightflip: %s", shown(text))


def _described(parameters: Sequence[Tensor]) -> tuple[object, ...]:
    """What tells whether parameters are those of before. Holds none of them."""
    # An id can be given again, which processes have to see alike where they share weights; see Identity.
    return tuple(
        (
            id(p) if type(p) is nn.Parameter else distributed.Identity(p),
            type(p),
            p.dtype,
            p.device.type,
            p.requires_grad,
        )
        for p in parameters
    )
