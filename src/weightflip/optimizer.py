"""The drop-in: puts the parts together and delegates everything else to the inner optimizer."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from weightflip import distributed
from weightflip.alerts import Alert, AlertWatch
from weightflip.detect import Plan, make_groups, make_plan, name_parameters, owner_types, quantizes_weights
from weightflip.layer import TrackedWeight
from weightflip.metrics.columns import METRICS, MetricsLike
from weightflip.quantizers.base import Quantizer, quantizer_name
from weightflip.records import Counts, FlipRecord, RunInfo, split_variant, variant
from weightflip.sinks import SinkGroup, TensorBoardSink, make_sink
from weightflip.tracker import WeightFlipTracker

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("weightflip")

_STATE_KEY = "flip_tracking"
_OWN_ATTRIBUTES = frozenset({"inner", "_tracking"})
# Set by torch.amp.GradScaler around the step of an optimizer that supports it; they have to reach that optimizer.
_AMP_ATTRIBUTES = frozenset({"grad_scale", "found_inf"})


class _Source:
    """One optimizer's part of a run."""

    def __init__(self, tracker: WeightFlipTracker, owner: _Tracking) -> None:
        self.info = RunInfo({}, {})
        self.groups: dict[str, tuple[str, ...]] = {}
        self._tracker: WeightFlipTracker | None = tracker
        self._last = FlipRecord(0, ())
        self._owner: weakref.ref[_Tracking] | None = weakref.ref(owner)
        self._first_step = 0

    @property
    def is_live(self) -> bool:
        """Whether steps still come from here: not after its end, and not in a copy of another optimizer's log."""
        return self._owner is not None and self._owner() is not None

    def adopt(self, owner: _Tracking) -> None:
        self._owner = weakref.ref(owner)

    def record(self) -> FlipRecord:
        """What was counted; after the end, the totals of then."""
        if self._tracker is not None:
            record = self._tracker.record(may_be_empty=True)
            assert record is not None
            names = {split_variant(layer.name)[0] for layer in record.layers}
            self._last = replace(record, step=self._first_step + record.step, groups=_restricted(self.groups, names))
        return self._last

    @property
    def is_sharded(self) -> bool:
        """Whether a record needs all processes."""
        return self._tracker is not None and self._tracker.is_sharded

    def synchronize(self) -> None:
        """Take part in a record that this process does not write."""
        if self._tracker is not None:
            self._tracker.synchronize(is_logging_point=True)

    def take_warnings(self) -> list[str]:
        """What the tracker has not warned about yet."""
        return [] if self._tracker is None else self._tracker.take_warnings()

    def follow(self, sources: Sequence[_Source]) -> None:
        """Count steps on from where optimizers left that have all come to their end."""
        if not any(source.is_live for source in sources):
            self._first_step = max((source.record().step for source in sources), default=0)

    def end(self) -> None:
        """Keep plain numbers, and let tensors go."""
        layers = (replace(layer, window=Counts(), nonfinite=0, gauges={}, histograms={}) for layer in self._last.layers)
        self._last = replace(self._last, layers=tuple(layers))
        self._tracker = self._owner = None

    def give_up_names(self, names: Set[str]) -> None:
        """After the end: another optimizer goes on with these weights."""
        self._last = replace(self._last, layers=tuple(x for x in self._last.layers if x.name not in names))
        self.info = replace(self.info, tracked={k: v for k, v in self.info.tracked.items() if k not in names})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None}


