"""From options to a session: puts the parts together."""

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
from weightflip.sinks import BesideSink, SinkGroup, TensorBoardSink, make_sinks


def start(optimizer: Optimizer, model: nn.Module | None, options: Options) -> Session:
    """The session of an optimizer.

    Args:
        optimizer: What steps the weights.
        model: What holds them, for names and quantizers.
        options: What was asked for.

    Raises:
        TypeError: A sink or an alert is of a type that nobody knows.
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


def _check_layer_values(asked: Any, known: Sequence[str]) -> None:
    for name in () if asked is None or asked == "all" else asked:
        if name not in known:
            raise ValueError(
                f"unknown number {name!r} in layer_values=; {checks.did_you_mean(name, known)}Expected 'all' or names "
                f"among {', '.join(sorted(set(known)))}, which grow with metrics="
            )


def _make_log(options: Options) -> Log:
    log_dir, sinks = options.log_dir, options.sinks
    # Other processes do not even look at the place.
    is_writer = distributed.is_writer()
    if sinks is None:
        if not is_writer:
            return Log(SinkGroup([]), is_wanted=True)
        # Its type is checked: a path.
        tensorboard = TensorBoardSink(log_dir, layer_values=options.layer_values)  # type: ignore[arg-type]
        return Log(SinkGroup([tensorboard, BesideSink(tensorboard)]), is_wanted=True)
    if log_dir is not None:
        raise ValueError("log_dir= says where the default sink writes; with sinks= give SummaryWriter(log_dir) there")
    if isinstance(sinks, Tracked):
        return sinks._session.log
    if isinstance(sinks, (str, PathLike)) or not isinstance(sinks, Sequence):
        raise TypeError(f"sinks= is a list, got {type(sinks).__name__}; put it in brackets: sinks=[...]")
    if any(isinstance(sink, Tracked) for sink in sinks):
        raise TypeError("another tracked optimizer stands alone, not in a list: sinks=first")
    made = make_sinks(sinks, options.layer_values) if is_writer else []
    return Log(SinkGroup(made), is_wanted=bool(sinks))
