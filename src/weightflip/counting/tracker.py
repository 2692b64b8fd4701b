"""Which weights, when, and the counters on the weights' device."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from weightflip import checks, distributed, functional, kernels
from weightflip.counting import checkpoint
from weightflip.counting.batch import Batch, Member, make_member
from weightflip.counting.canary import Canary
from weightflip.counting.layer import Layer, Row, Stamp, TrackedWeight
from weightflip.counting.ledger import COLUMNS, COUNTED, NONFINITE, SCALE_CHANGES, SCALE_STEPS, WEIGHT_STEPS, Ledger
from weightflip.metrics import CORE_VALUES, LayerMetric, Slice, Weight
from weightflip.metrics.columns import METRICS, Group, MetricsLike, gauges_of, make_groups, ratios_of
from weightflip.quantizers.base import ElementwiseQuantizer, Quantizer, bits_of_scale, quantizer_name, resolve
from weightflip.records import Counts, FlipRecord, LayerRecord, Value, shown, split_variant


class MemoryUsage(NamedTuple):
    """Bytes that a tracker holds between steps.

    Attributes:
        codes: The codes of the weights: a byte a weight for formats of up to 8 bits.
        counters: A few numbers a layer.
        buffers: Scratch memory, of a fixed size once every format was seen.
        metrics: What metric groups remember of each weight.
    """

    codes: int
    counters: int
    buffers: int
    metrics: int = 0


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _outside_of_autograd(method: _Method) -> _Method:
    """Without gradients, and not in inference mode: what is made there could not be written to later."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class _Progress(NamedTuple):
    """How far a tracker is. Replaced as a whole, so that an interrupt finds a step counted, or not counted."""

    steps: int = 0
    """Optimizer steps, skipped ones included."""
    skipped: Tensor | None = None
    """How many of them were none, 0-dim int64; None while no step could be one."""
    is_settled: bool = True
    """Whether the ledgers have the totals that belong to it."""


@dataclass
class _Snapshot:
    """Between ``snapshot_pre_step`` and ``compute_flips_post_step``."""

    codes: Tensor
    updated: Tensor | None
    updates: Tensor | None


