"""What happens around the steps of one optimizer: which weights are looked at, when, and what a fault may not do."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weightflip import distributed
from weightflip.counting import checkpoint
from weightflip.counting.layer import TrackedWeight
from weightflip.counting.tracker import WeightFlipTracker
from weightflip.quantizers.adapt import quantizer_name
from weightflip.quantizers.protocol import Quantizer
from weightflip.records import RunInfo, shown, split_variant, variant
from weightflip.selection import Plan, make_groups, make_plan, name_parameters, owner_types
from weightflip.session.log import Log, Source, restricted
from weightflip.session.options import Options

logger = logging.getLogger("weightflip")

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
        self._model = model
        # Not the options as a whole: copies and pickles cannot take what is in sinks= and alerts=.
        self._log_every = options.log_every
        self._selection = {"quantizer": options.quantizer, "include": options.include, "exclude": options.exclude}
        self._groups = options.groups
        self._settings = dict(settings)
        # From the beginning of a step to the end of what all processes do in it.
        self.tracker.holds_warnings = True
        self._calls = 0
        self._broken = False
        self._saw_capture = False
        self._names: list[list[str]] = []
        self._noted: set[str] = set()
        self._known: dict[str, tuple[Quantizer, ...] | str] = {}
        self._types: dict[str, str] = {}
        self._start()

    def _start(self) -> None:
        self.tracker.take_weights_from(self.holding)
        self._weights: list[TrackedWeight] = []
        self._places: list[int] = []
        self._optimizer: Callable[[], Optimizer | None] | None = None
        self._plan = Plan()
        self._seen: tuple[object, ...] = ()
        self._is_selecting = False
        self._shards: tuple[tuple[object, distributed.Layout], ...] = ()
        self._has_other_shards = self._has_compared = self._is_apart = False
        self._looks_again = True
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._found_inf: Tensor | None = None
        self._is_step: Tensor | None = None
        self._is_open = False
        self._has_logged = False

    def select(self, optimizer: Optimizer, *, strict: bool) -> None:
        """Look at the optimizer's parameters again, if they are not the ones of the last step.

        They are read from the groups each time: FSDP2 under Accelerate replaces them in place, and users add groups,
        freeze and unfreeze.
        """
        if self._is_apart:
            return
        every = _parameters(optimizer)
        seen = _described(every)
        if seen == self._seen and not (self._looks_again or self._is_selecting):
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
        self._seen, self._looks_again = seen, False
        # What is interrupted is.
        self._is_selecting = True
        try:
            self._select(optimizer, every, strict)
        except Exception:
            self._is_selecting = False
            raise
        self._is_selecting = False

    def _select(self, optimizer: Optimizer, every: Sequence[Tensor], strict: bool) -> None:
        param_groups = optimizer.param_groups
        parameters = name_parameters(param_groups, self._model, self._names)
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._names = [[names[id(p)] for p in group["params"]] for group in param_groups]
        others = [source for source in self.log.sources if source is not self.source]
        plan = make_plan(
            parameters,
            self._model,
            **self._selection,
            strict=strict,
            may_be_empty=bool(others),
            optimizer=optimizer,
            known=self._known,
        )
        self._plan = plan
        weights = [
            TrackedWeight(
                variant(name, quantizer_name(quantizer)) if name in plan.listed else name, parameters[name], quantizer
            )
            for name, quantizers in plan.tracked.items()
            for quantizer in quantizers
        ]
        skipped = dict(plan.skipped)
        taken = {name for source in others if source.is_live for name in source.info.tracked}
        if strict and (double := sorted(taken.intersection(weight.name for weight in weights))):
            raise ValueError(
                f"another optimizer of the same run tracks a weight called {double[0]!r}; give model= to both, so that "
                "each weight has its own name, or exclude= it from one"
            )
        skipped.update(
            {w.name: "another optimizer of this run tracks a weight of this name" for w in weights if w.name in taken}
        )
        weights = [weight for weight in weights if weight.name not in taken]
        for source in others:
            if not source.is_live:
                source.give_up_names({weight.name for weight in weights})
        for note in plan.notes:
            # Whatever the names behind it: under ZeRO-3 they may be others in each step.
            sentence = note.rpartition(" (")[0]
            if sentence not in self._noted:
                self._noted.add(sentence)
                self._say(note)
        if strict and not weights and not others:
            self._say(f"{plan.nothing_to_track}; they are looked at again at the first step, and whenever they change")
        # Again at the first step: until then a model may still be converted, which leaves its parameters what they are.
        self._looks_again = strict
        places = {id(parameter): place for place, parameter in reversed(list(enumerate(every)))}
        self._weights, self._places = weights, [places[id(weight.parameter)] for weight in weights]
        described = {
            weight.name: (
                "x".join(str(size) for size in weight.parameter.shape) or "scalar",
                str(weight.parameter.dtype).removeprefix("torch."),
                quantizer_name(weight.quantizer),
            )
            for weight in self._weights
        }
        self._optimizer = _reference(optimizer)
        self._release()
        # Kept, because a copy of an optimizer has no model in it.
        self._types.update(owner_types(parameters, self._model))
        tracked = list(dict.fromkeys(split_variant(weight.name)[0] for weight in weights))
        self.source.groups = make_groups(self._groups, list(parameters), self._types, tracked=tracked, strict=strict)
        groups = restricted(self.source.groups, set(tracked))
        if strict and self._groups == "blocks" and not groups and not others:
            self._say("groups='blocks' finds no block that repeats, such as layers.0 and layers.1, in the names")
        self.source.info = RunInfo(described, skipped, self._settings, plan.notes, groups, self.tracker.declared_values)
        if self.source not in self.log.sources:
            self.source.follow(self.log.sources)
            self.log.sources.append(self.source)

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
        seconds = int(distributed.PATIENCE.total_seconds())
        reason = f"sharded parameters were frozen, added or replaced on this process alone in {seconds} s"
        self.log.untold.append(
            f"weightflip: {reason}: what is tracked stays as it was before, without what is another one now; do the "
            "same to the parameters on all processes"
        )
        if max(self._places, default=0) >= len(seen):
            self.tracker.abandon()
            return
        for weight, place in zip(self._weights, self._places, strict=True):
            if seen[place] != self._seen[place]:
                self.tracker.give_up(weight.name, reason)
        self._seen, self._looks_again = seen, False

    def _say(self, text: str) -> None:
        """A line in the log that all processes would have: on the first one alone."""
        if distributed.is_writer():
            logger.warning("weightflip: %s", shown(text))

    @property
    def info(self) -> RunInfo:
        return self.source.info

    def _hold(self, optimizer: Optimizer) -> None:
        """Take the parameters at hand, until ``_release``."""
        every = _parameters(optimizer)
        for weight, place in zip(self._weights, self._places, strict=True):
            weight.parameter = every[place]

    def _release(self) -> None:
        for weight in self._weights:
            weight.release()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Have the parameters at hand between two tracked steps, if they are still those of the last one."""
        optimizer = None if self._optimizer is None else self._optimizer()
        are_held = any(weight.is_held for weight in self._weights)
        if are_held or optimizer is None or _described(_parameters(optimizer)) != self._seen:
            yield
            return
        self._hold(optimizer)
        try:
            yield
        finally:
            self._release()

    def before(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Have the codes at hand."""
        self._is_open = False
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            self._leave_out_capture()
            return
        if _is_phantom_step(optimizer):
            return
        # Objects with __slots__ have no __dict__.
        found_inf = getattr(optimizer, "__dict__", {}).get("found_inf")
        self._found_inf = found_inf if isinstance(found_inf, Tensor) else None
        # Before what may fail: other processes wait for the end of the step, too.
        self._is_open = True
        if self.tracker.is_tracking:
            are_known = self._attempt(self.select, optimizer, strict=False)
            if self._has_other_shards:
                self.tracker.expect_others(are_known=are_known)
                self._has_other_shards, self._has_compared = False, True
            self._attempt(self._hold, optimizer)
        self._attempt(self.tracker.before_step, self._weights)
        self._is_step = None
        if not has_closure:
            self._attempt(self._look_for_step, optimizer)
        else:
            self.tracker.forget_gradients()

    def _look_for_step(self, optimizer: Optimizer) -> None:
        """Find out, without waiting for the device, whether the coming step only makes the optimizer's state.

        Checkpoints of frameworks have it do so by a step with a learning rate of 0 and gradients of 0. Warm-ups begin
        with such a rate, too, and have other gradients. Where weights are sharded, a process may have nothing but zeros
        in its shards, or a state where others have none, so that all ask each other; the rate is the same on all.
        """
        if self._calls or not _has_zero_rates(optimizer):
            # State is made before the first step. Later, some optimizers without state have a rate of 0, too.
            return
        every = _parameters(optimizer)
        layouts = [layout for p in every if (layout := distributed.layout(p)) is not None and layout.shard is not None]
        if not self.tracker.is_sharded:
            # Sharded parameters that are not tracked (yet): nobody asks, and nobody decides alone.
            self._is_step = None if layouts or optimizer.state else _count_updates(every) != 0
            return
        try:
            flag = torch.ones((), dtype=torch.int64, device="cpu") if optimizer.state else _count_updates(every)
        except Exception:
            # What cannot be looked at counts. The others are asked for in any case.
            flag = torch.ones((), dtype=torch.int64, device="cpu")
        self._is_step = distributed.is_any(flag, layouts)

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
        self._release()
        self.tracker.forget_gradients()

    def _count(self) -> None:
        valid = None if self._found_inf is None else self._found_inf == 0
        if self._is_step is not None:
            valid = self._is_step if valid is None else valid & self._is_step.to(valid.device, non_blocking=True)
        self._attempt(self.tracker.after_step, valid)
        self._calls += 1
        if self._finalizer is None:
            # Also at garbage collection and at interpreter exit: a script that never calls close() loses no record. Not
            # before the first step: a copy that is thrown away writes nothing.
            self._finalizer = weakref.finalize(self, self.log.leave, self.source, os.getpid())
            self._write_before_others_exit()
            # Asked now, since processes may part before they write.
            self.log.find_writer()
        if self._calls % self._log_every == 0:
            # A model that was converted meanwhile may have the very same parameters.
            self._looks_again = not self._broken
            if self.log.is_led_by(self.source):
                self._attempt(self.log.write)
                if not self._has_logged:
                    self._has_logged = True
                    self._write_before_others_exit()

    def _write_before_others_exit(self) -> None:
        """At exit, what was registered last runs first, and finalizers come where the first of all was made.

        So the last record is written before wandb closes its runs, be they begun before the first step or with the
        first record.
        """
        assert self._finalizer is not None
        atexit.register(self._finalizer)

    def end(self, *, together: bool = True) -> None:
        """Write the last record, and give memory back; the numbers stay."""
        self.log.leave(self.source, os.getpid(), together=together)
        if self._finalizer is not None:
            self._finalizer.detach()
        self.tracker.drop_codes()
        self._model, self._weights, self._places = None, [], []

    def guarded(self, action: Callable[..., None], *args: Any) -> None:
        """Run something that must not stop a training: a fault is warned about once, and tracking ends."""
        self._outside_of_graphs(self._guarded, action, *args)

    def finish(self) -> None:
        """The end of a step, and then what there is to warn about."""
        self._outside_of_graphs(self._finish)

    def _finish(self) -> None:
        self._guarded(self.after)
        self.log.tell()

    def _outside_of_graphs(self, action: Callable[..., None], *args: Any) -> None:
        if torch.compiler.is_compiling():
            # Inside a compiled training step, tracking runs between two graphs: a graph would read a weight's data
            # pointer and version once, while it is traced. Not a decorator: that imports torch's compiler, which takes
            # as long as the whole of torch.
            torch.compiler.disable(action)(*args)  # type: ignore[no-untyped-call]
        else:
            action(*args)

    def _attempt(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> bool:
        """Do a part of a step. Where other processes wait for what follows, a fault in it ends tracking only.

        Returns:
            Whether it was done.
        """
        try:
            action(*args, **kwargs)
        except Exception as error:
            if not self.tracker.is_sharded:
                raise
            self._stop(error)
            return False
        return True

    def _guarded(self, action: Callable[..., None], *args: Any) -> None:
        if self._broken and not self.tracker.is_sharded:
            return
        try:
            action(*args)
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        was_broken, self._broken = self._broken, True
        if self.tracker.is_sharded:
            # Other processes count on, and wait for this one in each step.
            self.tracker.abandon()
        else:
            self.tracker.drop_codes()
            self._release()
        if not was_broken:
            self.log.untold.append(
                f"weightflip: tracking has stopped, training goes on: {type(error).__name__}: {error}"
            )

    def flush(self) -> None:
        self.guarded(self.log.write)
        self.log.flush()

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

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer has no model in it: what the model was asked is known from here on.
        known: dict[str, tuple[Quantizer, ...] | str] = {
            name: self._plan.skipped[name] for name in self._plan.skipped_by_model
        }
        known.update({n: q for n, q in self._plan.tracked.items() if (len(q) > 1) == (n in self._plan.listed)})
        of_process = ("_weights", "_places", "_optimizer", "_seen", "_shards", "_finalizer", "_plan")
        state = {k: v for k, v in self.__dict__.items() if k not in of_process}
        return {**state, "_model": None, "_known": {**self._known, **known}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.source.adopt(self)
        self._start()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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


def _reference(optimizer: Optimizer) -> Callable[[], Optimizer | None]:
    """Does not keep the optimizer alive, if it is of a class that allows that."""
    try:
        return weakref.ref(optimizer)
    except TypeError:
        # __slots__ without __weakref__
        return lambda: optimizer


def _is_phantom_step(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint is about to have the optimizer make its state.

    A process does so where it has no state, which the others may have. So this has to be known before anything that
    they take part in, and is seen by who calls; other callers' steps are known by what they are (``_look_for_step``).
    """
    if any("lr" in group for group in optimizer.param_groups) and not _has_zero_rates(optimizer):
        return False
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        frame = frame.f_back
    return frame.f_back is not None


def _has_zero_rates(optimizer: Optimizer) -> bool:
    """Whether all learning rates are 0, as far as that is known without waiting for the device."""
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    return bool(rates) and not any((isinstance(rate, Tensor) and rate.device.type != "cpu") or rate for rate in rates)


@torch.no_grad()
def _count_updates(parameters: Sequence[Tensor]) -> Tensor:
    """How many elements of the gradients are not 0, on this process: 0-dim, on the device of the first."""
    counts = []
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = distributed.local(parameter.grad)
            if gradient.layout is not torch.strided:
                gradient = gradient.to_sparse_coo().coalesce().values()  # type: ignore[no-untyped-call]
            counts.append(torch.count_nonzero(gradient))
    if not counts:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    return torch.stack([count.to(counts[0].device, non_blocking=True) for count in counts]).sum()
