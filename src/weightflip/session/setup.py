"""Assemble a session from the options."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from torch import nn
from torch.optim import Optimizer

from weightflip import checks, distributed
from weightflip.counting.tracker import WeightFlipTracker
from weightflip.session.alerts import AlertWatch
from weightflip.session.log import Log
from weightflip.session.options import Options
from weightflip.session.session import Session
from weightflip.session.tracked import Tracked
from weightflip.sinks import ReportFileSink, SinkGroup, TensorBoardSink, make_sinks


def start_session(optimizer: Optimizer, model: nn.Module | None, options: Options) -> Session:
    """Create the session of an optimizer.

    Args:
        optimizer: The optimizer to track.
        model: The model that holds its weights, for names and quantizers.
        options: The user's options.

    Raises:
        TypeError: A sink or an alert has an unknown type.
        ValueError: As :class:`~weightflip.FlipTrackingOptimizer`.
        OSError: A sink cannot be written.
        ImportError: The backend is not installed.
    """
    tracker = WeightFlipTracker(
        metrics=options.metrics,
        oscillation_ema=options.oscillation_ema,
        sync_every=options.sync_every,
        track_every=options.track_every,
        start_step=options.start_step,
        end_step=options.end_step,
        low_memory=options.low_memory,
        fresh_snapshots=options.fresh_snapshots,
        backend=options.backend,
    )
    settings = {
        "optimizer": type(optimizer).__name__,
        "metrics": "+".join(tracker.metrics),
        "track_every": str(options.track_every),
        "log_every": str(options.log_every),
    }
    if options.sync_every is not None:
        settings["sync_every"] = str(options.sync_every)
    _check_layer_values(
        options.layer_values, [*tracker.value_names, *(value.name for value in tracker.declared_values)]
    )
    session = Session(tracker, _make_log(options), model, options, settings)
    watch = AlertWatch(options.alerts, tracker.value_names)
    session.weights.select(optimizer, strict=True)
    watch.check_layers([*session.info.tracked, *session.info.skipped])
    session.log.sinks.claim()
    session.begin(optimizer)
    session.log.alerts.extend(watch)
    return session


def _check_layer_values(names: Any, known: Sequence[str]) -> None:
    for name in () if names is None or names == "all" else names:
        if name not in known:
            raise ValueError(
                f"unknown value {name!r} in layer_values=; {checks.did_you_mean(name, known)}Expected 'all' or names "
                f"among {', '.join(sorted(set(known)))}; metrics= adds more"
            )


def _make_log(options: Options) -> Log:
    log_dir, sinks = options.log_dir, options.sinks
    # Only the writer touches log_dir.
    is_writer = distributed.is_writer()
    if sinks is None:
        if not is_writer:
            return Log(SinkGroup([]), has_sinks=True)
        # Options has checked that log_dir is a path.
        tensorboard = TensorBoardSink(log_dir, layer_values=options.layer_values)  # type: ignore[arg-type]
        return Log(SinkGroup([tensorboard, ReportFileSink(tensorboard)]), has_sinks=True)
    if log_dir is not None:
        raise ValueError(
            "log_dir= is the directory of the default sink, which sinks= replaces; add SummaryWriter(log_dir) to sinks="
        )
    if isinstance(sinks, Tracked):
        return sinks._session.log
    if isinstance(sinks, (str, PathLike)) or not isinstance(sinks, Sequence):
        raise TypeError(f"sinks= must be a list, got {type(sinks).__name__}; put it in brackets: sinks=[...]")
    if any(isinstance(sink, Tracked) for sink in sinks):
        raise TypeError("sinks= must be another tracked optimizer itself, not a list with it; pass sinks=first")
    made = make_sinks(sinks, options.layer_values) if is_writer else []
    return Log(SinkGroup(made), has_sinks=bool(sinks))
