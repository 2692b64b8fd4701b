"""The keyword arguments that both forms of tracking share, checked in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Literal, TypedDict

from weightflip import checks
from weightflip.metrics.columns import METRICS, MetricsLike
from weightflip.session.alerts import Alert


class TrackingOptions(TypedDict, total=False):
    """The keyword arguments of :class:`FlipTrackingOptimizer`, for type checkers."""

    quantizer: Any
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    groups: Mapping[str, str | Sequence[str]] | str | None
    metrics: MetricsLike
    oscillation_ema: float | tuple[float, float] | None
    sync_every: int | None
    track_every: int
    start_step: int
    end_step: int | None
    log_dir: str | PathLike[str] | None
    log_every: int
    layer_values: str | Sequence[str] | None
    sinks: Any
    alerts: Sequence[str | Alert] | None
    low_memory: bool
    fresh_snapshots: bool
    backend: str


@dataclass(frozen=True)
class Options:
    """The keyword arguments of :class:`FlipTrackingOptimizer`, which documents them, with their types checked.

    Numbers become ints, flags bools, globs tuples. Everything beyond the type is checked where it is used: quantizers
    and globs against the parameters, metrics and backends by the tracker.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: A number is out of range.
    """

    quantizer: Any = "auto"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    groups: Mapping[str, str | Sequence[str]] | str | None = None
    metrics: MetricsLike = METRICS
    oscillation_ema: float | tuple[float, float] | None = None
    sync_every: int | None = None
    track_every: int = 1
    start_step: int = 0
    end_step: int | None = None
    log_dir: str | PathLike[str] | None = None
    log_every: int = 10
    layer_values: str | Sequence[str] | None = None
    sinks: Any = None
    alerts: Sequence[str | Alert] | None = None
    low_memory: bool = False
    fresh_snapshots: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        start_step = checks.whole_number("start_step", self.start_step, 0)
        end_step = self.end_step
        checked = {
            "include": _check_include(self.include),
            "exclude": None if self.exclude is None else checks.globs("exclude", self.exclude),
            "groups": _check_groups(self.groups),
            "sync_every": None if self.sync_every is None else checks.whole_number("sync_every", self.sync_every, 1),
            "track_every": checks.whole_number("track_every", self.track_every, 1),
            "start_step": start_step,
            "end_step": None if end_step is None else checks.whole_number("end_step", end_step, start_step + 1),
            "log_dir": None if self.log_dir is None else checks.path("log_dir=", self.log_dir),
            "log_every": checks.whole_number("log_every", self.log_every, 1, hint="for no output use sinks=[]"),
            "layer_values": _check_layer_values(self.layer_values),
            "alerts": _check_alerts(self.alerts),
            "low_memory": checks.flag("low_memory", self.low_memory),
            "fresh_snapshots": checks.flag("fresh_snapshots", self.fresh_snapshots),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def check_names(caller: str, options: Iterable[str]) -> None:
    """Raise for unknown keyword arguments.

    Args:
        caller: The function or class that was called, for the message.
        options: Names of the keyword arguments.

    Raises:
        TypeError: A name is unknown. The message suggests a similar name, or lists all.
    """
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            near = checks.closest_match(name, known)
            hint = f"did you mean '{near}='?" if near else f"expected {', '.join(known)}"
            raise TypeError(f"{caller} got an unexpected keyword argument {name!r}; {hint}")


def _check_include(include: Any) -> tuple[str, ...] | None:
    if include is None:
        return None
    globs = checks.globs("include", include)
    if not globs:
        raise ValueError("include= is empty, so nothing would be tracked; leave it out to track every weight")
    return globs


def _check_groups(groups: Any) -> Mapping[str, tuple[str, ...]] | str | None:
    if groups is None:
        return None
    if isinstance(groups, str) and groups in ("blocks", "type"):
        return groups
    if not isinstance(groups, Mapping) or not all(isinstance(group, str) and group for group in groups):
        raise TypeError(
            "groups= must be 'type', 'blocks', or a mapping from names to globs, such as {'attention': '*.attn.*'}; "
            f"got {groups!r}"
        )
    return {group: checks.globs(f"groups[{group!r}]", matching) for group, matching in groups.items()}


def _check_layer_values(values: Any) -> tuple[str, ...] | Literal["all"] | None:
    if values is None:
        return None
    if isinstance(values, str) and values == "all":
        return "all"
    named = (values,) if isinstance(values, str) else values
    if (
        isinstance(named, Mapping)
        or not isinstance(named, Iterable)
        or not all(isinstance(name, str) for name in named)
    ):
        raise TypeError(
            "layer_values= must be 'all' or a sequence of value names, such as ('flip_rate', 'stall_ratio'); "
            f"got {checks.describe(values)}"
        )
    return tuple(named)


def _check_alerts(alerts: Any) -> tuple[Any, ...] | None:
    if alerts is None:
        return None
    if isinstance(alerts, (str, Alert)):
        raise TypeError(f"alerts= must be a list, got {type(alerts).__name__}; put it in brackets: alerts=[...]")
    if not isinstance(alerts, Iterable) or isinstance(alerts, Mapping):
        raise TypeError(
            "alerts= must be a list of rules, each a string or an Alert, got "
            f"{checks.describe(alerts)}; to add a callback, use Alert(rule, callback=function)"
        )
    return tuple(alerts)