class _Log:
    """Takes records to the sinks: those of one optimizer, or of several that are one run, as one record."""

    def __init__(self, sinks: SinkGroup, *, is_wanted: bool) -> None:
        self.sinks = sinks
        self.alerts = AlertWatch()
        self.sources: list[_Source] = []
        self.first_step = 0
        self.untold: list[str] = []
        self._is_wanted = is_wanted
        self._is_writer = True

    def find_writer(self) -> bool:
        """Whether this process writes: of several, one does. Known from then on, also when they have parted."""
        self._is_writer = self._is_writer and distributed.is_writer()
        return self._is_writer

    def is_led_by(self, source: _Source) -> bool:
        """Whether this optimizer's steps say when to write: the first one's that is still at work."""
        return next((candidate for candidate in self.sources if candidate.is_live), None) is source

    def write(self) -> None:
        """Write what was counted since the last record, if anything.

        Where weights are sharded, every process comes here at the same steps, whether it writes or not, and takes part
        in exactly one collective for each optimizer.
        """
        is_writer = self.find_writer()
        is_used = bool(self.sinks) or bool(self.alerts)
        if not any(source.is_sharded for source in self.sources) and not (is_writer and is_used):
            return
        is_read = self._is_wanted or bool(self.alerts)
        records: list[FlipRecord] = []
        faults: list[Exception] = []
        for source in self.sources:
            try:
                if is_read:
                    records.append(source.record())
                else:
                    source.synchronize()
            except Exception as error:
                # The next source has a collective, too.
                faults.append(error)
        if faults:
            raise faults[0]
        if records and is_writer:
            merged = FlipRecord.merged(records)
            if merged.model.window.weight_steps:
                self._show(merged)

    def _show(self, record: FlipRecord) -> None:
        info = RunInfo.merged([source.info for source in self.sources])
        self._unless_warned(self.sinks.write, record, info, self.first_step)
        for event in self._unless_warned(self.alerts.check, record) or []:
            self._unless_warned(self.sinks.alert, event)

    def _unless_warned(self, action: Callable[..., Any], *args: Any) -> Any:
        """A sink or a callback that fails is warned about: where that is an error, it is raised later."""
        try:
            return action(*args)
        except Warning as error:
            self.untold.append(str(error))
            return None

    def tell(self) -> None:
        """Warn of what was found, now that no process waits for this one: a warning may be an error."""
        untold, self.untold = [text for source in self.sources for text in source.take_warnings()] + self.untold, []
        for text in untold:
            warnings.warn(text, stacklevel=2)

    def close(self, *, together: bool = True) -> None:
        """Write the last record and let the sinks go.

        Args:
            together: Whether all processes do so now. If not, what a sharded run has counted since its last record is
                not written: the others would be waited for.
        """
        self._write_last(together)
        self.sinks.close()
        self.tell()

    def leave(self, source: _Source, process: int, *, together: bool = False) -> None:
        """The end of one optimizer's part; with the last one, the sinks are closed."""
        if os.getpid() != process:
            # A forked process that ends: the record, and the threads that write it, are the parent's.
            return
        self._write_last(together)
        untold = source.take_warnings()
        source.end()
        self.untold += untold
        if not any(source.is_live for source in self.sources):
            self.sinks.close()
        self.tell()

    def _write_last(self, together: bool) -> None:
        if not together and any(source.is_sharded for source in self.sources):
            return
        try:
            self.write()
        except Exception as error:
            self.untold.append(f"weightflip: the last record is lost: {type(error).__name__}: {error}")


def _restricted(groups: Mapping[str, tuple[str, ...]], names: Set[str]) -> dict[str, tuple[str, ...]]:
    """What of the groups is among these names."""
    found = {group: tuple(name for name in members if name in names) for group, members in groups.items()}
    return {group: members for group, members in found.items() if members}


class TrackingOptions(TypedDict, total=False):
    """The keyword arguments of :class:`FlipTrackingOptimizer`."""

    quantizer: Any
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    groups: Mapping[str, str | Sequence[str]] | str | None
    metrics: MetricsLike
    oscillation_ema: float | tuple[float, float] | None
    track_every: int
    start_step: int
    end_step: int | None
    log_dir: str | PathLike[str] | None
    log_every: int
    sinks: Any
    alerts: Sequence[str | Alert] | None
    low_memory: bool
    fresh_snapshots: bool
    backend: str


