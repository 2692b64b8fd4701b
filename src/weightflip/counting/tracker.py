"""The tracker: its options, the steps, and the counts."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from weightflip import checks, distributed, kernels
from weightflip.counting import summary, totals
from weightflip.counting.batch import Batch
from weightflip.counting.batched import BatchedRoute
from weightflip.counting.columns import Columns
from weightflip.counting.current import CurrentLayers
from weightflip.counting.display import DisplayMixin
from weightflip.counting.gathered import Bucket, GatheredRoute
from weightflip.counting.history import History
from weightflip.counting.layer import CodeState, Layer, TrackedWeight
from weightflip.counting.marks import SyncMarks
from weightflip.counting.metric_runner import MetricRunner
from weightflip.counting.named import NamedSnapshots
from weightflip.counting.nonfinite import count_nonfinite
from weightflip.counting.notices import Notices, WarningsMixin
from weightflip.counting.routes import ElementwiseRoute, Gradients, WholeWeightRoute
from weightflip.counting.schedule import Progress, Schedule, ScheduleMixin
from weightflip.counting.sharding import Sharding
from weightflip.counting.silent_writes import SilentWrites
from weightflip.counting.table import LayerTable
from weightflip.counting.totals import Totals
from weightflip.counting.unsharded import UnshardedRun
from weightflip.metrics import CORE_VALUES
from weightflip.metrics.columns import METRICS, MetricsLike, make_groups
from weightflip.records import Counts, FlipRecord, Value


class MemoryUsage(NamedTuple):
    """Bytes that a tracker holds between steps.

    Attributes:
        codes: The codes of the weights: one byte per weight for formats of up to 8 bits.
        counters: A few numbers per layer.
        buffers: Scratch memory. Its size is fixed once every format has been encoded.
        metrics: The per-weight state of metric groups.
    """

    codes: int
    counters: int
    buffers: int
    metrics: int = 0


HoldWeights: TypeAlias = Callable[[], AbstractContextManager[None]]
CurrentWeights: TypeAlias = Callable[[], AbstractContextManager[Sequence[TrackedWeight]]]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _without_autograd(method: _Method) -> _Method:
    """Disable gradients and inference mode, since tensors made in inference mode cannot be written to later."""
    without_grad = torch.no_grad()(method)
    without_inference_mode = torch.inference_mode(False)(without_grad)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Usually one of the two is enough. Right after a backward pass, with cold caches, each takes some microseconds.
        return (without_inference_mode if torch.is_inference_mode_enabled() else without_grad)(*args, **kwargs)

    return cast(_Method, call)


def _check_weights(weights: Any) -> list[TrackedWeight]:
    found = list(weights) if isinstance(weights, Iterable) else [weights]
    for weight in found:
        if not isinstance(weight, TrackedWeight):
            raise TypeError(
                f"weights are TrackedWeight objects, got {checks.describe(weight)}; make each one with "
                "weightflip.counting.layer.TrackedWeight(name, parameter, quantizer), or wrap the optimizer in "
                "FlipTrackingOptimizer"
            )
    return found


class WeightFlipTracker(DisplayMixin, ScheduleMixin, WarningsMixin):
    """Counts how many weights change their quantized code in an optimizer step.

    There are two ways to use it. To count one weight at a time, by name, call ``snapshot_pre_step``, the optimizer's
    step, and ``compute_flips_post_step``. To count many weights at once without synchronizing with the device, as
    :class:`FlipTrackingOptimizer` does, call ``before_step``, the optimizer's step, ``after_step``, and ``record`` at
    logging points.

    Args:
        metrics: ``"flips"``, and what else to count: ``"stalls"`` (needs the gradients), the groups of
            :func:`weightflip.metrics.metric_names`, or ``Metric`` objects. A mapping also sets for each group the
            number of tracked steps between two evaluations.
        oscillation_ema: Momentum of the moving average of each weight's oscillation frequency, or a tuple of it and the
            threshold above which a weight counts as oscillating; see
            :class:`~weightflip.metrics.oscillation.Oscillation`.
        sync_every: For the groups ``"sync"`` and ``"touched"``: number of steps between two syncs. The weights before
            the first tracked step are the first sync. None: a sync is where ``mark_sync`` is called.
        track_every: Track every n-th step.
        start_step: The first step to track, counted from 0.
        end_step: The first step that is no longer tracked; None for no end.
        low_memory: Drop the codes after each step instead of keeping them for the next one. Saves one byte per weight
            for 8-bit formats, and costs a second encoding.
        fresh_snapshots: Encode the weights again before each step, for scripts that write weights through ``.data``,
            which leaves no trace.
        backend: ``"auto"`` for the fastest available, ``"eager"`` for plain torch, ``"numba"`` to require the compiled
            kernel for weights on the CPU, ``"triton"`` to require the one for weights on a GPU. All of them count the
            same: a kernel is tested before it is used. Plain torch counts what a kernel does not support or gets wrong.

    Raises:
        ValueError: Unknown metric or backend, ``"triton"`` without a GPU, or invalid step numbers.
        ImportError: ``backend="numba"`` without Numba, ``"triton"`` without Triton.

    Example:
        >>> tracker = WeightFlipTracker()
        >>> weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> tracker.snapshot_pre_step("fc", weight, "e4m3", grad=torch.ones(1, 4))
        >>> weight[0, 0] += 0.5
        >>> tracker.compute_flips_post_step("fc", weight, "e4m3")
        1
        >>> tracker.get_flip_rates(), tracker.get_stall_ratios()
        ({'fc': 0.25}, {'fc': 0.75})
    """

    def __init__(
        self,
        *,
        metrics: MetricsLike = METRICS,
        oscillation_ema: float | tuple[float, float] | None = None,
        sync_every: int | None = None,
        track_every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        low_memory: bool = False,
        fresh_snapshots: bool = False,
        backend: str = "auto",
    ) -> None:
        """Create a tracker that has counted nothing.

        Size: each option is a separate keyword, as in :class:`FlipTrackingOptimizer`.
        """
        kernels.check_backend(backend)
        names, self._groups = make_groups(metrics, oscillation_ema)
        self._schedule = Schedule(track_every, start_step, end_step)
        self._sync_every = sync_every
        self._columns = Columns(self._groups, with_updates="stalls" in names)
        self._notices = Notices()
        self.metrics = tuple(names)
        self.low_memory = checks.flag("low_memory", low_memory)
        self.fresh_snapshots = checks.flag("fresh_snapshots", fresh_snapshots)
        self.backend = backend
        self._hold_weights: weakref.WeakMethod[HoldWeights] | None = None
        self._current_weights: weakref.WeakMethod[CurrentWeights] | None = None
        self._show = None
        self.reset()

    def reset(self) -> None:
        """Reset all counts, including the number of steps."""
        with_updates = "stalls" in self.metrics
        self._schedule.progress = Progress()
        self._scratch = kernels.ScratchPool()
        self._layers = LayerTable(self._columns, self._schedule, self._notices)
        self._silent_writes = SilentWrites(self._layers, self._notices)
        self._named = NamedSnapshots(self._layers, self._scratch)
        self._totals = Totals(self._columns, self._layers, self._schedule, self._silent_writes)
        self._runner = MetricRunner(self._groups, self._schedule, self._notices, self._scratch, self.backend)
        self._marks = SyncMarks(self._runner, self._schedule, self._layers, self._notices, self._sync_every)
        parts = (self._layers, self._runner, self._scratch, self.backend, with_updates)
        elementwise = ElementwiseRoute(*parts)
        self._batched = BatchedRoute(self._layers, elementwise, self._runner, self.backend, with_updates)
        is_open = not self._runner.uses_steps
        self._gathered = GatheredRoute(elementwise, self._scratch, with_updates, is_open)
        routes = (self._batched, self._gathered, elementwise, WholeWeightRoute(*parts))
        self._current = CurrentLayers(self._layers, routes)
        self._sharding: Sharding = UnshardedRun(self._layers, self._columns)
        self._gradients = Gradients()
        self._in_step = False

    # ------------------------------------------------------------------ options

    @property
    def value_names(self) -> frozenset[str]:
        """The names that ``values`` of a record can have."""
        groups = (group.metric for group in self._groups)
        return frozenset(CORE_VALUES).union(*((*metric.ratios, *metric.gauges) for metric in groups))

    @property
    def declared_values(self) -> tuple[Value, ...]:
        """The values of the metric groups, and how to show each of them."""
        return tuple(value for group in self._groups for value in group.metric.declared)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The state of each layer between steps. Read-only."""
        return self._layers

    @property
    def batches(self) -> list[Batch]:
        """The layers of the last step that are counted in one call, one batch per device."""
        return self._batched.batches

    @property
    def buckets(self) -> list[Bucket]:
        """The layers of the last step that plain torch counts together, grouped by kind."""
        return self._gathered.buckets

    # ------------------------------------------------------------------ one weight at a time

    @property
    def prev_quantized(self) -> dict[str, Tensor]:
        """The codes of weights that have a snapshot but no post-step count yet."""
        return self._named.codes

    @_without_autograd
    def snapshot_pre_step(
        self,
        name: str,
        weight: Tensor,
        format: Any,
        scale: Tensor | float | None = None,
        grad: Tensor | None = None,
    ) -> None:
        """Store the codes of a weight before the optimizer's step.

        Args:
            name: The layer's name. A second snapshot with the same name replaces the first.
            weight: A floating-point tensor of any shape.
            format: A quantizer name, ``FloatFormat``, quantizer object or function.
            scale: What the weight is divided by before rounding, instead of the format's own rule.
            grad: The gradient of this step, dense or sparse. None: updates are not counted.

        Raises:
            TypeError: The weight or the gradient is not a tensor, or the weight is sparse.
            ValueError: Unknown format, or the format does not fit the weight, scale or gradient.
        """
        self._named.take(name, weight, format, scale, grad)
        self._notices.flush()

    @_without_autograd
    def compute_flips_post_step(
        self, name: str, weight: Tensor, format: Any, scale: Tensor | float | None = None
    ) -> int:
        """Count the flips since the snapshot, add them to the totals, and drop the snapshot.

        Args:
            name: As in ``snapshot_pre_step``.
            weight: The weight after the step.
            format: As in ``snapshot_pre_step``.
            scale: The current scale, which training may have changed.

        Returns:
            The number of weights whose code changed. Synchronizes with the device.

        Raises:
            KeyError: There is no snapshot of this name.
            ValueError: The shapes of the weight and its snapshot differ.
        """
        return self._named.compare(name, weight, format, scale)

    # ------------------------------------------------------------------ many weights, one step at a time

    @_without_autograd
    def before_step(self, weights: Iterable[TrackedWeight]) -> None:
        """Make sure that the codes of the weights are current, just before the optimizer's step.

        The codes after the last step are the codes before this one, unless the weight was written, replaced or moved in
        between. Then it is encoded again, and that change does not count as a flip.

        Args:
            weights: The weights of this step, with unique names. The tracker reads them until the next step begins,
                unless they are released.

        Raises:
            TypeError: The weights are not ``TrackedWeight`` objects.
        """
        weights = _check_weights(weights)
        self._layers.commit()
        if self._in_step:
            # The last step raised an exception half way, and may have written any weights.
            self._forget_codes()
        self._in_step = True
        if not self.is_tracking:
            return
        self._gradients = Gradients()
        self._begin(weights)
        self._silent_writes.check(weights)
        self._current.set_layers(self._current.encode_current(weights, self._sharding, force=self.fresh_snapshots))
        self._marks.make_first_if_due(self._current, self._sharding)
        if self._runner.uses_steps:
            self._runner.before_all(self._current.layers, self._sharding)
        if "stalls" in self.metrics:
            self._gradients = self._current.gradients()
        self._notices.flush()

    def _begin(self, weights: list[TrackedWeight]) -> None:
        """Set the weights of a step, and exchange what processes need to know about sharded ones."""
        have_changed = self._layers.set_weights(weights)
        if have_changed:
            # Batches also hold codes.
            self._current.release()
            self._sharding = self._sharding.for_weights(weights)
        self._sharding.begin(weights, have_changed=have_changed, force=self.fresh_snapshots)

    def set_weight_access(self, hold: HoldWeights, current: CurrentWeights) -> None:
        """Set how to access weights between two steps, if they are released after each step.

        Args:
            hold: Holds references to the weights of ``before_step`` while its context is entered. Like ``current``, a
                method whose object is not kept alive.
            current: Provides the weights that a step would track now, for ``mark_sync``.
        """
        self._hold_weights, self._current_weights = weakref.WeakMethod(hold), weakref.WeakMethod(current)

    def set_display(self, show: Callable[..., str]) -> None:
        """Set what ``print(tracker)`` and notebooks show, if the table covers several optimizers.

        Args:
            show: A method. Its optional argument is a function of steps, layers and a note, which renders the table in
                another form than plain text. The method's object is not kept alive.
        """
        self._show = weakref.WeakMethod(show)

    def forget_gradients(self) -> None:
        """Release the gradients of ``before_step``, because a closure computes those of the step.

        The old ones would count for weights that get no new gradient, and take memory in addition to the new ones.
        """
        self._gradients = Gradients()

    def abort_step(self) -> None:
        """End a step whose optimizer raised an exception. It may have written any weights."""
        if self._in_step:
            self._forget_codes()
            self._in_step = False
        self.forget_gradients()

    @_without_autograd
    def after_step(self, valid: Tensor | None = None) -> None:
        """Count what the optimizer's step did to the weights of ``before_step``.

        Args:
            valid: 0-dim, on any device: False if the step was skipped. A fused optimizer with a gradient scaler skips
                steps on the device, without a synchronization. None: the step was not skipped.
        """
        after = self._schedule.progress.next(valid)
        if not self.is_tracking:
            self._schedule.progress, self._in_step = after, False
            self._mark_if_due()
            return
        try:
            self._count(valid)
            self._layers.prepare(valid)
        except BaseException as error:
            # Some codes may be those before the step, others those after it.
            self._forget_codes()
            if isinstance(error, Exception):
                # Other processes continue, and the number of steps determines when they need this one.
                self._schedule.progress, self._in_step = after, False
                self._mark_if_due()
            raise
        # An interrupt before this line leaves the step uncounted, and one after it leaves it counted.
        self._schedule.progress = after._replace(is_committed=False)
        self._layers.commit()
        self._runner.has_new_counts = True
        self._mark_if_due()
        self._keep_codes()
        # Last, so that after an interrupt the next step takes new snapshots.
        self._in_step = False
        self._notices.flush()

    def _count(self, valid: Tensor | None) -> None:
        self._layers.begin_step()
        self._sharding.exchange_statistics(is_next_due=self._schedule.is_due(self._schedule.steps + 1))
        self._current.count(self._gradients, valid)
        self._sharding.discard_flagged()
        self._runner.note_step(valid)
        self._gradients = Gradients()

    def _keep_codes(self) -> None:
        """After a step, keep the codes that the next one can use."""
        if not self.is_tracking:
            # An untracked step changes weights, and not all optimizer kernels increment version counters.
            self._forget_codes()
        elif self.low_memory:
            self._drop_codes()
        elif not self.fresh_snapshots:
            self._silent_writes.remember(self._schedule.steps, self._current.layers)
        if self._schedule.is_over() or not self._current:
            self._scratch.clear()

    def _forget_codes(self) -> None:
        """Invalidate all codes, because weights may have been written on all processes."""
        self._sharding.invalidate()
        self._silent_writes.forget()
        self._layers.invalidate()
        if self.low_memory or self._schedule.is_over():
            self._drop_codes()

    def _drop_codes(self) -> None:
        self._layers.drop_codes()
        self._current.release()

    def drop_codes(self) -> None:
        """Release all memory except that of the counts. The next step starts with a baseline."""
        self._layers.forget_weights()
        self._sharding.release()
        self._release_memory()

    def _release_memory(self) -> None:
        self._current.clear()
        self._silent_writes.release()
        self._scratch.clear()
        self._gradients = Gradients()

    # ------------------------------------------------------------------ logging points

    @_without_autograd
    def record(self, *, may_be_empty: bool = False) -> FlipRecord | None:
        """Return the counts since the last record and in total. One transfer from each device.

        If weights are sharded over processes, all processes have to call it. See :meth:`synchronize`.

        Args:
            may_be_empty: Return a record even if nothing was counted since the last one.

        Returns:
            The record; None if no step was tracked and no window of ``mark_sync`` ended since the last one.
        """
        self._layers.commit()
        try:
            self._inspect_weights()
        finally:
            self._reduce_counts()
        record = self._totals.close_window(self._sharding)
        self._notices.flush()
        return record if may_be_empty or record.model.is_new else None

    def _inspect_weights(self) -> None:
        """Compute what is computed at logging points only: non-finite weights, gauges and histograms."""
        hold = None if self._hold_weights is None else self._hold_weights()
        with nullcontext() if hold is None else hold():
            count_nonfinite(self._current, self._layers, self._scratch)
            self._current.drop_failed()
            self._measure()

    def _measure(self) -> None:
        due = self._runner.begin_measure(self._layers) if self._runner else []
        if not due or not self._current:
            return
        self._runner.mark_measured(due)
        held = [layer.tracked for layer in self._current if layer.tracked is not None and layer.tracked.is_held]
        for layer in self._encode_between_steps(held):
            self._runner.measure(layer, due)
        self._current.drop_failed()

    def _encode_between_steps(self, weights: Iterable[TrackedWeight]) -> Iterator[Layer]:
        """Yield the layers of the weights, each with its current codes, between two steps."""
        for layer in self._current.encode_current(weights, self._sharding, force=self.fresh_snapshots):
            yield layer
            if layer.state is CodeState.FRESH:
                # The next step may be untracked, and then may write the weight without a trace.
                layer.invalidate()
            if self.low_memory or self._schedule.is_over():
                layer.drop_codes()

    # ------------------------------------------------------------------ marks

    @_without_autograd
    def mark_sync(self) -> None:
        """Mark that the training publishes its weights now.

        Call it where the training sends its weights to rollout engines. The metric group ``"sync"`` then compares the
        codes with those at the last mark, and ``"touched"`` counts the weights that flipped since then. The first mark
        only begins a window. In a hook of the optimizer's step, the mark is made at the end of that step. There is no
        device synchronization.

        Before ``start_step`` and after ``end_step``, and while no weight is tracked, no mark is made. The first such
        call is logged.

        If weights are sharded over processes, all processes have to call it.

        Raises:
            ValueError: ``metrics=`` has neither ``"sync"`` nor ``"touched"``.
        """
        self._marks.request()
        if not self._in_step:
            self._mark_if_due()

    def _mark_if_due(self) -> None:
        if not self._marks.are_expected:
            return
        with self._marks.guarded():
            if not self._marks.take_due():
                return
            self._layers.commit()
            current = None if self._current_weights is None else self._current_weights()
            found = nullcontext(self._layers.weights) if current is None else current()
            with found as weights:
                self._begin(list(weights))
                held = (tracked for tracked in weights if tracked.is_held)
                self._marks.make(self._encode_between_steps(held), self._sharding)
        self._notices.flush(stacklevel=6)

    # ------------------------------------------------------------------ many processes

    @property
    def is_sharded(self) -> bool:
        """Whether weights are sharded over processes, so that their counts have to be summed."""
        return bool(self._sharding)

    @_without_autograd
    def synchronize(self, *, is_logging_point: bool = False) -> None:
        """Sum the counts of sharded weights over the processes.

        There is one collective per group of processes, and none if no weights are sharded. All processes have to call
        it. Until the next call, all numbers of a sharded run stay those of this call, the same on each process.

        Args:
            is_logging_point: Whether another process makes a record now, which also needs this process's gauges.
        """
        try:
            if self._sharding and is_logging_point:
                self._inspect_weights()
        finally:
            self._reduce_counts()
        self._notices.flush()

    def _reduce_counts(self) -> None:
        if self._sharding:
            self._sharding.reduce_counts(*self._totals.rows())

    def request_comparison(self, *, is_selection_known: bool) -> None:
        """Request that the processes compare, before the next tracked step, which sharded weights they track.

        All processes have to call it when parameters are replaced, added or frozen.

        Args:
            is_selection_known: Whether this process knows its new weights. If not, no process tracks sharded weights
                from then on.
        """
        self._sharding = self._sharding.request_comparison(is_selection_known=is_selection_known)

    def give_up(self, name: str, reason: str) -> None:
        """Stop tracking a weight. If it is sharded, other processes stop at the next logging point."""
        if name not in self._layers.failed:
            self._layers.fail(name, ValueError(reason))

    def abandon(self) -> None:
        """Stop tracking all weights, but still take part in the collectives that other processes wait for."""
        self._layers.abandon(self._sharding.names)
        self._release_memory()

    # ------------------------------------------------------------------ totals

    def _counts(self) -> dict[str, Counts]:
        return {name: self._columns.counts(row) for name, row in self._totals.read(self._sharding)[1].items()}

    def get_flip_counts(self) -> dict[str, int]:
        """Return the flips of each layer since tracking began. Synchronizes with the device, like all these methods."""
        return {name: counts.flips for name, counts in self._counts().items()}

    def get_flip_rates(self) -> dict[str, float]:
        """Return the cumulative flip rate of each layer: flips / weights. It can exceed 1; 0.0 for an empty layer."""
        weights = {name: layer.weights for name, layer in self._layers.items()}
        return {name: counts.flips / weights[name] if weights[name] else 0.0 for name, counts in self._counts().items()}

    def get_update_counts(self) -> dict[str, int]:
        """Return the updates of each layer, including open snapshots: weights whose gradient was not exactly 0."""
        updates = {name: counts.updates for name, counts in self._counts().items()}
        for name, pending in self._named.pending_updates().items():
            updates[name] = updates.get(name, 0) + pending
        return updates

    def get_stall_counts(self) -> dict[str, int]:
        """Return the stalled weights of each layer: those with an update and no flip."""
        return {name: counts.stalled for name, counts in self._counts().items()}

    def get_stall_ratios(self) -> dict[str, float]:
        """Return stalled / updates of each layer, in [0, 1]; 0.0 without updates."""
        return {name: counts.stall_ratio if counts.updates else 0.0 for name, counts in self._counts().items()}

    def totals(self) -> tuple[int, list[tuple[str, str, int, Counts]]]:
        """Return the number of steps, and for each layer its name, quantizer, number of weights and total counts."""
        steps, rows = self._totals.read(self._sharding)
        layers = ((self._layers[name], self._columns.counts(row)) for name, row in rows.items())
        return steps, [(layer.name, layer.quantizer, layer.weights, counts) for layer, counts in layers]

    @property
    def history(self) -> History:
        return self._totals.history

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self._layers):,} layers; print() shows what was counted>"

    def __str__(self) -> str:
        """Return a table of the totals of each layer, and of all together."""
        show = None if self._show is None else self._show()
        return summary.as_text(*self.totals()) if show is None else show()

    def memory_usage(self) -> MemoryUsage:
        """Return the bytes held now, on all devices together."""
        return MemoryUsage(
            codes=sum(layer.code_bytes for layer in self._layers.values()),
            counters=self._layers.counter_bytes,
            buffers=self._scratch.nbytes + self._silent_writes.nbytes,
            metrics=sum(layer.metric_bytes for layer in self._layers.values()),
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return counts and step number as plain numbers, and the per-weight state of metric groups as tensors.

        It loads with ``weights_only=True``. It does not contain codes, since the loaded weights have the same ones. The
        other keys are always the same, as ``torch.distributed.checkpoint`` needs them, which only loads what is in the
        state of a new object. The tensors of metric groups start again there.

        If weights are sharded over processes, all processes have to call it. They get the same result, which loads on
        any number of processes. It does not contain the per-weight state of metric groups for shards.
        """
        self.synchronize()
        return self._totals.state_dict(self._sharding)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``. The first snapshot after it is a baseline.

        The counts of a layer with another number of weights start from zero, with a warning.

        Raises:
            TypeError: Not a dictionary.
            ValueError: Not a tracker's state, a damaged one, or one of a later version. The tracker stays unchanged.
        """
        requested = {group.metric.name for group in self._groups}
        steps, layers, window_base, unrequested = totals.parse(state_dict, self._columns, requested)
        self.reset()
        self._totals.load(steps, layers, window_base)
        if unrequested and distributed.is_writer():
            warnings.warn(
                f"weightflip: the checkpoint has per-weight state of {sorted(unrequested)}, which metrics= does not "
                "include; the state is dropped",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hold_weights": None, "_current_weights": None, "_show": None}
