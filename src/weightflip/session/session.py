"""Tracking before and after each step of one optimizer, and its counts in checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weightflip import distributed
from weightflip.counting import checkpoint, summary
from weightflip.counting.layer import TrackedWeight
from weightflip.counting.tracker import WeightFlipTracker
from weightflip.records import RunInfo, printable
from weightflip.session.guard import Guard, run_outside_graphs
from weightflip.session.last_record import LastRecord
from weightflip.session.log import Log, Source
from weightflip.session.missed_steps import MissedSteps
from weightflip.session.options import Options
from weightflip.session.steps import is_state_initialization, is_training_step
from weightflip.session.weights import Weights

STATE_KEY = "flip_tracking"
"""The key of the counts in an optimizer's state dict."""


class Session:
    """Tracks the steps of one optimizer: selects the weights, counts and logs."""

    def __init__(
        self,
        tracker: WeightFlipTracker,
        log: Log,
        model: nn.Module | None,
        options: Options,
        settings: Mapping[str, str],
    ) -> None:
        self.tracker = tracker
        self.log = log
        self.source = Source(tracker, self, options.groups)
        self.weights = Weights(tracker, log, self.source, model, options, settings)
        self._guard = Guard(tracker, self.weights, log, self.source)
        self._last_record = LastRecord(log, self.source)
        self._missed_steps = MissedSteps(log)
        self._log_every = options.log_every
        # Until the end of each step: a warning that raises must not keep other processes waiting in a collective.
        self.tracker.holds_warnings = True
        self._calls = 0
        self._has_warned_of_capture = False
        self._reset()

    def _reset(self) -> None:
        self.tracker.set_weight_access(self.weights.holding, self.current_weights)
        self.tracker.set_display(self.summary)
        self._found_inf: Tensor | None = None
        self._is_training_step: Tensor | None = None
        self._is_in_step = False

    def begin(self, optimizer: Optimizer) -> None:
        """Start waiting for steps. Until then nothing else has been changed, so that the call could still raise."""
        self.log.add_source(self.source)
        self._missed_steps.watch(optimizer, self)

    @property
    def info(self) -> RunInfo:
        return self.source.info

    def summary(self, form: Callable[..., str] = summary.as_text) -> str:
        """Return what ``print(tracker)`` shows: one table for all optimizers of the run, and a note on missed steps.

        Args:
            form: Formats steps, layers and a note.
        """
        return form(*self.log.totals(), self._missed_steps.text)

    # ------------------------------------------------------------------ one step

    def before_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Select the weights and encode them."""
        self._is_in_step = False
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            self._missed_steps.stop()
            self._skip_capture()
            return
        if is_state_initialization(optimizer):
            return
        self._missed_steps.stop()
        # Objects with __slots__ have no __dict__.
        found_inf = getattr(optimizer, "__dict__", {}).get("found_inf")
        self._found_inf = found_inf if isinstance(found_inf, Tensor) else None
        # Set before anything can fail: other processes also wait for this one at the end of the step.
        self._is_in_step = True
        attempt = self._guard.attempt
        if self.tracker.is_tracking:
            self._take_weights(optimizer)
        attempt(self.tracker.before_step, self.weights.tracked)
        self._is_training_step = None
        if not has_closure:
            attempt(self._check_first_step, optimizer)
        else:
            self.tracker.forget_gradients()

    def _take_weights(self, optimizer: Optimizer) -> None:
        """Select the weights and reference their parameters, with the collectives that this needs."""
        is_selection_known = self._guard.attempt(self.weights.select, optimizer, strict=False)
        self.weights.compare_changed_shards(is_selection_known=is_selection_known)
        self._guard.attempt(self.weights.hold, optimizer)

    @contextmanager
    def current_weights(self) -> Iterator[Sequence[TrackedWeight]]:
        """Yield the weights that a step would track now, also before the first step."""
        optimizer = self.weights.optimizer
        has_stopped = not self.source.is_live or (self.source.is_broken and not self.tracker.is_sharded)
        if optimizer is not None and not has_stopped:
            self._take_weights(optimizer)
        try:
            yield self.weights.tracked
        finally:
            if not self._is_in_step:
                self.weights.release()

    def _check_first_step(self, optimizer: Optimizer) -> None:
        # Optimizer state is initialized before the first step only. Later, an optimizer without state may legitimately
        # have a learning rate of 0.
        if not self._calls:
            self._is_training_step = is_training_step(optimizer, is_sharded=self.tracker.is_sharded)

    def _skip_capture(self) -> None:
        """Skip a step that is captured in a CUDA graph: host code does not run again when the graph is replayed."""
        if not self._has_warned_of_capture:
            self._has_warned_of_capture = True
            # Replays write weights without changing their version counters.
            self.tracker.fresh_snapshots = True
            if not distributed.is_writer():
                return
            self.log.pending_warnings.append(
                "weightflip: a step captured in a CUDA graph and its replays are not tracked; to track them, keep "
                "optimizer.step() outside the graph"
            )

    def after_step(self) -> None:
        """Count the step, and write a record at a logging point."""
        # If a subclass's step calls its parent's, torch runs the hooks of both; the second call does nothing.
        if not self._is_in_step:
            return
        try:
            self._count()
        finally:
            self._release()

    def abort_step(self) -> None:
        """End a step that raised an exception: release what is held only during a step."""
        self._guard.contain(self._release)

    def _release(self) -> None:
        """Release parameters and gradients."""
        self._is_in_step = False
        self.weights.release()
        self.tracker.abort_step()

    def _count(self) -> None:
        valid = None if self._found_inf is None else self._found_inf == 0
        if self._is_training_step is not None:
            is_training = self._is_training_step
            valid = is_training if valid is None else valid & is_training.to(valid.device, non_blocking=True)
        self._guard.attempt(self.tracker.after_step, valid)
        self._calls += 1
        self._last_record.register(self)
        if self._calls % self._log_every == 0:
            # A model may have been converted since, with its parameters unchanged.
            self.weights.needs_reselection = not self.source.is_broken
            if self.log.is_leader(self.source):
                self._guard.run(self.log.write)
                self._last_record.note_record()

    # ------------------------------------------------------------------ from outside

    def run_guarded(self, action: Callable[..., None], *args: Any) -> None:
        """Run an action whose faults must not stop training: a fault ends tracking, with one warning."""
        run_outside_graphs(self._guard.run, action, *args)

    def finish_step(self) -> None:
        """Finish a step, then issue the pending warnings."""
        run_outside_graphs(self._finish_step)

    def _finish_step(self) -> None:
        self._guard.run(self.after_step)
        self.log.emit_warnings()

    def flush(self) -> None:
        """Write what the optimizers of the run have counted, also if this one is no longer tracked."""
        run_outside_graphs(self._guard.contain, self.log.write)
        self.log.flush()

    def close(self, *, is_collective: bool = True) -> None:
        """Write the last record and close the sinks."""
        self._guard.contain(self._missed_steps.queue_warning)
        self.log.close(is_collective=is_collective)

    def end(self, *, is_collective: bool = True) -> None:
        """Write the last record and free memory. The numbers remain available."""
        self._guard.contain(self._missed_steps.finish)
        self._last_record.write_now(is_collective=is_collective)
        self._guard.contain(self.tracker.drop_codes)
        self._guard.contain(self.weights.clear)

    # ------------------------------------------------------------------ checkpoints and copies

    def save_into(self, state_dict: dict[str, Any]) -> None:
        """Add the counts to an optimizer's state dict."""

        def add() -> None:
            state_dict[STATE_KEY] = self.state_dict()

        self.run_guarded(add)
        self.log.emit_warnings()

    def restore(self, state_dict: Any) -> None:
        """Load what ``save_into`` added. Unreadable counts must not stop a run."""
        try:
            self.load_state_dict(state_dict)
        except Exception as error:
            self._guard.contain(self.tracker.reset)
            self._calls = 0
            warnings.warn(
                "weightflip: the optimizer's state is loaded, but the counts in this checkpoint cannot be read and "
                f"start from zero: {type(error).__name__}: {printable(str(error))}",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"tracker": self.tracker.state_dict(), "calls": self._calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not isinstance(state_dict, Mapping) or not {"tracker", "calls"} <= set(state_dict):
            raise ValueError(
                f"expected a dictionary with 'tracker' and 'calls' under {STATE_KEY!r}, got "
                + (str(sorted(map(str, state_dict))) if isinstance(state_dict, Mapping) else type(state_dict).__name__)
            )
        calls = checkpoint.count(state_dict["calls"], "'calls'")
        self.tracker.load_state_dict(state_dict["tracker"])
        self._calls = calls
        self.log.first_step = max(self.log.first_step, self.tracker.step_count)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.source.set_owner(self)
        self._reset()