class WeightFlipTracker:
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
        track_every: Track every n-th step.
        start_step: First step to track, from 0.
        end_step: Track no step from this one on; None for no end.
        low_memory: Drop the codes after each step instead of keeping them for the next one (saves a byte a weight for
            8-bit formats, costs a second encoding).
        fresh_snapshots: Encode anew before each step, for scripts that write weights through ``.data``, which leaves
            no trace.
        backend: ``"auto"`` for the fastest there is, ``"eager"`` for plain torch, ``"numba"`` to insist on the
            compiled kernel for weights on the CPU, ``"triton"`` for the one for weights on a GPU, which ``"auto"``
            does not take yet. They count the same; what a kernel does not cover goes to eager.

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
        track_every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        low_memory: bool = False,
        fresh_snapshots: bool = False,
        backend: str = "auto",
    ) -> None:
        kernels.check_backend(backend)
        names, self._groups = make_groups(metrics, oscillation_ema)
        self.metrics = tuple(names)
        self._columns = COLUMNS + (self._groups[-1].bins.stop if self._groups else 0)
        now = {NONFINITE}.union(*(range(COLUMNS + g.gauges.start, COLUMNS + g.bins.stop) for g in self._groups))
        self._is_gauge = [column in now for column in range(self._columns)]
        self.track_every = checks.whole("track_every", track_every, 1)
        self.start_step = checks.whole("start_step", start_step, 0)
        self.end_step = None if end_step is None else checks.whole("end_step", end_step, self.start_step + 1)
        self.low_memory = checks.flag("low_memory", low_memory)
        self.fresh_snapshots = checks.flag("fresh_snapshots", fresh_snapshots)
        self.backend = backend
        self.holds_warnings = False
        self._holding: weakref.WeakMethod[Callable[[], AbstractContextManager[None]]] | None = None
        self._untold: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything counted, the number of steps included."""
        self._layers: dict[str, Layer] = {}
        self._ledgers: dict[torch.device, Ledger] = {}
        self._scratch = kernels.ScratchPool()
        self._canary = Canary()
        self._has_warned_of_silent_writes = False
        self._snapshots: dict[str, _Snapshot] = {}
        self._current: list[TrackedWeight] = []
        self._grads: dict[str, Tensor | None] = {}
        self._in_step = False
        self._failed: set[str] = set()
        self._progress = _Progress()
        self._window_base: dict[str, list[float]] = {}
        self._gauged: dict[str, int] = {}
        self._has_news = False
        self._together: dict[torch.device, _Together] = {}
        self._sharded = distributed.ShardedWeights()
        self._added_up: tuple[int, dict[str, list[float]]] | None = None
        self._unsure: set[str] = set()
        self._is_told = False
        self._compares = self._is_lost = False
        self._forget_list()

    def _forget_list(self) -> None:
        self._listed: list[TrackedWeight] = []
        self._asked: dict[str, TrackedWeight] = {}
        self._marks: list[tuple[distributed.Identity, int | None]] | None = None

    @property
    def value_names(self) -> frozenset[str]:
        """What the records' ``values`` may hold."""
        groups = (group.metric for group in self._groups)
        return frozenset(CORE_VALUES).union(*((*metric.ratios, *metric.gauges) for metric in groups))

    @property
    def declared_values(self) -> tuple[Value, ...]:
        """Those that metric groups give, and how each is shown."""
        return tuple(value for group in self._groups for value in group.metric.declared)

    # ------------------------------------------------------------------ one weight at a time

    @property
    def prev_quantized(self) -> dict[str, Tensor]:
        """Codes of the weights that have a snapshot and no post-step count yet."""
        return {name: snapshot.codes for name, snapshot in self._snapshots.items()}

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
            ValueError: Unknown format, or a weight, scale or gradient that does not fit.
        """
        if grad is not None and grad.shape != weight.shape:
            raise ValueError(
                f"gradient of {name!r} has shape {tuple(grad.shape)}, its weight {tuple(weight.shape)}; "
                "pass the gradient of this weight"
            )
        if distributed.layout(weight) is not None:
            raise ValueError(
                f"{name!r} is sharded over processes, which have to count it together; use FlipTrackingOptimizer, or "
                "before_step and after_step"
            )
        quantizer = resolve(format, scale)
        codes = quantizer.encode(weight.detach()).ordinals.clone()
        updated = None if grad is None else (grad.to_dense() if grad.is_sparse else grad) != 0
        updates = None if updated is None else torch.count_nonzero(updated)
        self._layer(TrackedWeight(name, weight, quantizer), weight, quantizer)
        self._snapshots[name] = _Snapshot(codes, updated, updates)
        self._tell()

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
        if name not in self._snapshots:
            raise KeyError(f"No pre-step snapshot for '{name}'. Call snapshot_pre_step before optimizer.step().")
        snapshot = self._snapshots[name]
        if snapshot.codes.shape != weight.shape:
            raise ValueError(
                f"Shape mismatch: the snapshot of '{name}' has {tuple(snapshot.codes.shape)}, "
                f"the weight {tuple(weight.shape)}"
            )
        codes = resolve(format, scale).encode(weight.detach()).ordinals
        if codes.dtype != snapshot.codes.dtype:
            raise ValueError(
                f"the snapshot of '{name}' holds {snapshot.codes.dtype} codes, format {format} gives {codes.dtype}"
            )
        row = self._layers[name].row
        assert row is not None
        counts = torch.zeros(COLUMNS, dtype=torch.int64, device=weight.device)
        functional.compare(snapshot.codes, codes, snapshot.updated, counts[COUNTED], self._scratch)
        counts[WEIGHT_STEPS].fill_(weight.numel())
        flips = int(counts[kernels.FLIPS].item())
        del self._snapshots[name]
        row.total.add_(counts)
        return flips

    # ------------------------------------------------------------------ many weights, a step at a time

    @property
    def is_tracking(self) -> bool:
        """Whether the coming step is one that is tracked."""
        return self._is_due(self._steps)

    def _is_due(self, step: int) -> bool:
        """Whether a step is one that is tracked, from 0."""
        if step < self.start_step or (self.end_step is not None and step >= self.end_step):
            return False
        return (step - self.start_step) % self.track_every == 0

    @property
    def _is_over(self) -> bool:
        return self.end_step is not None and self._steps >= self.end_step

    @property
    def _steps(self) -> int:
        return self._progress.steps

    @property
    def step_count(self) -> int:
        """Optimizer steps so far, skipped ones not counted. Waits for the device if any step may have been skipped."""
        steps, skipped, _ = self._progress
        return steps - (0 if skipped is None else int(skipped.item()))

    @_outside_of_autograd
    def before_step(self, weights: Iterable[TrackedWeight]) -> None:
        """Have the codes of the weights at hand, just before the optimizer's step.

        The codes after the last step are the codes before this one, unless the weight was written, replaced or moved in
        between; then it is encoded anew, and that change is no flip.

        Args:
            weights: The weights of this step; names are unique. They are looked at until the next step begins, as far
                as they have not been released.
        """
        self._settle()
        if self._in_step:
            # The last step raised half way: nobody knows what it wrote.
            self._forget_codes()
        self._in_step = True
        if not self.is_tracking:
            return
        self._current, self._grads = [], {}
        stale: list[TrackedWeight] = []
        weights = list(weights)
        self._begin_sharded(weights)
        self._distrust(self._canary.find(weights, self._is_unwritten))
        for tracked in weights:
            try:
                is_there = self._is_untouched(tracked)
                if not is_there:
                    if tracked.name in self._failed:
                        continue
                    if not getattr(tracked.quantizer, "is_active", True):
                        if tracked.name in self._layers:
                            self._layers[tracked.name].stamp = None
                        continue
                    is_there = self._ensure_codes(tracked, may_wait=True)
                    if is_there:
                        self._before_step_of_metrics(tracked)
                    else:
                        stale.append(tracked)
            except Exception as error:
                self._give_up(tracked.name, error)
                continue
            self._current.append(tracked)
            if "stalls" in self.metrics:
                self._grads[tracked.name] = tracked.parameter.grad
        if stale:
            self._encode_together(stale)
        self._tell()

    def take_weights_from(self, holding: Callable[[], AbstractContextManager[None]]) -> None:
        """Say how to have the weights of ``before_step`` at hand between two steps, where they are released then.

        Args:
            holding: A method; its object is not kept alive.
        """
        self._holding = weakref.WeakMethod(holding)

    def forget_gradients(self) -> None:
        """Let go of the gradients of ``before_step``: a closure makes the step's own.

        The old ones would count for a weight that gets none, and take memory beside the new ones.
        """
        self._grads.clear()

    def drop_codes(self) -> None:
        """Give back all memory but that of the numbers; the next step starts with a baseline."""
        self._give_back()
        self._forget_list()

    def _give_back(self) -> None:
        for layer in self._layers.values():
            layer.drop_codes(metrics=True)
        self._current, self._scratch, self._canary = [], kernels.ScratchPool(), Canary()
        self._together = {}
        self._grads.clear()

    @_outside_of_autograd
    def after_step(self, valid: Tensor | None = None) -> None:
        """Count what the optimizer's step did to the weights of ``before_step``.

        Args:
            valid: 0-dim, on any device: whether the step was one at all (a fused optimizer under a gradient scaler
                skips steps without telling the host). None: it was.
        """
        self._is_told = False
        skipped = self._progress.skipped
        if valid is not None:
            more = valid.logical_not().to(torch.int64)
            skipped = more if skipped is None else skipped.to(more.device) + more
        after = _Progress(self._steps + 1, skipped)
        if not self.is_tracking:
            self._progress, self._in_step = after, False
            return
        try:
            self._count_step(valid)
            for ledger in self._ledgers.values():
                ledger.prepare(valid)
        except BaseException as error:
            # Some codes are of before the step, some of after it.
            self._forget_codes()
            if isinstance(error, Exception):
                # Other processes go on, and the number of steps says when they need this one.
                self._progress, self._in_step = after, False
            raise
        # Up to here the step is not counted, from here on it is.
        self._progress = after._replace(is_settled=False)
        self._settle()
        self._has_news = True
        if not self.is_tracking:
            # An untracked step changes weights, and not every optimizer's kernel moves their version counters.
            self._forget_codes()
        elif self.low_memory:
            for layer in self._layers.values():
                layer.drop_codes(stamp=False)
            self._together = {}
        if self._is_over or not self._current:
            self._scratch = kernels.ScratchPool()
        if self.is_tracking and not (self.low_memory or self.fresh_snapshots):
            self._canary.remember(self._steps, self._current)
        # Last: what is interrupted before makes the next step take its snapshots anew.
        self._in_step = False
        self._tell()

    def _settle(self) -> None:
        """Finish counting a step that was interrupted while its totals were put in place."""
        if not self._progress.is_settled:
            for ledger in self._ledgers.values():
                ledger.commit()
            self._progress = self._progress._replace(is_settled=True)

    def _count_step(self, valid: Tensor | None) -> None:
        for ledger in self._ledgers.values():
            ledger.begin_step()
        self._bring_together()
        # At once: what fails below on this process must not make it ask the others before the next step, nor not ask.
        self._marks = self._marks_now() if self._asked and self._is_due(self._steps + 1) else None
        for tracked in self._count_together():
            if tracked.name in self._failed:
                continue
            try:
                self._count(tracked, valid)
            except Exception as error:
                self._give_up(tracked.name, error)
        self._current = [tracked for tracked in self._current if tracked.name not in self._failed]
        self._end_sharded()
        self._grads.clear()

    @_outside_of_autograd
    def record(self, *, may_be_empty: bool = False) -> FlipRecord | None:
        """What was counted since the last record, and altogether. One transfer from each device.

        Where weights are sharded over processes, all of them have to call it: see :meth:`synchronize`.

        Args:
            may_be_empty: Give a record also when no step was tracked since the last one.

        Returns:
            The record; None when no step was tracked since the last one.
        """
        self._settle()
        try:
            self._look()
        finally:
            self._add_up()
        steps, totals = self._read()
        layers = []
        for name, total in totals.items():
            base = self._window_base.get(name, self._zeros())
            window = self._as_counts([now - then for now, then in zip(total, base, strict=True)])
            gauges, histograms = gauges_of(self._groups, total[COLUMNS:])
            layers.append(
                LayerRecord(
                    name,
                    self._layers[name].weights,
                    window,
                    self._as_counts(total),
                    int(total[NONFINITE]),
                    gauges,
                    histograms,
                )
            )
        self._window_base = totals
        self._tell()
        record = FlipRecord(steps, tuple(layers))
        return record if may_be_empty or record.model.window.weight_steps else None

    # ------------------------------------------------------------------ many processes

    @property
    def is_sharded(self) -> bool:
        """Whether weights lie in parts on several processes, so that their counts have to be added up."""
        return bool(self._sharded)

    def _look(self) -> None:
        """Find what is found at logging points."""
        holding = None if self._holding is None else self._holding()
        with nullcontext() if holding is None else holding():
            self._look_at_weights()

    def _look_at_weights(self) -> None:
        for tracked in self._current:
            if not tracked.is_held:
                continue
            row = self._layers[tracked.name].row
            assert row is not None
            count = row.total[NONFINITE]
            try:
                plain = getattr(tracked.quantizer, "plain", None)
                weight = distributed.local(tracked.parameter).detach()
                functional.count_nonfinite(weight if plain is None else plain(weight), count, self._scratch)
            except Exception as error:
                self._give_up(tracked.name, error)
        self._current = [tracked for tracked in self._current if tracked.name not in self._failed]
        self._gauge()

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
            if self._sharded and is_logging_point:
                self._look()
        finally:
            self._add_up()
        self._tell()

    def _add_up(self) -> None:
        if not self._sharded:
            return
        steps, rows = self._read_rows()
        totals = {name: self._added(layer.base, rows[name]) for name, layer in self._layers.items()}
        for team, members in self._sharded.teams:
            numbers: list[float] = []
            for member in members:
                own = self._own(member.name, rows)
                given = self._layers[member.name].given if member.name in self._layers else []
                is_counted = team.counts(member.layout)
                numbers += [
                    (now if self._is_gauge[column] else now - then) if is_counted else 0
                    for column, (now, then) in enumerate(zip(own, given or self._zeros(), strict=True))
                ]
                numbers.append(team.failure if member.name in self._failed else 0)
            sums = distributed.add_up(numbers, team)
            for i, member in enumerate(members):
                *news, failures = sums[i * (self._columns + 1) : (i + 1) * (self._columns + 1)]
                if failures:
                    # Of some steps only a part was counted.
                    news = self._zeros()
                totals[member.name] = self._take(member, news, self._own(member.name, rows))
                if failures and member.name not in self._failed:
                    error = RuntimeError("it is not on another process")
                    self._give_up(member.name, error, tells=team.tells_of(failures))
        self._added_up = steps, totals

    def _own(self, name: str, rows: Mapping[str, list[float]]) -> list[float]:
        """What this process has counted of a sharded weight."""
        if name not in rows:
            return self._zeros()
        before = self._layers[name].own or self._zeros()
        return self._added(before, rows[name])

    def _take(self, member: distributed.ShardedWeight, news: Sequence[float], own: list[float]) -> list[float]:
        """Add what all processes have counted to a layer's totals."""
        layer = self._layers.get(member.name)
        if layer is None:
            # It has failed here before anything was counted.
            layer = Layer(member.name, member.weights, member.quantizer, self._zeros())
            self._layers[member.name] = layer
        news = [int(number) if column < COLUMNS else number for column, number in enumerate(news)]
        totals = self._added(layer.base, news)
        layer.base = [0 if self._is_gauge[column] else total for column, total in enumerate(totals)]
        layer.given = own
        return totals

    def expect_others(self, *, are_known: bool) -> None:
        """Have the processes compare, before the next tracked step, which sharded weights they track.

        All processes have to call it where the parameters themselves are others: replaced, added, or frozen.

        Args:
            are_known: Whether this process has found out. If not, all give the sharded weights up.
        """
        self._compares, self._is_lost = True, not are_known

    def abandon(self) -> None:
        """Count nothing more, and go on taking part in what other processes wait for."""
        self._failed.update(self._layers, self._sharded)
        self._give_back()

    def _begin_sharded(self, weights: list[TrackedWeight]) -> None:
        """Find the sharded weights, and have at hand what their codes before the step need.

        Whether there is a collective must not depend on what this process alone can see, or it would wait for ever.
        So it depends on the list of weights, the number of steps, and on what a program has to do to a DTensor on all
        processes: replace it, or write to it as a whole.
        """
        if weights != self._listed or self._compares:
            before = set(self._sharded)
            was_compared = self._sharded.follow(
                [(tracked.name, tracked.parameter, tracked.quantizer) for tracked in weights],
                quantizer_name,
                compare=self._compares,
                is_lost=self._is_lost,
            )
            self._compares = self._is_lost = False
            self._listed = weights
            names = {tracked.name for tracked in weights}
            for name, layer in self._layers.items():
                if name not in names:
                    # Frozen, or gone: who knows what becomes of it until it is back.
                    layer.drop_codes()
            # Batches hold codes, too.
            self._together = {}
            if was_compared:
                self._marks = None
                for name, reason in self._sharded.refused.items():
                    if name in before:
                        self._part_with(name)
                    if name not in self._failed:
                        self._give_up(name, ValueError(reason), tells=name not in self._sharded.told_elsewhere)
                self._open_layers(weights)
        self._unsure = set()
        asked = {name for _, names in self._sharded.tables for name in names}
        self._asked = {tracked.name: tracked for tracked in weights if tracked.name in asked}
        self._is_told = False
        if self._asked and (self.fresh_snapshots or self._marks != self._marks_now()):
            self._bring_together()
            self._is_told = True

    def _part_with(self, name: str) -> None:
        """A weight is not added up any more: what all have counted is in its base; what this process has, is a part."""
        layer = self._layers.get(name)
        if layer is not None:
            if layer.row is not None:
                layer.row.clear()
            layer.own, layer.given = [], []

    def _open_layers(self, weights: list[TrackedWeight]) -> None:
        """Have all layers there in the order of the weights, which those with a statistic would else be ahead of."""
        for tracked in weights:
            if tracked.name not in self._failed and getattr(tracked.quantizer, "is_active", True):
                try:
                    self._layer(tracked, *tracked.unwrapped())
                except Exception as error:
                    self._give_up(tracked.name, error)

    def _marks_now(self) -> list[tuple[distributed.Identity, int | None]]:
        parameters = [tracked.parameter for tracked in self._asked.values()]
        return [(distributed.Identity(p), None if p.is_inference() else p._version) for p in parameters]

    def _bring_together(self) -> None:
        """What quantizers have to know of whole weights, of which each process holds a part. One collective."""
        for table, names in self._sharded.tables:
            table.clear()
            handed: dict[int, Tensor] = {}
            for index, name in enumerate(names):
                if name not in self._failed:
                    try:
                        weight, quantizer = self._asked[name].unwrapped()
                        statistic: Tensor = quantizer.statistic(weight)  # type: ignore[attr-defined]
                        table.put(index, statistic, weight.numel())
                        handed[index] = statistic
                        self._layer(self._asked[name], weight, quantizer)
                    except Exception as error:
                        self._give_up(name, error)
                if name in self._failed or name in self._unsure:
                    table.flag(index, 2 if name in self._failed else 1)
            table.reduce()
            for index, statistic in handed.items():
                try:
                    if (layer := self._layers.get(names[index])) is not None:
                        layer.statistic = table.get(index, statistic)
                except Exception as error:
                    self._give_up(names[index], error)

    def _end_sharded(self) -> None:
        """Count nothing of a weight that any process is not sure of."""
        for table, names in self._sharded.tables:
            is_counted = table.is_counted
            for ledger in self._ledgers.values():
                rows = {
                    index: layer.row.index
                    for index, name in enumerate(names)
                    if (layer := self._layers.get(name)) is not None and layer.row and layer.row.ledger is ledger
                }
                if rows:
                    ledger.keep(list(rows.values()), is_counted[list(rows)])

    # ------------------------------------------------------------------ totals

    def get_flip_counts(self) -> dict[str, int]:
        """Flips of each layer since tracking began. Waits for the device, as all of these."""
        return {name: counts.flips for name, counts in self._totals().items()}

    def get_flip_rates(self) -> dict[str, float]:
        """Cumulative flip rate of each layer: flips / weights; can exceed 1. 0.0 for an empty layer."""
        return {
            name: counts.flips / self._layers[name].weights if self._layers[name].weights else 0.0
            for name, counts in self._totals().items()
        }

    def get_update_counts(self) -> dict[str, int]:
        """Updates of each layer: weights whose gradient was not exactly 0, open snapshots included."""
        updates = {name: counts.updates for name, counts in self._totals().items()}
        for name, snapshot in self._snapshots.items():
            if snapshot.updates is not None:
                updates[name] = updates.get(name, 0) + int(snapshot.updates.item())
        return updates

    def get_stall_counts(self) -> dict[str, int]:
        """Stalled weights of each layer: those with an update and no flip."""
        return {name: counts.stalled for name, counts in self._totals().items()}

    def get_stall_ratios(self) -> dict[str, float]:
        """Stalled / updates of each layer, in [0, 1]; 0.0 without updates."""
        return {name: counts.stall_ratio if counts.updates else 0.0 for name, counts in self._totals().items()}

    def __str__(self) -> str:
        """A table: what each layer, and all together, did since tracking began."""
        steps, totals = self._read()
        rows: list[tuple[str, ...]] = [("layer", "quantizer", "weights", "flips", "flips/weight", "stall ratio")]
        sums: dict[str, tuple[int, Counts]] = {}
        for name, total in totals.items():
            layer, counts = self._layers[name], self._as_counts(total)
            rows.append(_table_row(split_variant(name)[0], layer.quantizer, layer.weights, counts))
            # Of weights that are tracked with several quantizers, a sum for each.
            _, seen_as = split_variant(name)
            weights, so_far = sums.get(seen_as, (0, Counts()))
            sums[seen_as] = weights + layer.weights, so_far + counts
        rows += [_table_row("all", seen_as, weights, counts) for seen_as, (weights, counts) in sums.items()]
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([f"after step {steps}", *lines])

    def memory_usage(self) -> MemoryUsage:
        """Bytes held now, on all devices together."""
        codes = sum(
            kept.nbytes
            for layer in self._layers.values()
            for kept in (layer.codes, layer.scale_codes, layer.scale)
            if kept is not None
        )
        counters = sum(ledger.nbytes for ledger in self._ledgers.values())
        metrics = sum(
            sum(metric.nbytes for metric in (layer.metrics or {}).values() if metric is not None)
            + sum(tensor.nbytes for tensors in layer.saved.values() for tensor in tensors.values())
            for layer in self._layers.values()
        )
        return MemoryUsage(codes, counters, self._scratch.nbytes + self._canary.nbytes, metrics)

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
        steps, totals = self._read()
        layers, ratios = [], []
        for name, total in totals.items():
            layer, base = self._layers[name], self._window_base.get(name, self._zeros())
            layers.append([name, layer.weights, layer.quantizer, total[:COLUMNS], base[:COLUMNS]])
            now, then = self._as_counts(total).ratios, self._as_counts(base).ratios
            ratios += [[name, of, *now[of], *then[of]] for of in now]
        weights = {
            name: kept
            for name, layer in self._layers.items()
            if name not in self._sharded and (kept := layer.metric_tensors())
        }
        return {"version": checkpoint.VERSION, "steps": steps, "layers": layers, "ratios": ratios, "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``. The next step's first snapshot is a baseline.

        A layer that has another number of weights now starts anew, with a warning.

        Raises:
            TypeError: Not a dictionary.
            ValueError: Not a tracker's state, a damaged one, or one of a later version. The tracker is as it was.
        """
        steps, saved = checkpoint.parse(state_dict)
        columns = {
            ratio: COLUMNS + group.sums.start + 2 * i
            for group in self._groups
            for i, ratio in enumerate(group.metric.ratios)
        }
        asked = {group.metric.name for group in self._groups}
        unasked: set[str] = set()
        layers, window_base = {}, {}
        for name, of in saved.items():
            layer = layers[name] = Layer(name, of.weights, of.quantizer, [*of.total, *self._zeros()[COLUMNS:]])
            base = window_base[name] = [*of.base, *self._zeros()[COLUMNS:]]
            for ratio in columns.keys() & of.ratios.keys():
                at = slice(columns[ratio], columns[ratio] + 2)
                layer.base[at], base[at] = of.ratios[ratio][:2], of.ratios[ratio][2:]
            layer.saved = {group: tensors for group, tensors in of.tensors.items() if group in asked}
            unasked.update(of.tensors.keys() - asked)
        self.reset()
        self._layers, self._window_base, self._progress = layers, window_base, _Progress(steps)
        if unasked and distributed.is_writer():
            warnings.warn(
                f"weightflip: what {sorted(unasked)} remembered of each weight in the checkpoint is dropped, since "
                "metrics= does not ask for it",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        passing: dict[str, Any] = {"_current": [], "_grads": {}, "_asked": {}, "_marks": None, "_together": {}}
        passing.update(_listed=[], _holding=None, _canary=Canary())
        return {**self.__dict__, **passing, "_scratch": kernels.ScratchPool()}

    # ------------------------------------------------------------------ inside

    def _layer(self, tracked: TrackedWeight, weight: Tensor, seen_by: Quantizer) -> Layer:
        """The layer with a row on the weight's device."""
        name, quantizer, weights = tracked.name, quantizer_name(seen_by), tracked.parameter.numel()
        layer = self._layers.get(name)
        if layer is not None and (layer.weights, layer.quantizer) != (weights, quantizer):
            change = (
                f"was tracked as {layer.quantizer} and is {quantizer}"
                if layer.weights == weights
                else f"had {layer.weights} weights and has {weights}"
            )
            self._untold.append(f"weightflip: {name!r} {change} now; its counts start anew")
            self._window_base.pop(name, None)
            if layer.row is not None:
                layer.row.clear()
            layer = self._layers[name] = Layer(name, weights, quantizer, self._zeros(), row=layer.row)
        if layer is None:
            layer = self._layers[name] = Layer(name, weights, quantizer, self._zeros())
        if layer.row is None or layer.row.ledger.device != weight.device:
            layer = self._layers[name] = self._moved(layer, weight.device)
        return layer

    def _moved(self, layer: Layer, device: torch.device) -> Layer:
        """The layer with a row on a device, where it starts with a baseline. A new object: it is moved or it is not."""
        own, base = layer.own, layer.base
        if layer.row is not None:
            row = self._read_rows()[1][layer.name]
            if layer.name in self._sharded:
                own = self._own(layer.name, {layer.name: row})
            else:
                base = self._added(base, row)
        ledger = self._ledgers.setdefault(device, Ledger(device, self._columns - COLUMNS))
        moved = replace(layer, own=own, base=base, row=Row(ledger, ledger.add_row()))
        moved.drop_codes()
        moved.close_metrics()
        return moved

    def _zeros(self) -> list[float]:
        return [0] * self._columns

    def _ensure_codes(self, tracked: TrackedWeight, *, may_wait: bool = False) -> bool:
        """Have the codes of a weight at hand; False where they wait for others, to be made together."""
        weight, quantizer = tracked.unwrapped()
        layer = self._layer(tracked, weight, quantizer)
        is_unwritten = layer.stamp is not None and layer.stamp == Stamp.of(tracked.parameter, weight)
        is_told = tracked.name in self._asked and self._is_told
        if tracked.name in self._asked and not is_told and not is_unwritten:
            # Written, but not by what all processes do: the scale of now is not known.
            self._unsure.add(tracked.name)
        is_kept = layer.codes is not None and not self.fresh_snapshots and not is_told
        is_kept = is_kept and not getattr(quantizer, "has_state", False)
        if is_kept and is_unwritten and layer.codes is not None and layer.codes.shape == weight.shape:
            if layer.member is not None:
                # Another object for the same weight: the model was looked at again.
                is_same = layer.member.describes(weight, quantizer, layer.codes)
                layer.tracked, layer.member = (tracked, layer.member) if is_same else (None, None)
            elif may_wait and isinstance(quantizer, ElementwiseQuantizer):
                self._is_member(layer, tracked, weight)
            return True
        layer.stamp = None
        if not isinstance(quantizer, ElementwiseQuantizer):
            # A copy: these codes are written to, and a quantizer may hand out a view of the weight.
            encoded = quantizer.encode(weight)
            layer.codes = encoded.ordinals.clone()
            layer.scale_codes = _scale_codes(quantizer, encoded.scale, weight.ndim)
            layer.scale = encoded.scale if self._groups else None
            return True
        dtype = quantizer.code_dtype(weight)
        if layer.codes is None or layer.codes.shape != weight.shape or layer.codes.dtype != dtype:
            layer.codes = torch.empty_like(weight, dtype=dtype)
        if may_wait and self._is_member(layer, tracked, weight):
            return False
        scale = functional.encode_into(
            weight, quantizer, layer.codes, self._scratch, self.backend, self._statistic(layer)
        )
        layer.scale_codes = _scale_codes(quantizer, scale, weight.ndim)
        layer.scale = scale if self._groups else None
        return True

    def _statistic(self, layer: Layer) -> Tensor | None:
        return layer.statistic if layer.name in self._asked else None

    def _count(self, tracked: TrackedWeight, valid: Tensor | None) -> None:
        layer = self._layers[tracked.name]
        weight, quantizer = tracked.unwrapped()
        assert layer.codes is not None
        assert layer.row is not None
        # After the step, since a closure makes them in it; before the step, where a hook has taken them away in it.
        grad = self._grads.pop(tracked.name, None)
        if "stalls" in self.metrics and tracked.parameter.grad is not None:
            grad = tracked.parameter.grad
        grad = None if grad is None else distributed.local_gradient(grad, tracked.parameter)
        row = layer.row.step
        counts = row[COUNTED]

        sparse = grad if grad is not None and grad.layout is not torch.strided else None
        if sparse is not None:
            sparse = sparse.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
            at = tuple(sparse.indices())
            before = layer.codes[at]
        dense = None if grad is None or sparse is not None else grad.detach()

        observe = self._observer(layer, weight, quantizer, valid)
        if isinstance(quantizer, ElementwiseQuantizer):
            scale = functional.advance(
                weight,
                quantizer,
                layer.codes,
                dense,
                counts,
                self._scratch,
                self.backend,
                observe,
                self._statistic(layer),
            )
        else:
            encoded = quantizer.encode(weight)
            functional.compare(layer.codes, encoded.ordinals, dense, counts, self._scratch, observe)
            scale = encoded.scale
        layer.scale = scale if self._groups else None
        for group, metric in self._due(layer):
            self._ask(layer, group, metric.after, _seen(layer, weight, quantizer), self._sums(layer, group))
        scale_codes = _scale_codes(quantizer, scale, weight.ndim)
        if scale_codes is not None and layer.scale_codes is not None:
            row[SCALE_CHANGES].copy_(torch.count_nonzero(scale_codes != layer.scale_codes))
            row[SCALE_STEPS].fill_(scale_codes.numel())
        layer.scale_codes = scale_codes
        if layer.member is not None:
            # Alone in this step, for its gradient or its place; maybe not in the next one.
            self._is_member(layer, tracked, weight)
        if sparse is not None:
            updated = sparse.values() != 0
            counts[kernels.UPDATES].add_(torch.count_nonzero(updated))
            counts[kernels.STALLED].add_(torch.count_nonzero(updated & (layer.codes[at] == before)))
        row[WEIGHT_STEPS].fill_(weight.numel())
        layer.stamp = Stamp.of(tracked.parameter, weight)

    def _is_unwritten(self, tracked: TrackedWeight) -> bool:
        """Whether a weight is in the same memory and has not been written, as far as that leaves a trace."""
        layer = self._layers.get(tracked.name)
        if layer is None or layer.stamp is None:
            return False
        return layer.stamp == Stamp.of(tracked.parameter, tracked.unwrapped()[0])

    def _distrust(self, written: str | None) -> None:
        """Take the snapshots of the next step anew, because a weight was written without a trace.

        In a sharded run other processes may not have noticed, so that the marks, on which collectives depend, stay.
        """
        if written is None:
            return
        for layer in self._layers.values():
            layer.stamp = None
        if not self._has_warned_of_silent_writes:
            self._has_warned_of_silent_writes = True
            self._untold.append(
                f"weightflip: {written!r} was written between two steps in a way that leaves no trace, such as through "
                "its .data; such changes are counted as flips of the next step. Snapshots are taken anew where it is "
                "noticed; pass fresh_snapshots=True to take them anew in each step"
            )

    def _forget_codes(self) -> None:
        self._marks = None
        self._canary.forget()
        for layer in self._layers.values():
            layer.stamp = None
            if self.low_memory or self._is_over:
                layer.drop_codes()
        if self.low_memory or self._is_over:
            self._together = {}

    def give_up(self, name: str, reason: str) -> None:
        """Count a weight no more; where it is sharded, others do so, too, from the next logging point on."""
        if name not in self._failed:
            self._give_up(name, ValueError(reason))

    def _give_up(self, name: str, error: Exception, *, tells: bool = True) -> None:
        self._failed.add(name)
        layer = self._layers.get(name)
        if layer is not None and layer.row is not None:
            layer.row.ledger.discard(layer.row.index)
            layer.drop_codes(metrics=True)
        self._together = {}
        if not tells:
            return
        self._untold.append(
            f"weightflip: {name!r} is not tracked any more, training goes on: {type(error).__name__}: {error}"
        )

    def _tell(self) -> None:
        """Warn of what was found, unless a caller does so later.

        Not where it was found: there a warning that is made an error would keep this process from what others wait for.
        """
        if not self.holds_warnings:
            for text in self.take_warnings():
                warnings.warn(text, stacklevel=3)

    def take_warnings(self) -> list[str]:
        """What has not been warned about yet, where ``holds_warnings`` is set."""
        untold, self._untold = [shown(text) for text in self._untold], []
        return untold

    # ------------------------------------------------------------------ many weights in one call

    def _is_member(self, layer: Layer, tracked: TrackedWeight, weight: Tensor) -> bool:
        """Whether a layer is encoded and counted together with others. Metric groups look at each weight by itself."""
        quantizer, codes = tracked.quantizer, layer.codes
        assert codes is not None
        if layer.member is not None and layer.member.describes(weight, quantizer, codes):
            self._join(layer, tracked)
            return True
        layer.tracked = layer.member = None
        if not isinstance(quantizer, ElementwiseQuantizer) or self._groups or tracked.parameter.is_inference():
            return False
        if distributed.local(tracked.parameter) is not tracked.parameter:
            return False
        if not any(hasattr(quantizer, name) for name in ("encodes", "is_active", "has_state")):
            layer.member = make_member(weight, quantizer, codes, self.backend, with_updates="stalls" in self.metrics)
        if layer.member is None:
            return False
        self._join(layer, tracked)
        return True

    def _join(self, layer: Layer, tracked: TrackedWeight) -> None:
        assert layer.member is not None
        mine, theirs = layer.scale_codes, layer.member.scale_codes
        if mine is not None and theirs is not None and mine is not theirs:
            theirs.copy_(mine)
        layer.tracked, layer.scale_codes = tracked, theirs

    def _is_untouched(self, tracked: TrackedWeight) -> bool:
        """What ``_ensure_codes`` finds out of a member that has its codes, asked as cheaply as can be."""
        layer = self._layers.get(tracked.name)
        if layer is None or layer.tracked is not tracked or layer.stamp is None or self.fresh_snapshots:
            return False
        parameter, stamp = tracked.parameter, layer.stamp
        return (
            parameter._version == stamp.versions[0]
            and id(parameter) == stamp.parameter
            and layer.codes is not None
            and self._lies_as_member(parameter, layer.codes, stamp)
        )

    @staticmethod
    def _lies_as_member(parameter: Tensor, codes: Tensor, stamp: Stamp) -> bool:
        """Whether a weight that is counted together with others lies in memory as it did: those are contiguous."""
        return (
            parameter.shape == codes.shape
            and parameter.dtype is stamp.dtype
            and parameter.is_contiguous()
            and stamp.is_of(parameter.data_ptr())
        )

    def _encode_together(self, stale: Sequence[TrackedWeight]) -> None:
        alike: dict[torch.device, dict[str, Member]] = {}
        for tracked in stale:
            member = self._layers[tracked.name].member
            assert member is not None
            alike.setdefault(member.codes.device, {})[tracked.name] = member
        for members in alike.values():
            names = list(members)
            try:
                failed = Batch(list(members.values()), with_updates=False).advance([]).failed
            except Exception as error:
                failed = [(index, error) for index in range(len(names))]
            for index, reason in failed:
                self._give_up(names[index], reason)
        self._current = [tracked for tracked in self._current if tracked.name not in self._failed]

    def _count_together(self) -> list[TrackedWeight]:
        """Count the weights of this step that are members, in one call; the others are left to be counted alone."""
        alone: list[TrackedWeight] = []
        alike: dict[torch.device, list[tuple[Layer, Member, int]]] = {}
        with_updates = "stalls" in self.metrics
        for tracked in self._current:
            layer = self._layers[tracked.name]
            member, parameter, update = layer.member, tracked.parameter, 0
            if member is None:
                alone.append(tracked)
                continue
            if with_updates:
                # As in _count, which says why.
                grad = parameter.grad
                grad = self._grads.get(tracked.name) if grad is None else grad
                if grad is not None:
                    update = _address_beside(grad, member)
                    if not update:
                        alone.append(tracked)
                        continue
            stamp = layer.stamp
            if stamp is None:
                weight = parameter.detach()
                is_there = member.describes(weight, tracked.quantizer, layer.codes)
                layer.stamp = Stamp.of(parameter, weight)
            else:
                is_there = self._lies_as_member(parameter, member.codes, stamp)
                version = parameter._version
                stamp.versions = (version, version)
            if not is_there:
                alone.append(tracked)
                continue
            alike.setdefault(member.codes.device, []).append((layer, member, update))
        for device, found in alike.items():
            members = [member for _, member, _ in found]
            try:
                together = self._together.get(device)
                if together is None or together.batch.members != members:
                    layers = [layer for layer, _, _ in found]
                    together = self._together[device] = _Together(layers, Batch(members, with_updates=with_updates))
                failed = list(together.count([update for _, _, update in found]))
            except Exception as error:
                failed = [(index, error) for index in range(len(found))]
            for index, reason in failed:
                self._give_up(found[index][0].name, reason)
        return alone

    # ------------------------------------------------------------------ metric groups

    def _before_step_of_metrics(self, tracked: TrackedWeight) -> None:
        """Open the groups of a layer that has its baseline now, and let them see the weight before the step."""
        if not self._groups:
            return
        layer = self._layers[tracked.name]
        seen = _seen(layer, *tracked.unwrapped())
        kind = seen.codes.shape, seen.codes.dtype
        if layer.metrics is not None and layer.code_kind != kind:
            # Stored in another dtype now: what was remembered is of other codes.
            layer.metrics = None
        if layer.metrics is None:
            layer.metrics, layer.code_kind = {}, kind
            for group in self._groups:
                self._ask(layer, group, self._open, layer, group, seen)
        for group, metric in self._due(layer):
            self._ask(layer, group, metric.before, seen)

    def _open(self, layer: Layer, group: Group, seen: Weight) -> None:
        assert layer.metrics is not None
        if layer.name in self._sharded and not group.metric.of_shards:
            layer.metrics[group.metric.name] = None
            return
        metric = layer.metrics[group.metric.name] = group.metric.open(layer.name, seen)
        saved = layer.saved.pop(group.metric.name, {})
        for name, tensor in {} if metric is None else metric.tensors.items():
            kept = saved.get(name)
            if kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype):
                tensor.copy_(kept)

    def _due(self, layer: Layer) -> list[tuple[Group, LayerMetric]]:
        """The groups that look at this step, with what they keep of the layer."""
        if layer.metrics is None:
            return []
        tracked_steps = (self._steps - self.start_step) // self.track_every
        return [
            (group, metric)
            for group in self._groups
            if tracked_steps % group.every == 0 and (metric := layer.metrics.get(group.metric.name)) is not None
        ]

    def _ask(self, layer: Layer, group: Group, action: Callable[..., None], *args: Any) -> None:
        """A group that fails on a layer is warned about once; everything else goes on."""
        try:
            action(*args)
        except Exception as error:
            assert layer.metrics is not None
            layer.metrics[group.metric.name] = None
            self._untold.append(
                f"weightflip: {layer.name!r} has no numbers of {group.metric.name!r} any more, all else goes on: "
                f"{type(error).__name__}: {error}"
            )

    def _sums(self, layer: Layer, group: Group) -> Tensor:
        assert layer.row is not None
        assert layer.row.ledger.more_step is not None
        return layer.row.ledger.more_step[layer.row.index, group.sums].view(-1, 2)

    def _observer(
        self, layer: Layer, weight: Tensor, quantizer: Quantizer, valid: Tensor | None
    ) -> functional.Observer | None:
        """What shows each slice of a weight to the groups; None if none wants to see it."""
        due = [(group, metric) for group, metric in self._due(layer) if type(metric).slice is not LayerMetric.slice]
        if not due:
            return None
        values = quantizer.grouped(weight) if isinstance(quantizer, ElementwiseQuantizer) else weight

        valid = None if valid is None else valid.to(weight.device, non_blocking=True)

        def observe(index: kernels.Index, old: Tensor, new: Tensor) -> None:
            part = Slice(index, values[index], old, new, valid, self._scratch, self.backend)
            for group, metric in due:
                self._ask(layer, group, metric.slice, part, self._sums(layer, group))

        return observe

    def _gauge(self) -> None:
        """Let the groups look at the weights of the last step, at a logging point."""
        for ledger in self._ledgers.values():
            if ledger.more_total is not None:
                for group in self._groups:
                    ledger.more_total[:, group.gauges.start : group.bins.stop].zero_()
        due = [
            group
            for group in self._groups
            if group.gauges.start < group.bins.stop
            and self._steps - self._gauged.get(group.metric.name, -group.every) >= group.every
        ]
        has_news, self._has_news = self._has_news, False
        if not due or not self._current or not has_news:
            return
        self._gauged.update({group.metric.name: self._steps for group in due})
        for tracked in self._current:
            if not tracked.is_held:
                continue
            try:
                self._ensure_codes(tracked)
            except Exception as error:
                self._give_up(tracked.name, error)
                continue
            layer = self._layers[tracked.name]
            seen = _seen(layer, *tracked.unwrapped())
            assert layer.row is not None
            assert layer.row.ledger.more_total is not None
            row = layer.row.ledger.more_total[layer.row.index]
            for group in due:
                metric = (layer.metrics or {}).get(group.metric.name)
                if metric is not None:
                    self._ask(layer, group, metric.gauge, seen, row[group.gauges].view(-1, 2), row[group.bins])
            if self.low_memory or self._is_over:
                layer.drop_codes(stamp=False)

    # ------------------------------------------------------------------ reading the counters

    def _read(self) -> tuple[int, dict[str, list[float]]]:
        """Steps and the totals of all layers: one transfer from each device, or none in a sharded run."""
        if self._sharded:
            # What every process can answer alike, without asking the others.
            return self._added_up or (self._steps, {name: layer.base for name, layer in self._layers.items()})
        steps, rows = self._read_rows()
        return steps, {name: self._added(layer.base, rows[name]) for name, layer in self._layers.items()}

    def _added(self, before: Sequence[float], row: Sequence[float]) -> list[float]:
        return [
            now if self._is_gauge[column] else then + now
            for column, (then, now) in enumerate(zip(before, row, strict=True))
        ]

    def _read_rows(self) -> tuple[int, dict[str, list[float]]]:
        """Steps, and what this process has counted of all layers since they have their rows."""
        self._settle()
        skipped = 0
        answers: dict[int, int] = {}
        tables: dict[torch.device, list[list[float]]] = {}
        pending = self._progress.skipped
        for device, ledger in self._ledgers.items():
            table = ledger.total[: ledger.rows]
            if ledger.more_total is not None:
                table = torch.cat([table, ledger.more_total[: ledger.rows].view(torch.int64)], dim=1)
            here = [i for i, (_, answer) in enumerate(self._canary.pending) if answer.device == device]
            others = [self._canary.pending[i][1].view(1) for i in here]
            if pending is not None and pending.device == device:
                others.append(pending.view(1))
            host = torch.cat([table.flatten(), *others]).cpu() if others else table.flatten().cpu()
            numbers = host[table.numel() :].tolist()
            if len(numbers) > len(here):
                skipped, pending = numbers[-1], None
            answers.update(zip(here, numbers, strict=False))
            host = host[: table.numel()].view(table.shape)
            more = host[:, COLUMNS:].view(torch.float64) if ledger.more else host[:, COLUMNS:]
            tables[device] = [
                [*row, *numbers] for row, numbers in zip(host[:, :COLUMNS].tolist(), more.tolist(), strict=True)
            ]
        if pending is not None:
            skipped = int(pending.item())
        self._distrust(self._canary.answered([answers.get(i, 0) for i in range(len(self._canary.pending))]))
        rows = {
            name: self._zeros() if layer.row is None else tables[layer.row.ledger.device][layer.row.index]
            for name, layer in self._layers.items()
        }
        return self._steps - skipped, rows

    def _totals(self) -> dict[str, Counts]:
        return {name: self._as_counts(row) for name, row in self._read()[1].items()}

    def _as_counts(self, row: Sequence[float]) -> Counts:
        return Counts(
            weight_steps=int(row[WEIGHT_STEPS]),
            flips=int(row[kernels.FLIPS]),
            updates=int(row[kernels.UPDATES]),
            stalled=int(row[kernels.STALLED]),
            scale_steps=int(row[SCALE_STEPS]),
            scale_changes=int(row[SCALE_CHANGES]),
            ratios=ratios_of(self._groups, row[COLUMNS:]),
        )


