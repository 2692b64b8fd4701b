"""Which weights, when, and the counters on the weights' device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from weightflip import functional, kernels
from weightflip.quantizers.base import ElementwiseQuantizer, Quantizer, quantizer_name, resolve
from weightflip.records import Counts, FlipRecord, LayerRecord, split_variant

METRICS = ("flips", "stalls")

# Columns of the counters on the device: what the kernels count, then what the tracker adds.
_COUNTED = slice(0, 3)
_WEIGHT_STEPS, _NONFINITE, _SCALE_STEPS, _SCALE_CHANGES = 3, 4, 5, 6
_COLUMNS = 7
_GAUGES = (_NONFINITE,)


class TrackedWeight(NamedTuple):
    """One weight of a step: its name, the parameter, and how it is quantized."""

    name: str
    parameter: Tensor
    quantizer: Quantizer


class MemoryUsage(NamedTuple):
    """Bytes that a tracker holds between steps.

    Attributes:
        codes: The codes of the weights: a byte a weight for formats of up to 8 bits.
        counters: A few numbers a layer.
        buffers: Scratch memory, of a fixed size once every format was seen.
    """

    codes: int
    counters: int
    buffers: int


class _Stamp(NamedTuple):
    """Tells whether a parameter was written, replaced or moved since."""

    # Not a weak reference: torch.utils.swap_tensors, and with it Module.to(), refuses tensors that have one. The
    # tracker holds the parameter itself for as long as the stamp is of use, so the id is not given to another.
    parameter: int
    # Memory that was given back may be given out again for the next storage: an address alone does not tell.
    storage: StorageWeakRef
    data_ptr: int
    versions: tuple[int, int]


@dataclass
class _Ledger:
    """The counters of all layers on one device: a row each."""

    device: torch.device
    rows: int = 0
    total: Tensor = field(init=False)
    step: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(0, _COLUMNS, dtype=torch.int64, device=self.device)
        self.step = torch.zeros_like(self.total)

    def add_row(self) -> int:
        if self.rows == self.total.size(0):
            more = torch.zeros(max(16, self.rows), _COLUMNS, dtype=torch.int64, device=self.device)
            self.total = torch.cat([self.total, more])
            self.step = torch.cat([self.step, more])
        self.rows += 1
        return self.rows - 1


@dataclass
class _Layer:
    """What is known of one weight between steps."""

    name: str
    weights: int
    quantizer: str
    base: list[int] = field(default_factory=lambda: [0] * _COLUMNS)
    """Counted before this ledger: in a loaded checkpoint, or on another device."""
    ledger: _Ledger | None = None
    row: int = -1
    codes: Tensor | None = None
    scale_codes: Tensor | None = None
    """Of block and group scales."""
    stamp: _Stamp | None = None

    def drop_codes(self) -> None:
        self.codes = self.scale_codes = self.stamp = None

    def __getstate__(self) -> dict[str, Any]:
        # The stamp is about this process's parameter: a copy encodes its own anew.
        return {**self.__dict__, "codes": None, "scale_codes": None, "stamp": None}


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
        metrics: ``"flips"``, ``"stalls"`` or both. Stalls need the gradients.
        track_every: Track every n-th step.
        start_step: First step to track, from 0.
        end_step: Track no step from this one on; None for no end.
        low_memory: Drop the codes after each step instead of keeping them for the next one (saves a byte a weight for
            8-bit formats, costs a second encoding).
        fresh_snapshots: Encode anew before each step, for scripts that write weights through ``.data``, which leaves
            no trace.
        backend: ``"auto"`` for the fastest there is, ``"eager"`` for plain torch, ``"numba"`` to insist on the
            compiled kernel for weights on the CPU. They count the same; what a kernel does not cover goes to eager.

    Raises:
        ValueError: An unknown metric or backend, or step numbers that make no sense.
        ImportError: ``backend="numba"`` without Numba.

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
        metrics: Sequence[str] = METRICS,
        track_every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        low_memory: bool = False,
        fresh_snapshots: bool = False,
        backend: str = "auto",
    ) -> None:
        kernels.check_backend(backend)
        unknown = [metric for metric in metrics if metric not in METRICS]
        if unknown or isinstance(metrics, str) or "flips" not in metrics:
            raise ValueError(f"metrics= is a sequence of {METRICS} with 'flips' in it, got {metrics!r}")
        _check_whole("track_every", track_every, 1)
        _check_whole("start_step", start_step, 0)
        if end_step is not None:
            _check_whole("end_step", end_step, start_step + 1)
        self.metrics = tuple(metrics)
        self.track_every = track_every
        self.start_step = start_step
        self.end_step = end_step
        self.low_memory = low_memory
        self.fresh_snapshots = fresh_snapshots
        self.backend = backend
        self.reset()

    def reset(self) -> None:
        """Forget everything counted, the number of steps included."""
        self._layers: dict[str, _Layer] = {}
        self._ledgers: dict[torch.device, _Ledger] = {}
        self._scratch = kernels.ScratchPool()
        self._snapshots: dict[str, _Snapshot] = {}
        self._current: list[TrackedWeight] = []
        self._grads: dict[str, Tensor | None] = {}
        self._in_step = False
        self._failed: set[str] = set()
        self._steps = 0
        self._skipped: Tensor | None = None
        self._window_base: dict[str, list[int]] = {}

    # ------------------------------------------------------------------ one weight at a time

    @property
    def prev_quantized(self) -> dict[str, Tensor]:
        """Codes of the weights that have a snapshot and no post-step count yet."""
        return {name: snapshot.codes for name, snapshot in self._snapshots.items()}

    @torch.no_grad()
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
        quantizer = resolve(format, scale)
        codes = quantizer.encode(weight.detach()).ordinals.clone()
        updated = None if grad is None else (grad.to_dense() if grad.is_sparse else grad) != 0
        updates = None if updated is None else torch.count_nonzero(updated)
        self._layer(name, weight, quantizer_name(quantizer))
        self._snapshots[name] = _Snapshot(codes, updated, updates)

    @torch.no_grad()
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
        del self._snapshots[name]
        layer = self._layers[name]
        assert layer.ledger is not None
        counts = torch.zeros(3, dtype=torch.int64, device=weight.device)
        functional.compare(snapshot.codes, codes, snapshot.updated, counts, self._scratch)
        row = layer.ledger.total[layer.row]
        row[_COUNTED].add_(counts)
        row[_WEIGHT_STEPS].add_(weight.numel())
        return int(counts[kernels.FLIPS].item())

    # ------------------------------------------------------------------ many weights, a step at a time

    @property
    def is_tracking(self) -> bool:
        """Whether the coming step is one that is tracked."""
        if self._steps < self.start_step or (self.end_step is not None and self._steps >= self.end_step):
            return False
        return (self._steps - self.start_step) % self.track_every == 0

    @property
    def step_count(self) -> int:
        """Optimizer steps so far, skipped ones not counted. Waits for the device if any step may have been skipped."""
        return self._steps - (0 if self._skipped is None else int(self._skipped.item()))

    @torch.no_grad()
    def before_step(self, weights: Iterable[TrackedWeight]) -> None:
        """Have the codes of the weights at hand, just before the optimizer's step.

        The codes after the last step are the codes before this one, unless the weight was written, replaced or moved in
        between; then it is encoded anew, and that change is no flip.

        Args:
            weights: The weights of this step; names are unique.
        """
        if self._in_step:
            # The last step raised half way: nobody knows what it wrote.
            self._forget_codes()
        self._in_step = True
        if not self.is_tracking:
            return
        self._current, self._grads = [], {}
        for tracked in weights:
            if tracked.name in self._failed:
                continue
            if not getattr(tracked.quantizer, "is_active", True):
                if tracked.name in self._layers:
                    self._layers[tracked.name].stamp = None
                continue
            try:
                self._ensure_codes(tracked)
            except Exception as error:
                self._give_up(tracked.name, error)
            else:
                self._current.append(tracked)
                if "stalls" in self.metrics:
                    self._grads[tracked.name] = tracked.parameter.grad

    def forget_gradients(self) -> None:
        """Let go of the gradients of ``before_step``: a closure makes the step's own.

        The old ones would count for a weight that gets none, and take memory beside the new ones.
        """
        self._grads.clear()

    def drop_codes(self) -> None:
        """Give back the memory of codes and buffers; the numbers stay, and the next step starts with a baseline."""
        for layer in self._layers.values():
            layer.drop_codes()
        self._current, self._scratch = [], kernels.ScratchPool()
        self._grads.clear()

    @torch.no_grad()
    def after_step(self, valid: Tensor | None = None) -> None:
        """Count what the optimizer's step did to the weights of ``before_step``.

        Args:
            valid: 0-dim, on any device: whether the step was one at all (a fused optimizer under a gradient scaler
                skips steps without telling the host). None: it was.
        """
        self._in_step = False
        tracked_step = self.is_tracking
        self._steps += 1
        if valid is not None:
            skipped = valid.logical_not().to(torch.int64)
            self._skipped = skipped if self._skipped is None else self._skipped.to(skipped.device) + skipped
        if not tracked_step:
            return
        for ledger in self._ledgers.values():
            ledger.step.zero_()
        for tracked in self._current:
            try:
                self._count(tracked)
            except Exception as error:
                self._give_up(tracked.name, error)
        self._current = [tracked for tracked in self._current if tracked.name not in self._failed]
        for ledger in self._ledgers.values():
            if valid is None:
                ledger.total.add_(ledger.step)
            else:
                ledger.total.addcmul_(ledger.step, valid.to(ledger.device, torch.int64, non_blocking=True))
        self._grads.clear()
        if self.low_memory or not self.is_tracking:
            # An untracked step changes weights, and not every optimizer's kernel moves their version counters.
            self._forget_codes()

    @torch.no_grad()
    def record(self, *, may_be_empty: bool = False) -> FlipRecord | None:
        """What was counted since the last record, and altogether. One transfer from each device.

        Args:
            may_be_empty: Give a record also when no step was tracked since the last one.

        Returns:
            The record; None when no step was tracked since the last one.
        """
        for tracked in self._current:
            layer = self._layers[tracked.name]
            assert layer.ledger is not None
            weight, plain = tracked.parameter.detach(), getattr(tracked.quantizer, "plain", None)
            functional.count_nonfinite(
                weight if plain is None else plain(weight), layer.ledger.total[layer.row, _NONFINITE], self._scratch
            )
        steps, totals = self._read()
        layers = []
        for name, total in totals.items():
            base = self._window_base.get(name, [0] * _COLUMNS)
            window = _as_counts([now - then for now, then in zip(total, base, strict=True)])
            layers.append(LayerRecord(name, self._layers[name].weights, window, _as_counts(total), total[_NONFINITE]))
        self._window_base = totals
        record = FlipRecord(steps, tuple(layers))
        return record if may_be_empty or record.model.window.weight_steps else None

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
                updates[name] += int(snapshot.updates.item())
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
            layer, counts = self._layers[name], _as_counts(total)
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
            for kept in (layer.codes, layer.scale_codes)
            if kept is not None
        )
        counters = sum(ledger.total.nbytes + ledger.step.nbytes for ledger in self._ledgers.values())
        return MemoryUsage(codes, counters, self._scratch.nbytes)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counts and step number, as plain numbers: loads with ``weights_only=True``.

        Codes are not in it: those of the loaded weights are the same. Its keys are always the same ones, as
        ``torch.distributed.checkpoint`` needs them, which loads what it finds in a fresh object's state.
        """
        steps, totals = self._read()
        none = [0] * _COLUMNS
        layers = [
            [
                name,
                self._layers[name].weights,
                self._layers[name].quantizer,
                total,
                list(self._window_base.get(name, none)),
            ]
            for name, total in totals.items()
        ]
        return {"version": 1, "steps": steps, "layers": layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``. The next step's first snapshot is a baseline.

        A layer that has another number of weights now starts anew, with a warning.

        Raises:
            ValueError: Not a tracker's state, or one of a later version.
        """
        missing = {"version", "steps", "layers"} - set(state_dict)
        if missing or state_dict["version"] != 1:
            raise ValueError(
                "expected what WeightFlipTracker.state_dict() of version 1 returned, got "
                + (f"a dictionary without {sorted(missing)}" if missing else f"version {state_dict['version']!r}")
            )
        layers, window_base = {}, {}
        for name, weights, quantizer, total, base in state_dict["layers"]:
            layers[name] = _Layer(name, int(weights), quantizer, base=[int(n) for n in total])
            window_base[name] = [int(n) for n in base]
        steps = int(state_dict["steps"])
        self.reset()
        self._layers, self._window_base, self._steps = layers, window_base, steps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_current": [], "_grads": {}, "_scratch": kernels.ScratchPool()}

    # ------------------------------------------------------------------ inside

    def _layer(self, name: str, weight: Tensor, quantizer: str) -> _Layer:
        """The layer with a row on the weight's device."""
        layer = self._layers.get(name)
        if layer is not None and (layer.weights, layer.quantizer) != (weight.numel(), quantizer):
            change = (
                f"was tracked as {layer.quantizer} and is {quantizer}"
                if layer.weights == weight.numel()
                else f"had {layer.weights} weights and has {weight.numel()}"
            )
            warnings.warn(f"weightflip: {name!r} {change} now; its counts start anew", stacklevel=2)
            if layer.ledger is not None:
                layer.ledger.step[layer.row].zero_()
            self._window_base.pop(name, None)
            layer = None
        if layer is None:
            layer = self._layers[name] = _Layer(name, weight.numel(), quantizer)
        if layer.ledger is None or layer.ledger.device != weight.device:
            if layer.ledger is not None:
                layer.base = self._read()[1][name]
                layer.ledger.total[layer.row].zero_()
            layer.ledger = self._ledgers.setdefault(weight.device, _Ledger(weight.device))
            layer.row = layer.ledger.add_row()
            layer.drop_codes()
        return layer

    def _ensure_codes(self, tracked: TrackedWeight) -> None:
        weight, quantizer = _weight_and_quantizer(tracked)
        layer = self._layer(tracked.name, weight, quantizer_name(quantizer))
        is_kept = layer.codes is not None and not self.fresh_snapshots
        is_kept = is_kept and not getattr(quantizer, "has_state", False)
        if is_kept and layer.stamp is not None and layer.stamp == _stamp(tracked.parameter, weight):
            return
        layer.stamp = None
        if not isinstance(quantizer, ElementwiseQuantizer):
            # A copy: these codes are written to, and a quantizer may hand out a view of the weight.
            encoded = quantizer.encode(weight)
            layer.codes = encoded.ordinals.clone()
            layer.scale_codes = _scale_codes(quantizer, encoded.scale, weight.ndim)
            return
        dtype = quantizer.code_dtype(weight)
        if layer.codes is None or layer.codes.shape != weight.shape or layer.codes.dtype != dtype:
            layer.codes = torch.empty_like(weight, dtype=dtype)
        scale = functional.encode_into(weight, quantizer, layer.codes, self._scratch, self.backend)
        layer.scale_codes = _scale_codes(quantizer, scale, weight.ndim)

    def _count(self, tracked: TrackedWeight) -> None:
        layer = self._layers[tracked.name]
        weight, quantizer = _weight_and_quantizer(tracked)
        assert layer.codes is not None
        assert layer.ledger is not None
        # After the step, since a closure makes them in it; before the step, where a hook has taken them away in it.
        grad = self._grads.pop(tracked.name, None)
        if "stalls" in self.metrics and tracked.parameter.grad is not None:
            grad = tracked.parameter.grad
        row = layer.ledger.step[layer.row]
        counts = row[_COUNTED]

        sparse = grad if grad is not None and grad.layout is not torch.strided else None
        if sparse is not None:
            sparse = sparse.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
            at = tuple(sparse.indices())
            before = layer.codes[at]
        dense = None if grad is None or sparse is not None else grad.detach()

        if isinstance(quantizer, ElementwiseQuantizer):
            scale = functional.advance(weight, quantizer, layer.codes, dense, counts, self._scratch, self.backend)
        else:
            encoded = quantizer.encode(weight)
            functional.compare(layer.codes, encoded.ordinals, dense, counts, self._scratch)
            scale = encoded.scale
        scale_codes = _scale_codes(quantizer, scale, weight.ndim)
        if scale_codes is not None and layer.scale_codes is not None:
            row[_SCALE_CHANGES].copy_(torch.count_nonzero(scale_codes != layer.scale_codes))
            row[_SCALE_STEPS].fill_(scale_codes.numel())
        layer.scale_codes = scale_codes
        if sparse is not None:
            updated = sparse.values() != 0
            counts[kernels.UPDATES].add_(torch.count_nonzero(updated))
            counts[kernels.STALLED].add_(torch.count_nonzero(updated & (layer.codes[at] == before)))
        row[_WEIGHT_STEPS].fill_(layer.weights)
        layer.stamp = _stamp(tracked.parameter, weight)

    def _forget_codes(self) -> None:
        is_over = self.end_step is not None and self._steps >= self.end_step
        for layer in self._layers.values():
            layer.stamp = None
            if self.low_memory or is_over:
                layer.drop_codes()

    def _give_up(self, name: str, error: Exception) -> None:
        self._failed.add(name)
        layer = self._layers.get(name)
        if layer is not None and layer.ledger is not None:
            layer.ledger.step[layer.row].zero_()
            layer.drop_codes()
        warnings.warn(
            f"weightflip: {name!r} is not tracked any more, training goes on: {type(error).__name__}: {error}",
            stacklevel=2,
        )

    def _read(self) -> tuple[int, dict[str, list[int]]]:
        """Steps and the totals of all layers: one transfer from each device."""
        skipped = 0
        tables: dict[torch.device, list[list[int]]] = {}
        pending = self._skipped
        for device, ledger in self._ledgers.items():
            flat = ledger.total[: ledger.rows].flatten()
            if pending is not None and pending.device == device:
                numbers = torch.cat([flat, pending.view(1)]).tolist()
                skipped, pending = numbers.pop(), None
            else:
                numbers = flat.tolist()
            tables[device] = [numbers[i : i + _COLUMNS] for i in range(0, len(numbers), _COLUMNS)]
        if pending is not None:
            skipped = int(pending.item())
        totals = {}
        for name, layer in self._layers.items():
            row = [0] * _COLUMNS if layer.ledger is None else tables[layer.ledger.device][layer.row]
            totals[name] = [
                now if column in _GAUGES else then + now
                for column, (then, now) in enumerate(zip(layer.base, row, strict=True))
            ]
        return self._steps - skipped, totals

    def _totals(self) -> dict[str, Counts]:
        return {name: _as_counts(row) for name, row in self._read()[1].items()}


class BitStallDetector:
    """Predicts stalls: would this update change the code at all?

    Where :class:`WeightFlipTracker` looks at what a step did, this asks beforehand, for an update of your choice.

    Args:
        format: A quantizer name, ``FloatFormat``, quantizer object or function.
        scale: What weights are divided by before rounding, instead of the format's own rule.

    Attributes:
        stall_count: Stalled updates so far.
        total_count: Attempted updates so far.

    Raises:
        ValueError: Unknown format, or a scale for one that takes none.

    Example:
        >>> detector = BitStallDetector("bfloat16")
        >>> detector.update(torch.ones(4), torch.tensor([0.0, 0.001, 0.004, 0.01]))
        (1, 3)
        >>> detector.get_stall_rate()
        0.3333333333333333
    """

    def __init__(self, format: Any, scale: Tensor | float | None = None) -> None:
        self.quantizer = resolve(format, scale)
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.stall_count = 0
        self.total_count = 0

    @torch.no_grad()
    def update(self, weight: Tensor, update: Tensor) -> tuple[int, int]:
        """Count the updates that rounding would swallow, and add them up.

        Args:
            weight: Floating-point, any shape.
            update: What is to be added to it, such as ``-lr * grad``; of the same shape. The sum is taken in the
                weight's dtype.

        Returns:
            Stalled and attempted: weights with ``update != 0`` that keep their code, and weights with ``update != 0``.

        Raises:
            ValueError: The shapes differ.
        """
        if weight.shape != update.shape:
            raise ValueError(f"Shape mismatch: weight has {tuple(weight.shape)}, update has {tuple(update.shape)}")
        before = self.quantizer.encode(weight.detach()).ordinals
        after = self.quantizer.encode((weight + update).to(weight.dtype)).ordinals
        attempted = update != 0
        stalled = int(torch.count_nonzero(attempted & (before == after)).item())
        total = int(torch.count_nonzero(attempted).item())
        self.stall_count += stalled
        self.total_count += total
        return stalled, total

    def get_stall_rate(self) -> float:
        """Stalled / attempted over all calls; 0.0 without updates."""
        return self.stall_count / self.total_count if self.total_count else 0.0


def _as_counts(row: Sequence[int]) -> Counts:
    return Counts(
        weight_steps=row[_WEIGHT_STEPS],
        flips=row[kernels.FLIPS],
        updates=row[kernels.UPDATES],
        stalled=row[kernels.STALLED],
        scale_steps=row[_SCALE_STEPS],
        scale_changes=row[_SCALE_CHANGES],
    )


def _table_row(name: str, quantizer: str, weights: int, counts: Counts) -> tuple[str, ...]:
    per_weight = f"{counts.flips / weights:.2f}" if weights else "-"
    stall_ratio = f"{counts.stall_ratio:.1%}" if counts.updates else "-"
    return name, quantizer, f"{weights:,}", f"{counts.flips:,}", per_weight, stall_ratio


def _weight_and_quantizer(tracked: TrackedWeight) -> tuple[Tensor, Quantizer]:
    """What is encoded, and by what: the master copy, where a subclass holds one."""
    quantizer = tracked.quantizer
    inner: Quantizer | None = getattr(quantizer, "encodes", None)
    if inner is None:
        return tracked.parameter.detach(), quantizer
    # Of the parameter itself: inside a detached subclass, the copy has a version counter of its own.
    plain: Callable[[Tensor], Tensor] = quantizer.plain  # type: ignore[attr-defined]
    return plain(tracked.parameter).detach(), inner


def _scale_codes(quantizer: Quantizer, scale: Tensor | None, ndim: int) -> Tensor | None:
    """What is stored of scales that are codes themselves: those of blocks and groups, ``(..., K // group, 1)``."""
    if scale is None:
        return None
    if isinstance(quantizer, ElementwiseQuantizer):
        return None if quantizer.group is None else quantizer.scale_codes(scale)
    is_of_groups = scale.ndim == ndim + 1
    return scale.float().view(torch.int32).clone() if is_of_groups else None


def _stamp(parameter: Tensor, weight: Tensor) -> _Stamp | None:
    """Of a parameter and what is encoded of it: the same, or the master copy inside it."""
    if parameter.is_inference():
        # Inference tensors have no version counter.
        return None
    storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    return _Stamp(id(parameter), storage, weight.data_ptr(), (parameter._version, weight._version))


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}= is a whole number of at least {least}, got {value!r}")
