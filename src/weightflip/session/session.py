"""What happens around the steps of one optimizer: tracking before and after each, and counts in its checkpoints."""

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
from weightflip.records import RunInfo, shown
from weightflip.session.ending import Ending
from weightflip.session.guard import Guard, outside_of_graphs
from weightflip.session.log import Log, Source
from weightflip.session.options import Options
from weightflip.session.steps import is_phantom, is_real
from weightflip.session.unseen import UnseenSteps
from weightflip.session.weights import Weights

STATE_KEY = "flip_tracking"
"""Where the counts are in an optimizer's state dict."""


class Session:
    """What happens around the steps of one optimizer: which weights, counting, logging."""

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
        self._ending = Ending(log, self.source)
        self._unseen = UnseenSteps(log)
        self._log_every = options.log_every
        # From the beginning of a step to the end of what all processes do in it.
        self.tracker.holds_warnings = True
        self._calls = 0
        self._saw_capture = False
        self._start()

    def _start(self) -> None:
        self.tracker.take_weights_from(self.weights.holding, self.weights_of_now)
        self.tracker.take_summary_from(self.summary)
        self._found_inf: Tensor | None = None
        self._is_step: Tensor | None = None
        self._is_open = False

    def begin(self, optimizer: Optimizer) -> None:
        """Wait for steps. Before that nothing is changed outside, so that a call can still be refused."""
        self.log.join(self.source)
        self._unseen.watch(optimizer, self)

    @property
    def info(self) -> RunInfo:
        return self.source.info

    def summary(self, form: Callable[..., str] = summary.as_text) -> str:
        """What ``print(tracker)`` shows: all optimizers of the run in one table, and a step that was not seen.

        Args:
            form: Of steps, layers and a note.
        """
        return form(*self.log.totals(), self._unseen.text)

    # ------------------------------------------------------------------ one step

    def before(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Have the codes at hand."""
        self._is_open = False
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            self._unseen.end()
            self._leave_out_capture()
            return
        if is_phantom(optimizer):
            return
        self._unseen.end()
        # Objects with __slots__ have no __dict__.
        found_inf = getattr(optimizer, "__dict__", {}).get("found_inf")
        self._found_inf = found_inf if isinstance(found_inf, Tensor) else None
        # Before what may fail: other processes wait for the end of the step, too.
        self._is_open = True
        attempt = self._guard.attempt
        if self.tracker.is_tracking:
            self._take_up(optimizer)
        attempt(self.tracker.before_step, self.weights.tracked)
        self._is_step = None
        if not has_closure:
            attempt(self._look_for_step, optimizer)
        else:
            self.tracker.forget_gradients()

    def _take_up(self, optimizer: Optimizer) -> None:
        """Have the weights of now at hand, with what processes have to tell each other of them."""
        are_known = self._guard.attempt(self.weights.select, optimizer, strict=False)
        self.weights.expect_others(are_known=are_known)
        self._guard.attempt(self.weights.hold, optimizer)

    @contextmanager
    def weights_of_now(self) -> Iterator[Sequence[TrackedWeight]]:
        """The weights as a step that begins now would have them; also before the first one."""
        optimizer = self.weights.optimizer
        if optimizer is not None:
            self._take_up(optimizer)
        try:
            yield self.weights.tracked
        finally:
            if not self._is_open:
                self.weights.release()

    def _look_for_step(self, optimizer: Optimizer) -> None:
        # State is made before the first step. Later, some optimizers without state have a rate of 0, too.
        if not self._calls:
            self._is_step = is_real(optimizer, is_sharded=self.tracker.is_sharded)

    def _leave_out_capture(self) -> None:
        """Do nothing in a step that a CUDA graph records: host code does not run again when the graph is replayed."""
        if not self._saw_capture:
            self._saw_capture = True
            # Replays write weights without a trace.
            self.tracker.fresh_snapshots = True
            if not distributed.is_writer():
                return
            self.log.untold.append(
                "weightflip: a step that is captured in a CUDA graph, and its replays, are not tracked; to track them, "
                "leave optimizer.step() outside the graph"
            )

    def after(self) -> None:
        """Count; at a logging point, write."""
        # Closed already where a subclass's step calls its parent's, and torch runs the hooks of both.
        if not self._is_open:
            return
        try:
            self._count()
        finally:
            self.abort()

    def abort(self) -> None:
        """Let go of what is only held in a step: parameters and gradients."""
        self._is_open = False
        self.weights.release()
        self.tracker.forget_gradients()

    def _count(self) -> None:
        valid = None if self._found_inf is None else self._found_inf == 0
        if self._is_step is not None:
            valid = self._is_step if valid is None else valid & self._is_step.to(valid.device, non_blocking=True)
        self._guard.attempt(self.tracker.after_step, valid)
        self._calls += 1
        self._ending.arrange(self)
        if self._calls % self._log_every == 0:
            # A model that was converted meanwhile may have the very same parameters.
            self.weights.looks_again = not self.source.is_broken
            if self.log.is_led_by(self.source):
                self._guard.attempt(self.log.write)
                self._ending.note_record()

    # ------------------------------------------------------------------ from outside

    def guarded(self, action: Callable[..., None], *args: Any) -> None:
        """Run something that must not stop a training: a fault is warned about once, and tracking ends."""
        outside_of_graphs(self._guard.run, action, *args)

    def finish(self) -> None:
        """The end of a step, and then what there is to warn about."""
        outside_of_graphs(self._finish)

    def _finish(self) -> None:
        self._guard.run(self.after)
        self.log.tell()

    def flush(self) -> None:
        self.guarded(self.log.write)
        self.log.flush()

    def close(self, *, together: bool = True) -> None:
        """Write the last record and close the sinks."""
        self._unseen.tell()
        self.log.close(together=together)

    def end(self, *, together: bool = True) -> None:
        """Write the last record, and give memory back; the numbers stay."""
        self._unseen.tell()
        self._unseen.end(self._unseen.text)
        self._ending.come(together=together)
        self.tracker.drop_codes()
        self.weights.forget()

    # ------------------------------------------------------------------ checkpoints and copies

    def save_into(self, state_dict: dict[str, Any]) -> None:
        """Add the counts to an optimizer's state dict."""

        def add() -> None:
            state_dict[STATE_KEY] = self.state_dict()

        self.guarded(add)
        self.log.tell()

    def restore(self, state_dict: Any) -> None:
        """Go on from what ``save_into`` added. Counts that cannot be read must not stop a run."""
        try:
            self.load_state_dict(state_dict)
        except Exception as error:
            self.tracker.reset()
            self._calls = 0
            warnings.warn(
                "weightflip: the counts of this checkpoint cannot be read and start anew, the optimizer's state is "
                f"loaded: {type(error).__name__}: {shown(str(error))}",
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
        self.source.adopt(self)
        self._start()