class _Together:
    """A batch on one device, and where its layers are counted."""

    def __init__(self, layers: Sequence[Layer], batch: Batch) -> None:
        self.batch = batch
        rows = [layer.row for layer in layers if layer.row is not None]
        self._ledger = rows[0].ledger
        scales = [0 if layer.scale_codes is None else layer.scale_codes.numel() for layer in layers]
        numbers = [row.index for row in rows], [layer.weights for layer in layers], scales
        of_layers = torch.tensor(numbers, device="cpu")
        self._rows, self._weights, self._scales = kernels.upload(of_layers, self._ledger.device)
        self._has_scales = any(scales)

    def count(self, updates: Sequence[int]) -> list[tuple[int, Exception]]:
        """Count a step; the layers that could not be counted, and why."""
        counted = self.batch.advance(updates)
        step = self._ledger.step
        step[:, COUNTED].index_copy_(0, self._rows, counted.counts)
        step[:, WEIGHT_STEPS].index_copy_(0, self._rows, self._weights)
        if self._has_scales:
            step[:, SCALE_STEPS].index_copy_(0, self._rows, self._scales)
            step[:, SCALE_CHANGES].index_copy_(0, self._rows, counted.scale_changes)
        return counted.failed


def _seen(layer: Layer, weight: Tensor, quantizer: Quantizer) -> Weight:
    """A weight as metric groups see it."""
    assert layer.codes is not None
    if isinstance(quantizer, ElementwiseQuantizer):
        return Weight(quantizer.grouped(weight), quantizer.grouped(layer.codes), layer.scale, quantizer)
    return Weight(weight, layer.codes, layer.scale, quantizer)


def _table_row(name: str, quantizer: str, weights: int, counts: Counts) -> tuple[str, ...]:
    per_weight = f"{counts.flips / weights:.2f}" if weights else "-"
    stall_ratio = f"{counts.stall_ratio:.1%}" if counts.updates else "-"
    return shown(name), shown(quantizer), f"{weights:,}", f"{counts.flips:,}", per_weight, stall_ratio


def _scale_codes(quantizer: Quantizer, scale: Tensor | None, ndim: int) -> Tensor | None:
    """What is stored of scales that are codes themselves: those of blocks and groups, ``(..., K // group, 1)``."""
    if scale is None:
        return None
    if isinstance(quantizer, ElementwiseQuantizer):
        return None if quantizer.group is None else quantizer.scale_codes(scale)
    is_of_groups = scale.ndim == ndim + 1
    return bits_of_scale(scale) if is_of_groups else None


def _address_beside(grad: Tensor, member: Member) -> int:
    """Where a gradient lies, if it can be read as the member's weight is; else 0."""
    fits = (
        type(grad) is Tensor
        and grad.dtype is member.dtype
        and grad.layout is torch.strided
        and grad.is_contiguous()
        and grad.numel() == member.numel
    )
    return grad.data_ptr() if fits else 0