class _Tracking:
    """What happens around the steps of one optimizer: which weights, counting, logging."""

    def __init__(
        self,
        tracker: WeightFlipTracker,
        log: _Log,
        log_every: int,
        model: nn.Module | None,
        selection: Mapping[str, Any],
        groups: Mapping[str, str | Sequence[str]] | str | None,
        settings: Mapping[str, str],
    ) -> None:
        self.tracker = tracker
        self.log = log
        self.source = _Source(tracker, self)
        self._log_every = log_every
        self._model = model
        self._selection = dict(selection)
        self._groups = groups
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
        self._weights: list[TrackedWeight] = []
        self._plan = Plan()
        self._seen: tuple[object, ...] = ()
        self._looks_again = True
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._found_inf: Tensor | None = None
        self._is_open = False
        self._has_logged = False

    def select(self, optimizer: Optimizer, *, strict: bool) -> None:
        """Look at the optimizer's parameters again, if they are not the ones of the last step.

        They are read from the groups each time: FSDP2 under Accelerate replaces them in place, and users add groups,
        freeze and unfreeze.
        """
        param_groups = optimizer.param_groups
        seen = tuple(
            (id(p), type(p), p.dtype, p.device.type, p.requires_grad) for group in param_groups for p in group["params"]
        )
        if seen == self._seen and not self._looks_again:
            return
        # Now, and not where all went well: what fails is not tried again on one process alone.
        self._seen, self._looks_again = seen, False
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
                logger.warning("weightflip: %s", note)
        # Again at the first step: until then a model may still be converted, which leaves its parameters what they are.
        self._looks_again = strict
        self._weights = weights
        described = {
            weight.name: (
                "x".join(str(size) for size in weight.parameter.shape) or "scalar",
                str(weight.parameter.dtype).removeprefix("torch."),
                quantizer_name(weight.quantizer),
            )
            for weight in self._weights
        }
        # Kept, because a copy of an optimizer has no model in it.
        self._types.update(owner_types(parameters, self._model))
        self.source.groups = make_groups(self._groups, list(parameters), self._types, strict=strict)
        groups = _restricted(self.source.groups, {split_variant(weight.name)[0] for weight in weights})
        self.source.info = RunInfo(described, skipped, self._settings, plan.notes, groups)
        if self.source not in self.log.sources:
            self.source.follow(self.log.sources)
            self.log.sources.append(self.source)

    @property
    def info(self) -> RunInfo:
        return self.source.info

    def before(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Have the codes at hand."""
        self._is_open = False
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            self._leave_out_capture()
            return
        if _is_phantom_step(optimizer):
            return
        found_inf = vars(optimizer).get("found_inf")
        self._found_inf = found_inf if isinstance(found_inf, Tensor) else None
        # Before what may fail: other processes wait for the end of the step, too.
        self._is_open = True
        if self.tracker.is_tracking:
            seen = self._seen
            if not self._attempt(self.select, optimizer, strict=False) and self._seen != seen:
                self.tracker.abandon(knows_weights=False)
        self._attempt(self.tracker.before_step, self._weights)
        if has_closure:
            self.tracker.forget_gradients()

    def _leave_out_capture(self) -> None:
        """Do nothing in a step that a CUDA graph records: host code does not run again when the graph is replayed."""
        if not self._saw_capture:
            self._saw_capture = True
            # Replays write weights without a trace.
            self.tracker.fresh_snapshots = True
            self.log.untold.append(
                "weightflip: a step that is captured in a CUDA graph, and its replays, are not tracked; to track them, "
                "leave optimizer.step() outside the graph"
            )

    def after(self) -> None:
        """Count; at a logging point, write."""
        # Closed already where a subclass's step calls its parent's, and torch runs the hooks of both.
        if not self._is_open:
            return
        self._is_open = False
        self._attempt(self.tracker.after_step, None if self._found_inf is None else self._found_inf == 0)
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
        self._model, self._weights = None, []

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
        if torch.is_inference_mode_enabled():
            # Tensors that are made in it cannot be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._guarded(action, *args)
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
        if not was_broken:
            self.log.untold.append(
                f"weightflip: tracking has stopped, training goes on: {type(error).__name__}: {error}"
            )

    def flush(self) -> None:
        self.guarded(self.log.write)
        self.log.sinks.flush()
        self.log.tell()

    def save_into(self, state_dict: dict[str, Any]) -> None:
        """Add the counts to an optimizer's state dict."""

        def add() -> None:
            state_dict[_STATE_KEY] = self.state_dict()

        self.guarded(add)
        self.log.tell()

    def restore(self, state_dict: Any) -> None:
        """Go on from what ``save_into`` added. Counts that cannot be read must not stop a run."""
        try:
            self.load_state_dict(state_dict)
        except Exception as error:
            warnings.warn(
                "weightflip: the counts of this checkpoint cannot be read and start anew, the optimizer's state is "
                f"loaded: {type(error).__name__}: {error}",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"tracker": self.tracker.state_dict(), "calls": self._calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        calls = int(state_dict["calls"])
        self.tracker.load_state_dict(state_dict["tracker"])
        self._calls = calls
        self.log.first_step = max(self.log.first_step, self.tracker.step_count)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer has no model in it: what the model was asked is known from here on.
        known: dict[str, tuple[Quantizer, ...] | str] = {
            name: self._plan.skipped[name] for name in self._plan.skipped_by_model
        }
        known.update({n: q for n, q in self._plan.tracked.items() if (len(q) > 1) == (n in self._plan.listed)})
        state = {k: v for k, v in self.__dict__.items() if k not in ("_weights", "_seen", "_finalizer", "_plan")}
        return {**state, "_model": None, "_known": {**self._known, **known}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.source.adopt(self)
        self._start()


class FlipTrackingOptimizer(Optimizer):
    """Wraps an optimizer and shows how the quantized weights move. Training is bit for bit what it was.

    A step does this:

    1. The codes of the weights before the step are those kept from the last step. A weight that is new or was written
       in between (a loaded checkpoint, an EMA swap) is encoded now, so that this change is no flip.
    2. ``inner.step(closure)`` runs, and its result is returned.
    3. Each weight is encoded anew and compared: flips, updates (``grad != 0``) and stalled updates are added to
       counters on the weight's device. Nothing waits for the device.
    4. Every ``log_every`` steps the counters are read, in one transfer, and written to the sinks.

    Everything else, ``param_groups`` and ``state`` included, is the inner optimizer's own. A fault while tracking or
    writing warns once and lets training go on.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, built as before.
        model: Gives the layers their names and, for ``quantizer="auto"``, tells how each weight is quantized. Without
            it names come from the groups' ``param_names``, else from the place (``group0.param3``).
        quantizer: ``"auto"``, a name (``"float8_e4m3"``, ``"e3m4:row"``, ``"bfloat16"``, ...), a ``FloatFormat``, an
            object with ``encode(weight)``, a function from a weight to its quantized values, a list of these to see the
            same weights through several formats, or a mapping from globs over parameter names to any of them, of which
            the first that matches counts.
        include: Globs over parameter names; None for every floating-point weight with two dimensions or more, and
            for the flat parameters of FSDP1 and the partitions of ZeRO-3.
        exclude: Globs over parameter names.
        groups: Layers whose sums are shown beside the single ones: name to globs over parameter names, such as
            ``{"attention": "*.attn.*", "mlp": ["*.fc1.*", "*.fc2.*"]}``, or ``"type"`` for a group of each type of
            module.
        metrics: ``"flips"``, ``"stalls"``, and the groups ``"oscillation"``, ``"coverage"``, ``"scale"``, ``"travel"``,
            ``"range"``, ``"rank"``; a mapping, such as ``{"flips": 1, "travel": 10}``, has a group look at every tenth
            tracked step only.
        oscillation_ema: Momentum of the moving average of each weight's oscillation frequency, such as 0.01, or a tuple
            of it and the threshold above which a weight counts as oscillating.
        track_every: Track every n-th step.
        start_step: First step to track, from 0.
        end_step: Track no step from this one on.
        log_dir: Where TensorBoard files go; None for ``SummaryWriter``'s own default place. Made at the first record.
        log_every: Steps between two records.
        sinks: Instead of TensorBoard in ``log_dir``: ``SummaryWriter`` objects, ``wandb`` runs, paths that end in
            ``.jsonl`` or ``.csv``, functions of a :class:`FlipRecord`, ``Sink`` objects. An empty list keeps the
            numbers and writes nothing. Another tracked optimizer, or its handle, instead of a list: the two are parts
            of one run and written as one record, at the logging points of the first.
        alerts: Rules over the numbers, as text such as ``"stall_ratio > 0.99 for 200 steps"`` or :class:`Alert`. Of
            several optimizers that are one run, all rules watch all layers.
        low_memory: Drop the codes after each step; a second encoding instead of a byte a weight.
        fresh_snapshots: Encode anew before each step, for scripts that write weights through ``.data``.
        backend: ``"auto"``, ``"eager"``, ``"numba"`` or ``"triton"``, as in :class:`WeightFlipTracker`.

    Attributes:
        inner: The wrapped optimizer.
        tracker: The :class:`WeightFlipTracker`, with the numbers.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or ``model`` no module.
        ValueError: An unknown quantizer or metric, a pattern that matches nothing, a format that a weight does not fit,
            nothing to track, a rule that cannot be read, or a step number that makes no sense.
        OSError: ``log_dir``, or a file of ``sinks``, cannot be written.
        ImportError: ``backend="numba"`` without Numba.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = FlipTrackingOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), model, quantizer="e3m4", sinks=[]
        ... )
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.tracker.get_update_counts()
        {'weight': 8}
    """

    inner: Optimizer
    _tracking: _Tracking

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        *,
        quantizer: Any = "auto",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        groups: Mapping[str, str | Sequence[str]] | str | None = None,
        metrics: MetricsLike = METRICS,
        oscillation_ema: float | tuple[float, float] | None = None,
        track_every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        log_dir: str | PathLike[str] | None = None,
        log_every: int = 10,
        sinks: Sequence[Any] | FlipTrackingOptimizer | FlipTrackingHandle | None = None,
        alerts: Sequence[str | Alert] | None = None,
        low_memory: bool = False,
        fresh_snapshots: bool = False,
        backend: str = "auto",
    ) -> None:
        # Not super().__init__(): it would make a second set of groups and state beside the inner optimizer's.
        _check_optimizer(optimizer, model)
        if not isinstance(log_every, int) or isinstance(log_every, bool) or log_every < 1:
            raise ValueError(
                f"log_every= is a whole number of at least 1, got {log_every!r}; for no output use sinks=[]"
            )
        tracker = WeightFlipTracker(
            metrics=metrics,
            oscillation_ema=oscillation_ema,
            track_every=track_every,
            start_step=start_step,
            end_step=end_step,
            low_memory=low_memory,
            fresh_snapshots=fresh_snapshots,
            backend=backend,
        )
        settings = {
            "optimizer": type(optimizer).__name__,
            "metrics": "+".join(tracker.metrics),
            "track_every": str(track_every),
            "log_every": str(log_every),
        }
        tracking = _Tracking(
            tracker,
            _make_log(log_dir, sinks),
            log_every,
            model,
            {"quantizer": quantizer, "include": include, "exclude": exclude},
            groups,
            settings,
        )
        watch = AlertWatch(alerts, tracker.value_names)
        tracking.select(optimizer, strict=True)
        watch.check_layers([*tracking.info.tracked, *tracking.info.skipped])
        tracking.log.alerts.extend(watch)
        self.__dict__.update(inner=optimizer, _tracking=tracking)

    @property
    def info(self) -> RunInfo:
        """What is tracked and how, what is skipped and why; ``print`` shows it."""
        return self._tracking.info

    @property
    def tracker(self) -> WeightFlipTracker:
        """The numbers."""
        return self._tracking.tracker

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Do the inner optimizer's step and count what it did to the quantized weights.

        Args:
            closure: Passed on where it is given.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            What the inner optimizer's step returns.
        """
        tracking, inner = self._tracking, self.inner
        tracking.guarded(tracking.before, inner, closure is not None)
        try:
            result = inner.step(closure, *args, **kwargs) if args or closure is not None else inner.step(**kwargs)
        except BaseException:
            # Whoever catches it may want the memory of the gradients, of which the tracker holds references.
            tracking.tracker.forget_gradients()
            raise
        tracking.finish()
        return result

    # Tells torch's step-patching machinery that this step runs the hooks already: the inner one's does.
    step.hooked = True  # type: ignore[attr-defined]

    def _patch_step_function(self) -> None:
        """Nothing to patch: see ``step.hooked``."""

    def flush(self) -> None:
        """Write what was counted since the last record, and have it on disk."""
        self._tracking.flush()

    def close(self) -> None:
        """Write the last record and close the sinks. Steps go on being counted, and open them again if they log."""
        self._tracking.log.close()

    def __enter__(self) -> FlipTrackingOptimizer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # After an error, the other processes of a sharded run may not come here.
        self._tracking.log.close(together=exc_info[0] is None)

    # ------------------------------------------------------------------ the inner optimizer's

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's. Never an alias kept here: ``load_state_dict`` rebinds it."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's; nothing of this wrapper's is in it."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner.defaults = value

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self.inner.zero_grad(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Passed on; new weights are tracked from their first step on."""
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and the counts under ``"flip_tracking"``; a bare optimizer can load it."""
        state = dict(self.inner.state_dict())
        self._tracking.save_into(state)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what a wrapped or a bare optimizer saved. Without counts in it, they go on from where they are.

        Counts that cannot be read are warned about: a checkpoint of another version must not stop a run.
        """
        inner_state = {key: value for key, value in state_dict.items() if key != _STATE_KEY}
        self.inner.load_state_dict(inner_state)
        if _STATE_KEY in state_dict:
            self._tracking.restore(state_dict[_STATE_KEY])

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self.inner.register_step_pre_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self.inner.register_step_post_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_state_dict_pre_hook(lambda _: hook(self), prepend=prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_state_dict_post_hook(lambda _, state: hook(self, state), prepend=prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_load_state_dict_pre_hook(lambda _, state: hook(self, state), prepend=prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_load_state_dict_post_hook(lambda _: hook(self), prepend=prepend)

    def __getattr__(self, name: str) -> Any:
        # Only asked where the usual look-up fails. Dunder and own names never go to the inner optimizer, or copy and
        # pickle, which ask a half-made object, would recurse.
        if name in _OWN_ATTRIBUTES or name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._belongs_to_inner(name):
            setattr(self.inner, name, value)
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if self._belongs_to_inner(name):
            delattr(self.inner, name)
        else:
            object.__delattr__(self, name)

    def _belongs_to_inner(self, name: str) -> bool:
        if "inner" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name):
            return False
        return name in _AMP_ATTRIBUTES or hasattr(self.inner, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def __getstate__(self) -> dict[str, Any]:
        # What others patched on the instance (a scheduler's step) is bound to this object and stays with it.
        return {"inner": self.inner, "_tracking": self._tracking}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "inner" in state:
            self.__dict__.update(state)
        else:
            self.inner.__setstate__(state)


def _check_optimizer(optimizer: Any, model: Any) -> None:
    if isinstance(optimizer, type):
        raise TypeError(
            f"expected an optimizer, got the class {optimizer.__name__}; "
            f"build it first: FlipTrackingOptimizer({optimizer.__name__}(model.parameters()), model)"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "expected a torch.optim.Optimizer such as torch.optim.AdamW(model.parameters()), "
            f"got {type(optimizer).__name__}"
        )
    hooks = vars(optimizer).get("_optimizer_step_pre_hooks", {})
    is_hooked = any(isinstance(getattr(hook, "__self__", None), FlipTrackingHandle) for hook in hooks.values())
    if is_hooked or isinstance(optimizer, FlipTrackingOptimizer):
        raise TypeError(
            "this optimizer is tracked already, and its checkpoints hold one set of counts; to see the weights through "
            "several formats give quantizer= a list of them"
        )
    if type(optimizer).__name__ == "AcceleratedOptimizer":
        # Its step does nothing in a micro-batch that only accumulates gradients, and each would count as a step.
        raise TypeError(
            "expected the optimizer as it is before accelerator.prepare(), got an AcceleratedOptimizer; "
            "track first, then prepare"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model= is a torch.nn.Module or None, got {type(model).__name__}")


def _make_log(log_dir: str | PathLike[str] | None, sinks: Any) -> _Log:
    # Other processes do not even look at the place.
    is_writer = distributed.is_writer()
    if sinks is None:
        place = None if log_dir is None else fspath(log_dir)
        return _Log(SinkGroup([TensorBoardSink(place)] if is_writer else []), is_wanted=True)
    if log_dir is not None:
        raise ValueError("log_dir= says where the default sink writes; with sinks= give SummaryWriter(log_dir) there")
    if isinstance(sinks, (FlipTrackingOptimizer, FlipTrackingHandle)):
        return sinks._tracking.log
    if isinstance(sinks, (str, PathLike)) or not isinstance(sinks, Sequence):
        raise TypeError(f"sinks= is a list, got {type(sinks).__name__}; put it in brackets: sinks=[...]")
    if any(isinstance(sink, (FlipTrackingOptimizer, FlipTrackingHandle)) for sink in sinks):
        raise TypeError("another tracked optimizer stands alone, not in a list: sinks=first")
    return _Log(SinkGroup([make_sink(spec) for spec in sinks] if is_writer else []), is_wanted=bool(sinks))


def _is_phantom_step(optimizer: Optimizer) -> bool:
    """Whether the coming step only makes the optimizer's state, as torch.distributed.checkpoint has it do.

    It does so at a learning rate of 0, with gradients of 0, where the optimizer has no state. Each process finds that
    out by itself: a state may be on one process only, a shard of zeros tells nothing about others, and to ask them or
    the device would be to wait. So it is seen by who calls.
    """
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates) or any(rates):
        return False
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        frame = frame.f_back
    return frame.f_back is not None


class FlipTrackingHandle:
    """What :func:`track_flips` returns.

    Attributes:
        tracker: The :class:`WeightFlipTracker`, with the numbers.
        info: What is tracked and how, what is skipped and why; ``print`` shows it.
    """

    def __init__(self, optimizer: Optimizer, tracking: _Tracking) -> None:
        self._tracking = tracking
        self._loading: Any = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._save_counts),
            optimizer.register_load_state_dict_pre_hook(self._take_counts),
            optimizer.register_load_state_dict_post_hook(self._restore_counts),
        ]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        self._tracking.guarded(self._tracking.before, optimizer, closure is not None)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._tracking.finish()

    def _save_counts(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._tracking.save_into(state_dict)

    def _take_counts(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loading = state_dict.get(_STATE_KEY)
        return {key: value for key, value in state_dict.items() if key != _STATE_KEY}

    def _restore_counts(self, optimizer: Optimizer) -> None:
        if self._loading is not None:
            self._tracking.restore(self._loading)
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the optimizer has no hooks.
        return {"_tracking": self._tracking, "_loading": None, "_hooks": []}

    @property
    def tracker(self) -> WeightFlipTracker:
        return self._tracking.tracker

    @property
    def info(self) -> RunInfo:
        return self._tracking.info

    def flush(self) -> None:
        """Write what was counted since the last record, and have it on disk."""
        self._tracking.flush()

    def close(self) -> None:
        """Write the last record and close the sinks. Steps go on being counted, and open them again if they log."""
        self._tracking.log.close()

    def remove(self) -> None:
        """Stop tracking, write the last record and close the sinks; the numbers stay, memory is given back."""
        self._remove(together=True)

    def _remove(self, *, together: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._tracking.end(together=together)

    def __enter__(self) -> FlipTrackingHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._remove(together=exc_info[0] is None)


def track_flips(
    optimizer: Optimizer, model: nn.Module | None = None, **options: Unpack[TrackingOptions]
) -> FlipTrackingHandle:
    """Count flips at each step of an optimizer that stays the very same object, through its hooks.

    For code that insists on its own optimizer class. The numbers, and the optimizer's checkpoints, are those of
    :class:`FlipTrackingOptimizer`. Copies of the optimizer are not tracked, since copying drops hooks. Of a class whose
    ``step`` calls that of its parent class, torch runs the hooks twice, and what the parent's does is seen.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        model: As in :class:`FlipTrackingOptimizer`, which explains all of these.
        **options: The keyword arguments of :class:`FlipTrackingOptimizer`.

    Returns:
        A handle with the numbers in ``tracker``, and ``remove()``; also a context manager.

    Raises:
        TypeError: As :class:`FlipTrackingOptimizer`; or the optimizer has no hooks, which wrappers of other libraries
            lack.
        ValueError: As :class:`FlipTrackingOptimizer`.
        OSError: As :class:`FlipTrackingOptimizer`.
        ImportError: As :class:`FlipTrackingOptimizer`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = track_flips(optimizer, model, quantizer="e3m4", sinks=[])
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> handle.tracker.get_update_counts()
        {'weight': 8}
    """
    tracking = FlipTrackingOptimizer(optimizer, model, **options)._tracking
    if quantizes_weights(optimizer):
        raise TypeError(
            f"the hooks of {type(optimizer).__name__} run around the optimizer inside it, before the weights are "
            "quantized; use FlipTrackingOptimizer(optimizer, model)"
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{type(optimizer).__name__} has no step hooks; call track_flips on the optimizer inside it, or wrap that "
            "one in FlipTrackingOptimizer first"
        )
    return FlipTrackingHandle(optimizer, tracking)
