"""The face of what counts: its options, one step, and the numbers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from weightflip import checks, distributed, kernels
from weightflip.counting import summary, totals
from weightflip.counting.batch import Batch
from weightflip.counting.batched import BatchedRoute
from weightflip.counting.columns import Columns
from weightflip.counting.course import Course
from weightflip.counting.current import CurrentLayers
from weightflip.counting.display import Displayed
from weightflip.counting.gathered import GatheredRoute, Heap
from weightflip.counting.layer import CodeState, Layer, TrackedWeight
from weightflip.counting.marks import SyncMarks
from weightflip.counting.metric_runner import MetricRunner
from weightflip.counting.named import NamedSnapshots
from weightflip.counting.nonfinite import count_nonfinite
from weightflip.counting.notices import Noted, Notices
from weightflip.counting.routes import ElementwiseRoute, WholeWeightRoute
from weightflip.counting.schedule import Progress, Schedule, Scheduled
from weightflip.counting.shards import Shards
from weightflip.counting.silent import SilentWrites
from weightflip.counting.single import SingleProcess
from weightflip.counting.table import LayerTable
from weightflip.counting.totals import Totals
from weightflip.metrics import CORE_VALUES
from weightflip.metrics.columns import METRICS, MetricsLike, make_groups
from weightflip.records import Counts, FlipRecord, Value


class MemoryUsage(NamedTuple):
    """Bytes that a tracker holds between steps.

    Attributes:
        codes: The codes of the weights: one byte per weight for formats of up to 8 bits.
        counters: A few numbers a layer.
        buffers: Scratch memory, of a fixed size once every format was seen.
        metrics: What metric groups remember of each weight.
    """

    codes: int
    counters: int
    buffers: int
    metrics: int = 0


Holding: TypeAlias = Callable[[], AbstractContextManager[None]]
Taking: TypeAlias = Callable[[], AbstractContextManager[Sequence[TrackedWeight]]]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _outside_of_autograd(method: _Method) -> _Method:
    """Without gradients, and not in inference mode: what is made there could not be written to later."""
    return torch.inference_mode(False)(torch.no_grad()(method))


def _checked(weights: Any) -> list[TrackedWeight]:
    found = list(weights) if isinstance(weights, Iterable) else [weights]
    for weight in found:
        if not isinstance(weight, TrackedWeight):
            raise TypeError(
                f"weights are TrackedWeight objects, got {checks.describe(weight)}; make each with "
                "weightflip.counting.layer.TrackedWeight(name, parameter, quantizer), or wrap the optimizer in "
                "FlipTrackingOptimizer"
            )
    return found


class WeightFlipTracker(Displayed, Scheduled, Noted):
    """Counts how many weights change their quantized code in an optimizer step.

    Two ways to use it. By name, one weight at a time: ``snapshot_pre_step``, the optimizer's step,
    ``compute_flips_post_step``. Or for many weights at once and without waiting for the device, as
    :class:`FlipTrackingOptimizer` does: ``before_step``, the optimizer's step, ``after_step``, and ``record`` at
    logging points.

    Args:
        metrics: ``"flips"``, and what else is counted: ``"stalls"`` (needs the gradients), the groups of
            :func:`weightflip.metrics.metric_names`, or ``Metric`` objects. As a mapping, every how many tracked steps
            each group looks.
        oscillation_ema: Momentum of the moving average of each weight's oscillation frequency, or a tuple of it and the
            threshold above which a weight counts as oscillating; see
            :class:`~weightflip.metrics.oscillation.Oscillation`.
        sync_every: For the group ``"sync"``: number of steps between two syncs. The weights before the first step are
            the first sync. None: a sync is where ``mark_sync`` is called.
        track_every: Track every n-th step.
        start_step: First step to track, from 0.
        end_step: Track no step from this one on; None for no end.
        low_memory: Drop the codes after each step instead of keeping them for the next one (saves one byte per weight
            for 8-bit formats, costs a second encoding).
        fresh_snapshots: Encode anew before each step, for scripts that write weights through ``.data``, which leaves
            no trace.
        backend: ``"auto"`` for the fastest there is, ``"eager"`` for plain torch, ``"numba"`` to insist on the
            compiled kernel for weights on the CPU, ``"triton"`` for the one for weights on a GPU. They count the same:
            a kernel is tried before it is used. What it does not cover, or counts otherwise, goes to eager.

    Raises:
        ValueError: An unknown metric or backend, ``"triton"`` without a GPU, or step numbers that make no sense.
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
        """Start with nothing counted.

        Size: each option is a keyword of its own, which users write as to :class:`FlipTrackingOptimizer`.
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
        self._holding: weakref.WeakMethod[Holding] | None = None
        self._taking: weakref.WeakMethod[Taking] | None = None
        self._show = None
        self.reset()

    def reset(self) -> None:
        """Forget everything counted, the number of steps included."""
        with_updates = "stalls" in self.metrics
        self._schedule.progress = Progress()
        self._scratch = kernels.ScratchPool()
        self._layers = LayerTable(self._columns, self._schedule, self._notices)
        self._silent = SilentWrites(self._layers, self._notices)
        self._named = NamedSnapshots(self._layers, self._scratch)
        self._totals = Totals(self._columns, self._layers, self._schedule, self._silent)
        self._runner = MetricRunner(self._groups, self._schedule, self._notices, self._scratch, self.backend)
        self._marks = SyncMarks(self._runner, self._schedule, self._layers, self._notices, self._sync_every)
        alone = (self._layers, self._runner, self._scratch, self.backend, with_updates)
        elementwise = ElementwiseRoute(*alone)
        self._batched = BatchedRoute(self._layers, elementwise, self._runner, self.backend, with_updates)
        is_open = not self._runner.uses_steps
        self._gathered = GatheredRoute(elementwise, self._scratch, with_updates, is_open)
        routes = (self._batched, self._gathered, elementwise, WholeWeightRoute(*alone))
        self._current = CurrentLayers(self._layers, routes)
        self._shards: Shards = SingleProcess(self._layers, self._columns)
        self._gradients: dict[str, Tensor | None] = {}
        self._in_step = False

    # ------------------------------------------------------------------ what was asked for

    @property
    def value_names(self) -> frozenset[str]:
        """What the records' ``values`` may hold."""
        groups = (group.metric for group in self._groups)
        return frozenset(CORE_VALUES).union(*((*metric.ratios, *metric.gauges) for metric in groups))

    @property
    def declared_values(self) -> tuple[Value, ...]:
        """Those that metric groups give, and how each is shown."""
        return tuple(value for group in self._groups for value in group.metric.declared)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """What is known of each layer between steps. To look at, not to change."""
        return self._layers

    @property
    def batches(self) -> list[Batch]:
        """The layers of the last step that are counted in one call, a batch for each device."""
        return self._batched.batches

    @property
    def heaps(self) -> list[Heap]:
        """The layers of the last step that plain torch counts together on a device."""
        return self._gathered.heaps

    # ------------------------------------------------------------------ one weight at a time

    @property
    def prev_quantized(self) -> dict[str, Tensor]:
        """Codes of the weights that have a snapshot and no post-step count yet."""
        return self._named.codes

    @_outside_of_autograd
    def snapshot_pre_step(
        self,
        name: str,
        weight: Tensor,
        format: Any,
        scale: Tensor | float | None = None,
        grad: Tensor | None = None,
    ) -> None:
        """Remember the codes of a weight before the optimizer's step.

        Args:
            name: The layer's name; a second snapshot of the same name replaces the first.
            weight: Floating-point, any shape.
            format: A quantizer name, ``FloatFormat``, quantizer object or function.
            scale: What the weight is divided by before rounding, instead of the format's own rule.
            grad: The gradient of this step, dense or sparse; None counts no updates.

        Raises:
            TypeError: The weight or the gradient is no tensor, or the weight is sparse.
            ValueError: Unknown format, or a weight, scale or gradient that does not fit.
        """
        self._named.take(name, weight, format, scale, grad)
        self._notices.flush()

    @_outside_of_autograd
    def compute_flips_post_step(
        self, name: str, weight: Tensor, format: Any, scale: Tensor | float | None = None
    ) -> int:
        """Count the flips since the snapshot, add them up, and drop the snapshot.

        Args:
            name: As in ``snapshot_pre_step``.
            weight: The weight after the step.
            format: As in ``snapshot_pre_step``.
            scale: The scale of now; training may have changed it.

        Returns:
            Weights whose code changed. Reading the number waits for the device.

        Raises:
            KeyError: There is no snapshot of this name.
            ValueError: The weight has another shape than its snapshot.
        """
        return self._named.compare(name, weight, format, scale)

    # ------------------------------------------------------------------ many weights, a step at a time

    @_outside_of_autograd
    def before_step(self, weights: Iterable[TrackedWeight]) -> None:
        """Make sure that the codes of the weights are current, just before the optimizer's step.

        The codes after the last step are the codes before this one, unless the weight was written, replaced or moved in
        between; then it is encoded anew, and that change is no flip.

        Args:
            weights: The weights of this step; names are unique. They are looked at until the next step begins, as far
                as they have not been released.

        Raises:
            TypeError: Something else than ``TrackedWeight`` objects.
        """
        weights = _checked(weights)
        self._layers.settle()
        if self._in_step:
            # The last step raised half way: nobody knows what it wrote.
            self._forget_codes()
        self._in_step = True
        if not self.is_tracking:
            return
        self._gradients = {}
        self._begin(weights)
        self._silent.look(weights)
        self._current.take_up(self._with_codes(weights))
        if self._runner.uses_steps:
            for layer in self._current:
                self._runner.before(layer, is_shard=layer.name in self._shards)
        if self._marks.is_first_due:
            self._marks.make(self._current, self._shards)
        if "stalls" in self.metrics:
            self._gradients = {layer.name: layer.tracked.parameter.grad for layer in self._current if layer.tracked}
        self._notices.flush()

    def _begin(self, weights: list[TrackedWeight]) -> None:
        """Follow the weights, and exchange what processes need to know about sharded ones."""
        are_others = self._layers.follow(weights)
        if are_others:
            # Batches hold codes, too.
            self._current.release()
            self._shards = self._shards.for_weights(weights)
        self._shards.begin(weights, are_others=are_others, anew=self.fresh_snapshots)

    def _with_codes(self, weights: Iterable[TrackedWeight]) -> list[Layer]:
        return self._current.with_codes(weights, self._shards, anew=self.fresh_snapshots)

    def take_weights_from(self, holding: Holding, taking: Taking) -> None:
        """Set how to reference weights between two steps, if they are released after each step.

        Args:
            holding: References the weights of ``before_step``. A method, as ``taking``; the objects are not kept alive.
            taking: Yields the weights that a step would track now, for ``mark_sync``.
        """
        self._holding, self._taking = weakref.WeakMethod(holding), weakref.WeakMethod(taking)

    def take_summary_from(self, show: Callable[..., str]) -> None:
        """Say what ``print(tracker)`` and notebooks show, where the table is one of several optimizers.

        Args:
            show: A method that takes another form than plain text, a function of steps, layers and a note; its object
                is not kept alive.
        """
        self._show = weakref.WeakMethod(show)

    def forget_gradients(self) -> None:
        """Let go of the gradients of ``before_step``: a closure makes the step's own.

        The old ones would count for a weight that gets none, and take memory beside the new ones.
        """
        self._gradients = {}

    @_outside_of_autograd
    def after_step(self, valid: Tensor | None = None) -> None:
        """Count what the optimizer's step did to the weights of ``before_step``.

        Args:
            valid: 0-dim, on any device: whether the step was one at all (a fused optimizer under a gradient scaler
                skips steps without telling the host). None: it was.
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
            # Some codes are of before the step, some of after it.
            self._forget_codes()
            if isinstance(error, Exception):
                # Other processes go on, and the number of steps says when they need this one.
                self._schedule.progress, self._in_step = after, False
                self._mark_if_due()
            raise
        # Up to here the step is not counted, from here on it is.
        self._schedule.progress = after._replace(is_settled=False)
        self._layers.settle()
        self._runner.has_news = True
        self._mark_if_due()
        self._keep_codes()
        # Last: what is interrupted before makes the next step take its snapshots anew.
        self._in_step = False
        self._notices.flush()

    def _count(self, valid: Tensor | None) -> None:
        self._layers.begin_step()
        self._shards.share(is_next_due=self._schedule.is_due(self._schedule.steps + 1))
        self._current.count(self._gradients, valid)
        self._shards.drop_uncertain()
        self._gradients = {}

    def _keep_codes(self) -> None:
        """Keep, after a step, what the next one can use."""
        if not self.is_tracking:
            # An untracked step changes weights, and not every optimizer's kernel moves their version counters.
            self._forget_codes()
        elif self.low_memory:
            self._drop_codes()
        elif not self.fresh_snapshots:
            self._silent.remember(self._schedule.steps, self._current.layers)
        if self._schedule.is_over() or not self._current:
            self._scratch.clear()

    def _forget_codes(self) -> None:
        """Weights may have been written, on all processes alike, since their codes were made."""
        self._shards.forget()
        self._silent.forget()
        self._layers.distrust()
        if self.low_memory or self._schedule.is_over():
            self._drop_codes()

    def _drop_codes(self) -> None:
        self._layers.drop_codes()
        self._current.release()

    def drop_codes(self) -> None:
        """Give back all memory but that of the numbers; the next step starts with a baseline."""
        self._layers.forget_weights()
        self._shards.release()
        self._give_back()

    def _give_back(self) -> None:
        self._current.clear()
        self._silent.release()
        self._scratch.clear()
        self._gradients = {}

    # ------------------------------------------------------------------ logging points

    @_outside_of_autograd
    def record(self, *, may_be_empty: bool = False) -> FlipRecord | None:
        """What was counted since the last record, and altogether. One transfer from each device.

        Where weights are sharded over processes, all of them have to call it: see :meth:`synchronize`.

        Args:
            may_be_empty: Give a record also when nothing was counted since the last one.

        Returns:
            The record; None when no step was tracked, and no window of ``mark_sync`` ended, since the last one.
        """
        self._layers.settle()
        try:
            self._look()
        finally:
            self._add_up()
        record = self._totals.close_window(self._shards)
        self._notices.flush()
        return record if may_be_empty or record.model.is_new else None

    def _look(self) -> None:
        """Find what is found at logging points."""
        holding = None if self._holding is None else self._holding()
        with nullcontext() if holding is None else holding():
            count_nonfinite(self._current, self._layers, self._scratch)
            self._current.leave_out_failed()
            self._measure()

    def _measure(self) -> None:
        due = self._runner.begin_measure(self._layers) if self._runner else []
        if not due or not self._current:
            return
        self._runner.measured(due)
        held = [layer.tracked for layer in self._current if layer.tracked is not None and layer.tracked.is_held]
        for layer in self._looked_at(held):
            self._runner.measure(layer, due)
        self._current.leave_out_failed()

    def _looked_at(self, weights: Iterable[TrackedWeight]) -> Iterator[Layer]:
        """Yield the layers of the weights, each with its current codes, between two steps."""
        for layer in self._with_codes(weights):
            yield layer
            if layer.state is CodeState.FRESH:
                # The next step may be an untracked one, which need not leave a trace.
                layer.distrust()
            if self.low_memory or self._schedule.is_over():
                layer.drop_codes()

    # ------------------------------------------------------------------ marks

    @_outside_of_autograd
    def mark_sync(self) -> None:
        """Mark that the training publishes its weights now.

        Call it where the training sends its weights to rollout engines. The metric group ``"sync"`` then compares the
        codes with those at the last mark. The first mark only stores the codes. In a hook of the optimizer's step, the
        mark is made at the end of that step. There is no device synchronization.

        If weights are sharded over processes, all processes have to call it.

        Raises:
            ValueError: ``metrics=`` does not have ``"sync"``.
        """
        self._marks.request()
        if not self._in_step:
            self._mark_if_due()

    def _mark_if_due(self) -> None:
        if self._marks.take_due():
            self._layers.settle()
            taking = None if self._taking is None else self._taking()
            found = nullcontext(self._layers.listed) if taking is None else taking()
            with self._marks.guarded(), found as weights:
                self._begin(list(weights))
                self._marks.make(self._looked_at(tracked for tracked in weights if tracked.is_held), self._shards)
            self._notices.flush()

    # ------------------------------------------------------------------ many processes

    @property
    def is_sharded(self) -> bool:
        """Whether weights lie in parts on several processes, so that their counts have to be added up."""
        return bool(self._shards)

    @_outside_of_autograd
    def synchronize(self, *, is_logging_point: bool = False) -> None:
        """Add up what the processes have counted of weights that are sharded over them.

        One collective (for each group of processes, where there are several); none where nothing is sharded. All
        processes have to call it. Between two such calls, all numbers of a sharded run are those of the first one, on
        each process the same.

        Args:
            is_logging_point: Whether another process makes a record now, for which all find what is found then.
        """
        try:
            if self._shards and is_logging_point:
                self._look()
        finally:
            self._add_up()
        self._notices.flush()

    def _add_up(self) -> None:
        if self._shards:
            self._shards.add_up(*self._totals.rows())

    def expect_others(self, *, are_known: bool) -> None:
        """Have the processes compare, before the next tracked step, which sharded weights they track.

        All processes have to call it where the parameters themselves are others: replaced, added, or frozen.

        Args:
            are_known: Whether this process has found out. If not, all give the sharded weights up.
        """
        self._shards = self._shards.expect_others(are_known=are_known)

    def give_up(self, name: str, reason: str) -> None:
        """Count a weight no more; where it is sharded, others do so, too, from the next logging point on."""
        if name not in self._layers.failed:
            self._layers.fail(name, ValueError(reason))

    def abandon(self) -> None:
        """Count nothing more, and go on taking part in what other processes wait for."""
        self._layers.abandon(self._shards.names)
        self._give_back()

    # ------------------------------------------------------------------ totals

    def _counts(self) -> dict[str, Counts]:
        return {name: self._columns.counts(row) for name, row in self._totals.read(self._shards)[1].items()}

    def get_flip_counts(self) -> dict[str, int]:
        """Flips of each layer since tracking began. Waits for the device, as all of these."""
        return {name: counts.flips for name, counts in self._counts().items()}

    def get_flip_rates(self) -> dict[str, float]:
        """Cumulative flip rate of each layer: flips / weights; can exceed 1. 0.0 for an empty layer."""
        weights = {name: layer.weights for name, layer in self._layers.items()}
        return {name: counts.flips / weights[name] if weights[name] else 0.0 for name, counts in self._counts().items()}

    def get_update_counts(self) -> dict[str, int]:
        """Updates of each layer: weights whose gradient was not exactly 0, open snapshots included."""
        updates = {name: counts.updates for name, counts in self._counts().items()}
        for name, pending in self._named.pending_updates().items():
            updates[name] = updates.get(name, 0) + pending
        return updates

    def get_stall_counts(self) -> dict[str, int]:
        """Stalled weights of each layer: those with an update and no flip."""
        return {name: counts.stalled for name, counts in self._counts().items()}

    def get_stall_ratios(self) -> dict[str, float]:
        """Stalled / updates of each layer, in [0, 1]; 0.0 without updates."""
        return {name: counts.stall_ratio if counts.updates else 0.0 for name, counts in self._counts().items()}

    def totals(self) -> tuple[int, list[tuple[str, str, int, Counts]]]:
        """Steps; and of each layer its name, its quantizer, how many weights it has, and its counts since the start."""
        steps, rows = self._totals.read(self._shards)
        layers = ((self._layers[name], self._columns.counts(row)) for name, row in rows.items())
        return steps, [(layer.name, layer.quantizer, layer.weights, counts) for layer, counts in layers]

    @property
    def course(self) -> Course:
        return self._totals.course

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self._layers):,} layers; print() shows what was counted>"

    def __str__(self) -> str:
        """A table: what each layer, and all together, did since tracking began."""
        show = None if self._show is None else self._show()
        return summary.as_text(*self.totals()) if show is None else show()

    def memory_usage(self) -> MemoryUsage:
        """Bytes held now, on all devices together."""
        return MemoryUsage(
            codes=sum(layer.code_bytes for layer in self._layers.values()),
            counters=self._layers.counter_bytes,
            buffers=self._scratch.nbytes + self._silent.nbytes,
            metrics=sum(layer.metric_bytes for layer in self._layers.values()),
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counts and step number, as plain numbers, and what metric groups remember of each weight, as tensors.

        Loads with ``weights_only=True``. Codes are not in it: those of the loaded weights are the same. But for those
        tensors, which start anew there, its keys are always the same ones, as ``torch.distributed.checkpoint`` needs
        them, which loads what it finds in a fresh object's state.

        Where weights are sharded over processes, all of them have to call it, and get the same; it loads on any number
        of processes. What metric groups remember of each weight of a shard is not in it.
        """
        self.synchronize()
        return self._totals.state_dict(self._shards)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``. The next step's first snapshot is a baseline.

        A layer that has another number of weights now starts anew, with a warning.

        Raises:
            TypeError: Not a dictionary.
            ValueError: Not a tracker's state, a damaged one, or one of a later version. The tracker is as it was.
        """
        asked = {group.metric.name for group in self._groups}
        steps, layers, window_base, unasked = totals.parse(state_dict, self._columns, asked)
        self.reset()
        self._totals.load(steps, layers, window_base)
        if unasked and distributed.is_writer():
            warnings.warn(
                f"weightflip: what {sorted(unasked)} remembered of each weight in the checkpoint is dropped, since "
                "metrics= does not ask for it",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_gradients": {}, "_holding": None, "_taking": None, "_show": None}
