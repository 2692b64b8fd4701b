"""Plan which parameters to track, with which quantizers, and why to skip the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from weightflip import distributed
from weightflip.quantizers import Quantizer
from weightflip.selection.choice import QuantizerChooser, QuantizerSources
from weightflip.selection.flat import FLAT_NOTE
from weightflip.selection.rules import Rules, Selection, Skip

logger = logging.getLogger("weightflip")


@dataclass(frozen=True)
class Plan:
    """What to do with each parameter of an optimizer.

    Attributes:
        tracked: Name to quantizers; usually one.
        listed: Names for which the user gave a list of quantizers, even if only one quantizer is left of it.
        skipped: Name to the reason.
        skipped_by_model: The skipped names whose reason comes from the model.
        notes: Sentences for the user.
    """

    tracked: dict[str, tuple[Quantizer, ...]] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    skipped_by_model: set[str] = field(default_factory=set)
    notes: tuple[str, ...] = ()

    @property
    def nothing_to_track_message(self) -> str:
        """Says that all parameters are skipped, and why."""
        names_of: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names_of.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{_first_few(names)}: {reason}" for reason, names in names_of.items())
        return f"nothing to track among {len(self.skipped)} parameters ({reasons or 'the optimizer has none'})"


def make_plan(
    parameters: Mapping[str, Tensor],
    sources: QuantizerSources,
    selection: Selection,
    *,
    strict: bool = True,
    may_be_empty: bool = False,
) -> Plan:
    """Decide for each parameter whether to track it and with which quantizers.

    Args:
        parameters: Name to parameter.
        sources: Where ``"auto"`` looks.
        selection: The user's selection.
        strict: Whether a rule that cannot be followed is an error. If not, as during training, a parameter that can no
            longer be tracked is skipped with its reason.
        may_be_empty: Whether patterns may leave nothing to track, even if ``strict``.

    Returns:
        The plan.

    Raises:
        ValueError: An unknown quantizer. If ``strict``, also: a glob that matches nothing; a model that holds none of
            the parameters; a weight that does not fit the format named for it; a parameter that is included by its full
            name and cannot be tracked; patterns that leave nothing to track, now or later.
        TypeError: An object that is not a quantizer.
    """
    rules = Rules(selection)
    if strict:
        rules.check(parameters)
    choices = QuantizerChooser(parameters, sources, strict=strict, with_unconverted=bool(rules.include))
    # With FSDP1 a rank may hold no shard, and all ranks must behave alike; ZeRO-3 partitions do not exist yet.
    may_be_empty |= any(choices.is_flat(p) and not getattr(p, "_is_flat_param", False) for p in parameters.values())
    plan, names_by_note, unknown_classes = Plan(), dict[str, list[str]](), dict[str, None]()
    for name, parameter in parameters.items():
        try:
            rules.check_trackable(name, parameter, choices.original_ndim(parameter))
            specs = choices.recall(name) or rules.specs_for(name)
            if choices.is_flat(parameter):
                names_by_note.setdefault(FLAT_NOTE, []).append(name)
            chosen, notes = choices.choose(parameter, specs)
        except Skip as reason:
            if strict and (reason.is_mismatch or (name in rules.include and not reason.is_expected)):
                raise ValueError(f"parameter {name!r} cannot be tracked as requested: {reason}") from None
            plan.skipped[name] = str(reason)
            may_be_empty |= reason.is_expected
            if reason.is_from_model:
                plan.skipped_by_model.add(name)
            if reason.unknown_class is not None:
                unknown_classes[reason.unknown_class] = None
            if reason.note is not None:
                names_by_note.setdefault(reason.note, []).append(name)
        else:
            plan.tracked[name] = chosen
            if len(specs) > 1:
                plan.listed.add(name)
            for note in notes:
                names_by_note.setdefault(note, []).append(name)
    for cls in unknown_classes if distributed.is_writer() else ():
        logger.warning("weightflip: torchao's %s is not supported yet; its weights are not tracked", cls)
    # Without patterns, an empty selection is not a mistake: a script whose optimizer holds only biases must run.
    if strict and rules.has_patterns and not plan.tracked and not may_be_empty:
        raise ValueError(
            f"{plan.nothing_to_track_message}; expected include=, exclude= and quantizer= to leave at least one "
            "floating-point weight with two or more dimensions, or include= to name others"
        )
    return replace(plan, notes=tuple(f"{note} ({_first_few(names)})" for note, names in names_by_note.items()))


def _first_few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
