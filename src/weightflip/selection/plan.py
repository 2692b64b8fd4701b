"""Which parameters are tracked, under which name, with which quantizer; and why the others are not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from weightflip import distributed
from weightflip.quantizers import Quantizer
from weightflip.selection.choice import Choices, Sources
from weightflip.selection.flat import FLAT_NOTE
from weightflip.selection.rules import Rules, Selection, Skip

logger = logging.getLogger("weightflip")


@dataclass(frozen=True)
class Plan:
    """What to do with each parameter of an optimizer.

    Attributes:
        tracked: Name to the quantizers it is seen through, one for most.
        listed: Names that a list of quantizers was given for, even if it came down to one.
        skipped: Name to the reason.
        skipped_by_model: Names of those whose reason comes from the model.
        notes: Sentences worth reading.
    """

    tracked: dict[str, tuple[Quantizer, ...]] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    skipped_by_model: set[str] = field(default_factory=set)
    notes: tuple[str, ...] = ()

    @property
    def nothing_to_track(self) -> str:
        """What there was instead, and why it is left out, if all of it is."""
        names_of: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names_of.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{_some(names)}: {reason}" for reason, names in names_of.items())
        return f"nothing to track among {len(self.skipped)} parameters ({reasons or 'there are none'})"


def make_plan(
    parameters: Mapping[str, Tensor],
    sources: Sources,
    selection: Selection,
    *,
    strict: bool = True,
    may_be_empty: bool = False,
) -> Plan:
    """Decide for each parameter whether it is tracked and with which quantizer.

    Args:
        parameters: Name to parameter.
        sources: Where ``"auto"`` looks.
        selection: What was asked for.
        strict: Whether a rule that leads nowhere is an error. While training goes on, a parameter that cannot be
            tracked any more is skipped with its reason instead.
        may_be_empty: Whether patterns that leave nothing to track are no error, even if ``strict``.

    Returns:
        The plan.

    Raises:
        ValueError: An unknown quantizer. If ``strict``: a glob that matches nothing; a model that holds none of the
            parameters; a weight that does not fit the format named for it; a parameter that is included by its full
            name and cannot be tracked; patterns that leave nothing to track, now or later.
        TypeError: Something that is no quantizer.
    """
    rules = Rules(selection)
    if strict:
        rules.check(parameters)
    choices = Choices(parameters, sources, strict=strict)
    # Ranks have different shards of FSDP1, and must not come to different ends; ZeRO-3's partitions are yet to come.
    may_be_empty |= any(choices.is_flat(p) and not getattr(p, "_is_flat_param", False) for p in parameters.values())
    plan, noted, unknown = Plan(), dict[str, list[str]](), dict[str, None]()
    for name, parameter in parameters.items():
        try:
            rules.check_trackable(name, parameter, choices.ndim_before(parameter))
            specs = choices.known(name) or rules.specs_of(name)
            if choices.is_flat(parameter):
                noted.setdefault(FLAT_NOTE, []).append(name)
            chosen, notes = choices.choose(parameter, specs)
        except Skip as reason:
            if strict and (reason.misfit or (name in rules.include and not reason.is_elsewhere)):
                raise ValueError(f"parameter {name!r} cannot be tracked as asked for: {reason}") from None
            plan.skipped[name] = str(reason)
            may_be_empty |= reason.is_elsewhere
            if reason.is_of_model:
                plan.skipped_by_model.add(name)
            if reason.unknown is not None:
                unknown[reason.unknown] = None
        else:
            plan.tracked[name] = chosen
            if len(specs) > 1:
                plan.listed.add(name)
            for note in notes:
                noted.setdefault(note, []).append(name)
    for cls in unknown if distributed.is_writer() else ():
        logger.warning("weightflip: torchao's %s is not known yet; its weights are not tracked", cls)
    # Without patterns of the user's, having nothing is no mistake: an optimizer of biases is a script that runs.
    if strict and rules.has_patterns and not plan.tracked and not may_be_empty:
        raise ValueError(
            f"{plan.nothing_to_track}; expected a floating-point weight with two dimensions that the patterns in "
            "include=, exclude= and quantizer= leave, or others that include= names"
        )
    return replace(plan, notes=tuple(f"{note} ({_some(names)})" for note, names in noted.items()))


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
