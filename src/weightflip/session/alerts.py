"""Alerts: rules over the values of records, reported as soon as they come true."""

from __future__ import annotations

import logging
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from weightflip import checks
from weightflip.records import AlertEvent, FlipRecord, LayerRecord, alert_lines, printable, split_variant, variant

logger = logging.getLogger("weightflip")

_RULE = re.compile(
    r"\s*(?P<value>\w+)\s*(?:(?P<comparison>[<>]=?|==)|drops\b)\s*"
    r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?P<percent>%?)"
    r"(?:\s+for\s+(?P<steps>\d+)\s+steps?)?\s*"
)
_EXAMPLES = "'stall_ratio > 0.99 for 200 steps', 'flip_rate < 1e-6' or 'stable_rank drops 30% for 1000 steps'"
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    ">": lambda value, bound: value > bound,
    ">=": lambda value, bound: value >= bound,
    "<": lambda value, bound: value < bound,
    "<=": lambda value, bound: value <= bound,
    "==": lambda value, bound: value == bound,
}
_NONFINITE = "nonfinite_weights"


@dataclass(frozen=True)
class Alert:
    """A rule to check for each layer and for the model.

    A rule compares a value with a bound (``>``, ``>=``, ``<``, ``<=``, ``==``), or with its highest value so far
    (``drops``). With ``for N steps``, it comes true once the condition has held at every record over at least N
    optimizer steps. It is reported once, and can be reported again after a record at which the condition does not hold.
    A record without the value is ignored; for example, there is no stall ratio without updates.

    Args:
        rule: ``"<value> > <number> [for <N> steps]"`` or ``"<value> drops <number>% [for <N> steps]"``. Numbers may be
            percentages.
        layers: Globs over layer names, where ``"model"`` stands for the model; None for all.
        callback: Called with each :class:`AlertEvent`, in the training thread. If it raises, weightflip warns once and
            does not call it again, and training continues. To stop training, have it set a flag.

    Raises:
        ValueError: ``rule`` cannot be parsed.
        TypeError: ``rule`` is not a string, ``layers`` are not globs, or ``callback`` is not callable.

    Example:
        >>> import torch
        >>> from weightflip import Alert, FlipTrackingOptimizer
        >>> model, stalled = torch.nn.Linear(4, 2), []
        >>> optimizer = FlipTrackingOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=1e-9), model, quantizer="e3m4", log_every=1, sinks=[],
        ...     alerts=[Alert("stall_ratio > 99% for 3 steps", layers="weight", callback=stalled.append)],
        ... )
        >>> for _ in range(10):
        ...     model(torch.ones(4)).sum().backward()
        ...     optimizer.step()
        >>> [event.message for event in stalled]
        ['step 4: stall_ratio > 99% for 3 steps: weight (1, since step 1)']
    """

    rule: str
    layers: str | Sequence[str] | None = None
    callback: Callable[[AlertEvent], object] | None = None
    value: str = field(init=False, repr=False)
    """The name of the value to check."""
    comparison: str = field(init=False, repr=False)
    """``">"``, ``">="``, ``"<"``, ``"<="``, ``"=="`` or ``"drops"``."""
    bound: float = field(init=False, repr=False)
    """What the value is compared with; for ``"drops"``, the drop as a fraction of the highest value."""
    steps: int = field(init=False, repr=False)
    """The number of optimizer steps over which the condition has to hold."""

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str):
            raise TypeError(f"a rule in alerts= must be a string such as {_EXAMPLES}, got {type(self.rule).__name__}")
        found = _RULE.fullmatch(self.rule)
        bound = math.nan if found is None else float(found["number"]) / (100 if found["percent"] else 1)
        if found is None or (not found["comparison"] and not (found["percent"] and 0 < bound <= 1)):
            raise ValueError(f"expected a rule such as {_EXAMPLES} in alerts=, got {self.rule!r}")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback= must be a function of an AlertEvent, got {checks.describe(self.callback)}")
        if not isinstance(self.layers, str) and self.layers is not None:
            object.__setattr__(self, "layers", checks.globs("layers", self.layers))
        for name, value in {
            "value": found["value"],
            "comparison": found["comparison"] or "drops",
            "bound": bound,
            "steps": int(found["steps"] or 0),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def globs(self) -> tuple[str, ...]:
        """``layers``, as a tuple."""
        return ("*",) if self.layers is None else (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)

    def concerns(self, layer: str) -> bool:
        """Whether this layer is one of ``layers``."""
        return any(_matches(layer, glob) for glob in self.globs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Alert:
        # The callback may be a bound method of a user's object: a copy of the optimizer calls the same one.
        return self


@dataclass
class _Episode:
    """The state of one rule for one layer."""

    highest: float = -math.inf
    since: int | None = None
    is_reported: bool = False


class AlertWatch:
    """Checks each record against the rules, logs those that come true and calls their callbacks.

    Its state is not saved in checkpoints: in a resumed run, durations and highest values start again.

    Args:
        alerts: Rules, as strings or :class:`Alert`.
        values: Names of the available values.

    Raises:
        ValueError: A rule cannot be parsed, or is about an unknown value.
        TypeError: An object that is not a rule.
    """

    def __init__(self, alerts: Iterable[str | Alert] | None = None, values: Set[str] = frozenset()) -> None:
        self._alerts = [alert if isinstance(alert, Alert) else Alert(alert) for alert in alerts or ()]
        self._episodes: dict[tuple[int, str], _Episode] = {}
        self._pending_warnings: list[str] = []
        known = {*values, _NONFINITE}
        for alert in self._alerts:
            if alert.value not in known:
                raise ValueError(
                    f"the rule {alert.rule!r} in alerts= is about {alert.value!r}, which metrics= does not provide; "
                    f"{checks.did_you_mean(alert.value, known)}Available values: {', '.join(sorted(known))}"
                )

    def __bool__(self) -> bool:
        return bool(self._alerts)

    def check_layers(self, layers: Iterable[str]) -> None:
        """Check that each glob in the rules matches a layer.

        Args:
            layers: Names of all layers.

        Raises:
            ValueError: A glob matches no layer.
        """
        names = ["model", *layers]
        names += [variant("model", quantizer) for name in names if (quantizer := split_variant(name)[1])]
        for alert in self._alerts:
            for glob in alert.globs:
                if not any(_matches(name, glob) for name in names):
                    raise ValueError(
                        f"the pattern {glob!r} in layers= of the rule {alert.rule!r} matches none of the "
                        f"{len(names)} layers: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                    )

    def extend(self, other: AlertWatch) -> None:
        """Add the rules of another watch."""
        self._alerts += other._alerts

    def check(self, record: FlipRecord) -> list[AlertEvent]:
        """Check a record, log the rules that came true, and call their callbacks.

        Returns:
            An event for each rule and layer that came true.
        """
        if not self._alerts:
            return []
        subjects = {f"model@{quantizer}" if quantizer else "model": model for quantizer, model in record.models.items()}
        subjects.update({layer.name: layer for layer in record.layers})
        values_by_layer = {name: _alert_values(layer) for name, layer in subjects.items()}
        events = []
        for index, alert in enumerate(self._alerts):
            new_events = [
                event
                for name, values in values_by_layer.items()
                if alert.value in values and alert.concerns(name)
                if (event := self._evaluate(index, name, values[alert.value], record.step)) is not None
            ]
            if new_events:
                events += new_events
                for line in alert_lines(new_events):
                    logger.warning("weightflip: %s", line)
                self._call_back(index, new_events)
        return events

    def _evaluate(self, index: int, layer: str, value: float, step: int) -> AlertEvent | None:
        alert, episode = self._alerts[index], self._episodes.setdefault((index, layer), _Episode())
        episode.highest = max(episode.highest, value)
        if alert.comparison == "drops":
            holds = episode.highest > 0 and value <= episode.highest * (1 - alert.bound)
        else:
            holds = _COMPARISONS[alert.comparison](value, alert.bound)
        if not holds:
            episode.since, episode.is_reported = None, False
            return None
        since = episode.since = step if episode.since is None else episode.since
        if episode.is_reported or step - since < alert.steps:
            return None
        episode.is_reported = True
        of_highest = f" of {episode.highest:.4g}" if alert.comparison == "drops" else ""
        when = f", since step {since}" if since < step else ""
        message = f"step {step}: {alert.rule}: {printable(layer)} ({value:.4g}{of_highest}{when})"
        return AlertEvent(step, layer, alert.rule, value, since, message)

    def _call_back(self, index: int, events: Sequence[AlertEvent]) -> None:
        callback = self._alerts[index].callback
        if callback is None:
            return
        try:
            for event in events:
                callback(event)
        except Exception as error:
            self._alerts[index] = replace(self._alerts[index], callback=None)
            # Warn later: warnings may be configured to raise, and the other rules still have to be checked.
            self._pending_warnings.append(
                f"weightflip: the callback of {self._alerts[index].rule!r} failed and will not be called again; "
                f"training continues: {type(error).__name__}: {error}"
            )

    def take_warnings(self) -> list[str]:
        """Return the pending warnings and clear them."""
        texts, self._pending_warnings = self._pending_warnings, []
        return texts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_alerts": [_picklable(alert) for alert in self._alerts]}

    def __deepcopy__(self, memo: dict[int, Any]) -> AlertWatch:
        twin = AlertWatch()
        twin._alerts = list(self._alerts)
        twin._episodes = {key: replace(episode) for key, episode in self._episodes.items()}
        return twin


def _matches(layer: str, glob: str) -> bool:
    """Whether a glob matches a layer's name, with or without the quantizer in it."""
    return fnmatchcase(layer, glob) or fnmatchcase(split_variant(layer)[0], glob)


def _alert_values(layer: LayerRecord) -> dict[str, float]:
    counted = {_NONFINITE: float(layer.nonfinite)} if layer.window.weight_steps else {}
    return {**layer.new_values, **counted}


def _picklable(alert: Alert) -> Alert:
    try:
        pickle.dumps(alert.callback)
    except Exception as error:
        warnings.warn(f"weightflip: a callback in alerts= is not pickled with the optimizer: {error}", stacklevel=2)
        return replace(alert, callback=None)
    return alert
