"""Rules over the numbers of records: what to tell people when it happens, and not only in a chart."""

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
from weightflip.records import AlertEvent, FlipRecord, LayerRecord, in_lines, shown, split_variant, variant

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
    """A rule to watch, for each layer and for the model.

    A rule compares a value with a bound (``>``, ``>=``, ``<``, ``<=``, ``==``), or with the highest value so far
    (``drops``). With ``for N steps`` it comes true when the condition has held at every record over at least N
    optimizer steps. It is told once; after a record at which the condition does not hold it can be told again. A record
    without the value says nothing: no updates have no stall ratio.

    Args:
        rule: ``"<value> > <number> [for <N> steps]"`` or ``"<value> drops <number>% [for <N> steps]"``. Numbers may be
            per cent.
        layers: Globs over layer names, of which ``"model"`` is one; None for all.
        callback: Called with each :class:`AlertEvent`, in the training's own thread. If it raises, this is warned about
            once, it is not called again, and training goes on: to stop a training, have it set a flag.

    Raises:
        ValueError: ``rule`` cannot be read.
        TypeError: ``rule`` is no text, ``layers`` no globs, or ``callback`` no function.

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
    """The name of the value that is watched."""
    comparison: str = field(init=False, repr=False)
    """``">"``, ``">="``, ``"<"``, ``"<="``, ``"=="`` or ``"drops"``."""
    bound: float = field(init=False, repr=False)
    """What the value is compared with; of a drop, its share of the highest value."""
    steps: int = field(init=False, repr=False)
    """Optimizer steps over which the condition has to hold."""

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str):
            raise TypeError(f"a rule of alerts= is a text such as {_EXAMPLES}, got {type(self.rule).__name__}")
        found = _RULE.fullmatch(self.rule)
        bound = math.nan if found is None else float(found["number"]) / (100 if found["percent"] else 1)
        if found is None or (not found["comparison"] and not (found["percent"] and 0 < bound <= 1)):
            raise ValueError(f"expected a rule such as {_EXAMPLES} in alerts=, got {self.rule!r}")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback= is a function of an AlertEvent, got {checks.described(self.callback)}")
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
        # A bound method's object is the user's: a copy of the optimizer calls the same.
        return self


@dataclass
class _Episode:
    """How one rule stands with one layer."""

    highest: float = -math.inf
    since: int | None = None
    is_told: bool = False


class AlertWatch:
    """Looks at each record for rules that come true, and tells the log and the callbacks.

    Nothing of it is saved in checkpoints: in a resumed run, times and highest values begin anew.

    Args:
        alerts: Rules, as text or :class:`Alert`.
        values: The names that values have.

    Raises:
        ValueError: A rule that cannot be read, or about a value that there is not.
        TypeError: Something else than a rule.
    """

    def __init__(self, alerts: Iterable[str | Alert] | None = None, values: Set[str] = frozenset()) -> None:
        self._alerts = [alert if isinstance(alert, Alert) else Alert(alert) for alert in alerts or ()]
        self._episodes: dict[tuple[int, str], _Episode] = {}
        self._untold: list[str] = []
        known = {*values, _NONFINITE}
        for alert in self._alerts:
            if alert.value not in known:
                raise ValueError(
                    f"the rule {alert.rule!r} in alerts= is about {alert.value!r}, which none of the metrics= gives; "
                    f"{checks.did_you_mean(alert.value, known)}They give {', '.join(sorted(known))}"
                )

    def __bool__(self) -> bool:
        return bool(self._alerts)

    def check_layers(self, layers: Iterable[str]) -> None:
        """Raise for a rule about layers that there are not.

        Args:
            layers: Names of all of them.

        Raises:
            ValueError: A glob that matches none.
        """
        names = ["model", *layers]
        names += [variant("model", seen_as) for name in names if (seen_as := split_variant(name)[1])]
        for alert in self._alerts:
            for glob in alert.globs:
                if not any(_matches(name, glob) for name in names):
                    raise ValueError(
                        f"the pattern {glob!r} in layers= of the rule {alert.rule!r} matches none of the "
                        f"{len(names)} layers: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                    )

    def extend(self, other: AlertWatch) -> None:
        """Watch the rules of another one, too."""
        self._alerts += other._alerts

    def check(self, record: FlipRecord) -> list[AlertEvent]:
        """Look at a record, log what came true, call back.

        Returns:
            What came true.
        """
        subjects = {f"model@{quantizer}" if quantizer else "model": model for quantizer, model in record.models.items()}
        subjects.update({layer.name: layer for layer in record.layers})
        news = {name: _watched(layer) for name, layer in subjects.items()}
        events = []
        for index, alert in enumerate(self._alerts):
            told = [
                event
                for name, values in news.items()
                if alert.value in values and alert.concerns(name)
                if (event := self._look(index, name, values[alert.value], record.step)) is not None
            ]
            if told:
                events += told
                for line in in_lines(told):
                    logger.warning("weightflip: %s", line)
                self._call_back(index, told)
        return events

    def _look(self, index: int, layer: str, value: float, step: int) -> AlertEvent | None:
        alert, episode = self._alerts[index], self._episodes.setdefault((index, layer), _Episode())
        episode.highest = max(episode.highest, value)
        if alert.comparison == "drops":
            holds = episode.highest > 0 and value <= episode.highest * (1 - alert.bound)
        else:
            holds = _COMPARISONS[alert.comparison](value, alert.bound)
        if not holds:
            episode.since, episode.is_told = None, False
            return None
        since = episode.since = step if episode.since is None else episode.since
        if episode.is_told or step - since < alert.steps:
            return None
        episode.is_told = True
        of_highest = f" of {episode.highest:.4g}" if alert.comparison == "drops" else ""
        when = f", since step {since}" if since < step else ""
        message = f"step {step}: {alert.rule}: {shown(layer)} ({value:.4g}{of_highest}{when})"
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
            # Later: a warning may be an error, and the other rules have not been watched yet.
            self._untold.append(
                f"weightflip: the callback of {self._alerts[index].rule!r} failed and is not called again, training "
                f"goes on: {type(error).__name__}: {error}"
            )

    def take_warnings(self) -> list[str]:
        """What has not been warned about yet."""
        untold, self._untold = self._untold, []
        return untold

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_alerts": [_picklable(alert) for alert in self._alerts]}

    def __deepcopy__(self, memo: dict[int, Any]) -> AlertWatch:
        twin = AlertWatch()
        twin._alerts = list(self._alerts)
        twin._episodes = {key: replace(episode) for key, episode in self._episodes.items()}
        return twin


def _matches(layer: str, glob: str) -> bool:
    """Also under the name that it has with any of several quantizers."""
    return fnmatchcase(layer, glob) or fnmatchcase(split_variant(layer)[0], glob)


def _watched(layer: LayerRecord) -> dict[str, float]:
    counted = {_NONFINITE: float(layer.nonfinite)} if layer.window.weight_steps else {}
    return {**layer.news, **counted}


def _picklable(alert: Alert) -> Alert:
    try:
        pickle.dumps(alert.callback)
    except Exception as error:
        warnings.warn(f"weightflip: a callback in alerts= is not pickled with the optimizer: {error}", stacklevel=2)
        return replace(alert, callback=None)
    return alert
