"""Expected values of the fuzz: independently computed codes for every format, and counts by brute force."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from oracles import (
    BLOCK_ELEMENT,
    SPECIAL_CODES,
    block_codes,
    float8_ordinals,
    half_values,
    integer_codes,
    largest_ordinal,
    nearest_array,
    per_tensor_scale,
)
from torch import Tensor

NAN_OF_INTEGERS = -128


@dataclass
class Encoded:
    """A weight at one moment.

    Attributes:
        codes: int64, in the weight's shape.
        scale: Broadcasts to the codes; its meaning is up to the oracle. None for formats without a scale.
        stored: The scales of blocks and groups as stored, one per block.
    """

    codes: np.ndarray
    scale: Any = None
    stored: np.ndarray | None = None
    of_rows: np.ndarray | None = None
    """One scale per row, where ``scale`` repeats it for each weight."""


class Oracle:
    """A format: codes of a weight, codes under the scale of another weight, and the values of codes."""

    has_scale = True
    outermost: tuple[int, int] | None = None
    """Codes of the format's smallest and largest number; None for formats without a range."""
    travels = True

    def encode(self, weight: Tensor) -> Encoded:
        raise NotImplementedError

    def under(self, weight: Tensor, scale: Any) -> np.ndarray:
        raise NotImplementedError

    def values(self, codes: np.ndarray, scale: Any) -> np.ndarray:
        raise NotImplementedError


def _values(ordinals: np.ndarray, split: tuple[int, int]) -> np.ndarray:
    beyond = [np.inf, np.nan, np.nan] if SPECIAL_CODES.get(split, 0) > 1 else [np.nan, np.nan]
    table = np.concatenate([half_values(split), beyond])
    return np.sign(ordinals) * table[np.minimum(np.abs(ordinals), len(table) - 1)]


def _numpy(weight: Tensor) -> np.ndarray:
    return (weight if weight.dtype is torch.float64 else weight.float()).contiguous().numpy()


def _float32(weight: Tensor) -> np.ndarray:
    return weight.float().contiguous().numpy()


class Float8(Oracle):
    """torchao's own cast."""

    def __init__(self, element: str, options: list[str]) -> None:
        self.split = {"e4m3": (4, 3), "e5m2": (5, 2)}[element]
        self.dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[element]
        self.by_row, self.pow2 = "row" in options, "pow2" in options
        self.outermost = -largest_ordinal(self.split), largest_ordinal(self.split)

    def encode(self, weight: Tensor) -> Encoded:
        from torchao.float8.config import ScalingGranularity
        from torchao.float8.float8_utils import tensor_to_scale

        by_row = self.by_row and weight.ndim > 0
        scale = tensor_to_scale(
            weight,
            self.dtype,
            scaling_granularity=ScalingGranularity.AXISWISE if by_row else ScalingGranularity.TENSORWISE,
            axiswise_dim=-1 if by_row else None,
            round_scales_to_power_of_2=self.pow2,
        )
        return Encoded(self.under(weight, scale), scale)

    def under(self, weight: Tensor, scale: Tensor) -> np.ndarray:
        from torchao.float8.float8_utils import to_fp8_saturated

        return float8_ordinals(to_fp8_saturated(weight.float() * scale, self.dtype))

    def values(self, codes: np.ndarray, scale: Tensor) -> np.ndarray:
        return _values(codes, self.split) / scale.double().numpy()


class Float8Blocks(Float8):
    """The formula of torchao's blockwise casts, for a weight padded to whole blocks."""

    def __init__(self, options: list[str]) -> None:
        super().__init__("e4m3", [])
        self.rows, self.pow2 = 128 if "128x128" in options else 1, "pow2" in options

    def encode(self, weight: Tensor) -> Encoded:
        shape = weight.shape
        matrices = weight.reshape(-1, *(1, 1, *shape)[-2:]).float()
        height, width = (-(-size // n) for size, n in zip(matrices.shape[1:], (self.rows, 128), strict=True))
        padded = torch.zeros(len(matrices), height * self.rows, width * 128)
        padded[:, : matrices.shape[1], : matrices.shape[2]] = matrices
        amax = padded.abs().view(-1, height, self.rows, width, 128).amax((2, 4))
        scale = (448.0 / amax.double().clamp(min=1e-12)).float()
        if self.pow2:
            mantissa, exponent = np.frexp(scale.numpy())
            scale = torch.from_numpy(
                np.where(np.isfinite(mantissa) & (mantissa > 0), np.ldexp(0.5, exponent), mantissa)
            )
            scale = scale.float()
        each = scale.repeat_interleave(self.rows, 1).repeat_interleave(128, 2)
        each = each[:, : matrices.shape[1], : matrices.shape[2]].reshape(shape)
        # Ignore the sign of NaN.
        stored = (1 / scale).numpy()
        # E8M0 has no infinity.
        stored = np.where(np.isnan(stored) | (self.pow2 & np.isinf(stored)), -1.0, stored)
        return Encoded(self.under(weight, each), each, stored)


class Exmy(Oracle):
    """The number nearest to the weight divided by amax / largest number, by search in all numbers."""

    def __init__(self, split: tuple[int, int], granularity: str) -> None:
        self.split, self.granularity = split, granularity
        self.has_scale = granularity != "none"
        self.outermost = -largest_ordinal(split), largest_ordinal(split)

    def _dtype(self, weight: Tensor) -> type:
        return np.float64 if weight.dtype is torch.float64 or self.split[0] > 5 else np.float32

    def encode(self, weight: Tensor) -> Encoded:
        if self.granularity == "none":
            return Encoded(self.under(weight, None))
        magnitude, dtype = np.abs(_numpy(weight)), self._dtype(weight)
        by_row = self.granularity == "row" and weight.ndim > 0
        amax = (magnitude.max(-1, keepdims=True) if by_row else magnitude.max()).astype(dtype)
        scale = np.maximum(amax / dtype(half_values(self.split)[-1]), np.finfo(dtype).tiny)
        return Encoded(self.under(weight, scale), scale)

    def under(self, weight: Tensor, scale: np.ndarray | None) -> np.ndarray:
        values = _numpy(weight).astype(self._dtype(weight))
        return nearest_array(values if scale is None else values / scale, self.split)

    def values(self, codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        return _values(codes, self.split) * (1.0 if scale is None else scale.astype(np.float64))


class Blocks(Oracle):
    """torchao's MX and NVFP4."""

    def __init__(self, name: str) -> None:
        self.name = name if ":" in name or name == "nvfp4" else f"{name}:floor"
        family, _, self.mode = self.name.partition(":")
        self.split = BLOCK_ELEMENT[family]
        self.group = 16 if family == "nvfp4" else 32
        self.outermost = -largest_ordinal(self.split), largest_ordinal(self.split)

    def encode(self, weight: Tensor) -> Encoded:
        theirs = weight.contiguous()
        theirs = theirs if theirs.dtype is torch.bfloat16 else theirs.float()
        # torchao's NVFP4 only takes matrices.
        theirs = theirs if theirs.ndim > 1 else theirs.unsqueeze(0)
        codes, scale = block_codes(theirs, self.name)
        stored = scale.contiguous().view(torch.uint8).numpy()
        if self.group == 16:
            # Ignore the sign of NaN.
            stored = np.where(scale.float().isnan().numpy(), 0x7F, stored)
        of_tensor = per_tensor_scale(theirs, self.name)
        each = scale.float().repeat_interleave(self.group, -1).numpy().reshape(weight.shape)
        return Encoded(codes.reshape(weight.shape), (each, None if of_tensor is None else of_tensor.numpy()), stored)

    def under(self, weight: Tensor, scale: Any) -> np.ndarray:
        of_block, of_tensor = scale
        one, smallest = np.float32(1), np.finfo(np.float32).tiny
        if of_tensor is not None:
            factor = one / of_tensor / of_block
        elif self.mode == "rceil":
            factor = one / np.where(of_block < smallest, one, of_block)
        elif self.group == 32:
            factor = one / np.maximum(of_block, smallest)
        else:
            factor = one / of_block
        return nearest_array(_float32(weight) * factor, self.split)

    def values(self, codes: np.ndarray, scale: Any) -> np.ndarray:
        of_block, of_tensor = scale
        # Rounded to float32, as in torchao.
        return _values(codes, self.split) * (of_block if of_tensor is None else of_block * of_tensor)


class Integers(Oracle):
    """torchao's symmetric integers; for weights that it does not take, the formula in numpy."""

    def __init__(self, bits: int, group: int | None) -> None:
        self.bits, self.group = bits, group
        self.outermost = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def encode(self, weight: Tensor) -> Encoded:
        shape = weight.shape
        weight = weight.contiguous().view(1, -1) if weight.ndim < 2 else weight.contiguous()
        group = self.group or weight.shape[-1]
        # If each weight has its own scale, torchao uses one for the whole tensor.
        if group > 1 and weight.dtype is not torch.float64 and weight.isfinite().all():
            scale, codes, _ = integer_codes(weight, self.bits, self.group)
            scale, codes = scale.numpy().reshape(*weight.shape[:-1], -1), codes.numpy().astype(np.int64)
        else:
            amax = weight.view(*weight.shape[:-1], -1, group).abs().amax(-1)
            smallest = max(torch.finfo(weight.dtype).smallest_normal, torch.finfo(torch.float32).smallest_normal)
            scale = (amax / (2 ** (self.bits - 1) - 0.5)).clamp(min=smallest).float().numpy()
            codes = self.under(weight, np.repeat(scale, group, -1))
        each = np.repeat(scale, group, -1).reshape(shape)
        return Encoded(codes.reshape(shape), each, None if self.group is None else scale.view(np.int32), scale)

    def under(self, weight: Tensor, scale: np.ndarray) -> np.ndarray:
        scaled = np.rint(_float32(weight) * (np.float32(1) / scale)).clip(*self.outermost)
        return np.nan_to_num(scaled, nan=NAN_OF_INTEGERS).astype(np.int64)

    def values(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        is_nan = (codes == NAN_OF_INTEGERS) & (self.bits < 8)
        return np.where(np.isfinite(scale) & ~is_nan, codes * scale.astype(np.float64), np.nan)


class Ternary(Oracle):
    """torchao's BitNet."""

    outermost = -1, 1

    def encode(self, weight: Tensor) -> Encoded:
        from torchao.prototype.quantized_training.bitnet import get_bitnet_scale

        scale = get_bitnet_scale(weight)
        return Encoded(self.under(weight, scale), scale)

    def under(self, weight: Tensor, scale: Tensor) -> np.ndarray:
        from torchao.prototype.quantized_training.bitnet import quantize_bitnet_weight

        is_nan = (weight.float() / scale).isnan()
        codes = quantize_bitnet_weight(weight.nan_to_num(0.0).where(is_nan, weight), scale)
        return np.where(is_nan.numpy(), NAN_OF_INTEGERS, codes.numpy()).astype(np.int64)

    def values(self, codes: np.ndarray, scale: Tensor) -> np.ndarray:
        values = codes * scale.double().numpy()
        return np.where((codes == NAN_OF_INTEGERS) | ~np.isfinite(scale.numpy()), np.nan, values)


class Binary(Oracle):
    has_scale = travels = False

    def encode(self, weight: Tensor) -> Encoded:
        values = _numpy(weight)
        return Encoded(np.where(np.isnan(values), NAN_OF_INTEGERS, np.where(values >= 0, 1, -1)).astype(np.int64))


# Integers of the same width, and the bits of infinity.
_STORED: dict[Any, tuple[Any, int]] = {
    "bfloat16": (np.int16, 0x7F80),
    "float16": (np.int16, 0x7C00),
    "float32": (np.int32, 0x7F800000),
    "float64": (np.int64, 0x7FF0 << 48),
}


def _stored(values: np.ndarray) -> np.ndarray:
    """The bits of floating-point numbers as integers with the same equality and order as the numbers."""
    integer, infinity = _STORED[str(values.dtype)]
    bits = np.ascontiguousarray(values).view(integer).astype(np.int64)
    magnitude = bits & np.iinfo(integer).max
    return np.where(magnitude > infinity, infinity + 1, np.where(bits < 0, -magnitude, magnitude))


class Cast(Oracle):
    """``ml_dtypes`` and numpy."""

    has_scale = False

    def __init__(self, name: str) -> None:
        self.dtype = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}[name]
        largest = _STORED[name][1] - 1
        self.outermost = -largest, largest

    def encode(self, weight: Tensor) -> Encoded:
        with np.errstate(over="ignore"):
            return Encoded(_stored(_float32(weight).astype(self.dtype)))

    def values(self, codes: np.ndarray, scale: None) -> np.ndarray:
        bits = np.where(codes < 0, np.abs(codes) | 0x8000, codes).astype(np.uint16)
        return bits.view(self.dtype).astype(np.float64)


class Native(Oracle):
    has_scale = travels = False

    def encode(self, weight: Tensor) -> Encoded:
        if weight.dtype is torch.bfloat16:
            codes = _stored(weight.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        else:
            codes = _stored(weight.contiguous().numpy())
        largest = _STORED[str(weight.dtype).removeprefix("torch.")][1] - 1
        self.outermost = -largest, largest
        return Encoded(codes)


def thirds(weight: Tensor) -> Tensor:
    """A function used as a quantizer."""
    return (weight.float() * 3).round().to(torch.bfloat16)


class Thirds(Oracle):
    has_scale = travels = False

    def encode(self, weight: Tensor) -> Encoded:
        return Encoded(_stored(np.rint(_float32(weight) * np.float32(3)).astype(ml_dtypes.bfloat16)))


def oracle_of(name: str) -> Oracle:
    """The oracle of a quantizer name."""
    family, *options = name.split(":")
    if "128" in name:
        return Float8Blocks(options)
    if family.startswith("float8_"):
        return Float8(family.removeprefix("float8_"), options)
    if family in BLOCK_ELEMENT:
        return Blocks(name)
    if family.startswith("int"):
        return Integers(int(family[3:]), int(options[0][1:]) if options else None)
    simple: dict[str, Callable[[], Oracle]] = {"ternary": Ternary, "binary": Binary, "native": Native, "thirds": Thirds}
    if family in simple:
        return simple[family]()
    if family in ("bfloat16", "float16"):
        return Cast(family)
    exponent, _, mantissa = family[1:].partition("m")
    return Exmy((int(exponent), int(mantissa)), options[0] if options else "tensor")


# ---------------------------------------------------------------------- brute force


@dataclass
class Layer:
    """Everything known about one weight under one format, with all per-weight state kept."""

    weights: int
    total: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    """Totals at the last record."""
    first: np.ndarray | None = None
    """Codes when tracking began."""
    ever: np.ndarray | None = None
    direction: np.ndarray | None = None
    frequency: np.ndarray | None = None
    traveled: np.ndarray | None = None
    quantized_traveled: np.ndarray | None = None
    marked: Encoded | None = None
    """Codes and scales at the last mark; None without one."""
    touched: np.ndarray | None = None
    """Weights that flipped since the last mark."""
    has_window: bool = False
    """Whether a window of ``touched`` has begun with a mark."""
    runs: int | None = None
    """How often ``touched`` had run at the last mark; None without one."""
    slack: float = 0.0
    """How much float32 rounding may change the distance traveled."""

    def add(self, name: str, number: float) -> None:
        self.total[name] = self.total.get(name, 0) + number


@dataclass
class TrackedWeight:
    """A weight that is tracked in a step."""

    name: str
    parameter: Tensor
    oracle: Oracle


COUNTS = ("weight_steps", "flips", "updates", "stalled", "scale_steps", "scale_changes")


class BruteForce:
    """Counts what every step does to every weight, by cloning everything before it and comparing after it.

    Args:
        groups: Metric group to its interval in tracked steps.
        counts_stalls: Whether updates and stalls are counted.
        schedule: ``track_every``, ``start_step`` and ``end_step``.
        ema: Momentum and threshold of the oscillation frequency.
        sync_every: Steps between two marks; None for marks on request.
    """

    def __init__(
        self,
        groups: Mapping[str, int],
        counts_stalls: bool,
        schedule: tuple[int, int, int | None],
        ema: tuple[float, float] | None,
        sync_every: int | None = None,
    ) -> None:
        self.groups, self.counts_stalls, self.ema = groups, counts_stalls, ema
        self.every, self.start, self.end = schedule
        self.layers: dict[str, Layer] = {}
        self.calls = self.skipped = 0
        self.current: list[TrackedWeight] = []
        self.signature: list[tuple[object, ...]] = []
        self.has_new_counts = False
        self.gauged: dict[str, int] = {}
        self.are_held = False
        """Whether tracking still holds the weights of the last tracked step, even if the optimizer's have changed."""
        self._is_in_step = False
        self.sync_every, self.has_begun = sync_every, False
        self.is_in_step = self.is_mark_pending = False
        """Of hooks after a step that raised: the next mark is made after the next step."""
        self.runs = 0

    @property
    def is_tracking(self) -> bool:
        is_within = self.calls >= self.start and (self.end is None or self.calls < self.end)
        return is_within and (self.calls - self.start) % self.every == 0

    def is_due(self, group: str) -> bool:
        return group in self.groups and (self.calls - self.start) // self.every % self.groups[group] == 0

    def before(self, weights: list[TrackedWeight], signature: list[tuple[object, ...]]) -> None:
        self._is_in_step = self.is_tracking
        self.are_held = self.are_held and not self._is_in_step
        if not self._is_in_step:
            return
        self.current, self.signature = weights, signature
        if self.sync_every is not None and self.calls == self.start and not self.has_begun:
            for layer in self.layers.values():
                layer.marked, layer.has_window = None, False
            self._mark(weights)
        self.old = []
        for seen in weights:
            weight = seen.parameter.detach()
            encoded = seen.oracle.encode(weight)
            layer = self.layers.setdefault(seen.name, Layer(weight.numel()))
            if layer.first is None:
                layer.first = encoded.codes
                layer.ever = np.zeros(encoded.codes.shape, bool)
                layer.direction = np.zeros(encoded.codes.shape, np.int64)
                layer.frequency = np.zeros(encoded.codes.shape)
                layer.traveled = np.zeros(encoded.codes.shape)
                layer.quantized_traveled = np.zeros(encoded.codes.shape)
            self.old.append((weight.double().numpy().copy(), encoded))

    def after(self, is_step: bool, weights: list[TrackedWeight]) -> None:
        if self._is_in_step:
            self.has_new_counts = True
            if is_step:
                for seen, (weight, encoded) in zip(self.current, self.old, strict=True):
                    self._count(seen, self.layers[seen.name], weight, encoded)
            self.runs += is_step and self.is_due("touched")
        self.are_held = self.is_in_step = False
        self.calls += 1
        self.skipped += not is_step
        is_due = self.sync_every is not None and (self.calls - self.start) % self.sync_every == 0
        if self.is_mark_pending or is_due:
            self._mark(weights)
        self.is_mark_pending = False

    def mark(self, weights: list[TrackedWeight]) -> None:
        """Follow a call of ``mark_sync``, with the weights that are tracked now."""
        self.is_mark_pending = self.is_in_step
        if not self.is_in_step:
            self._mark(weights)

    def _mark(self, weights: list[TrackedWeight]) -> None:
        if self.calls < self.start or (self.end is not None and self.calls > self.end):
            return
        self.has_begun = True
        marked = {seen.name for seen in weights}
        for name, layer in self.layers.items():
            if name not in marked:
                layer.marked, layer.touched, layer.has_window, layer.runs = None, None, False, None
        for seen in weights:
            self.has_new_counts = True
            weight = seen.parameter.detach()
            layer = self.layers.setdefault(seen.name, Layer(weight.numel()))
            if "sync" in self.groups:
                self._compare(layer, seen.oracle.encode(weight))
            if "touched" in self.groups and not (layer.has_window and layer.runs == self.runs):
                if layer.has_window:
                    touched = 0 if layer.touched is None else int(layer.touched.sum())
                    layer.add("touched", touched)
                    layer.add("touched_weights", layer.weights)
                    layer.add("untouched", touched == 0)
                    layer.add("touched_windows", 1)
                layer.touched, layer.has_window, layer.runs = None, True, self.runs

    @staticmethod
    def _compare(layer: Layer, new: Encoded) -> None:
        old = layer.marked
        layer.marked = new
        if old is None:
            return
        changed = int((old.codes != new.codes).sum())
        layer.add("changed", changed)
        layer.add("changed_weights", layer.weights)
        layer.add("empty", changed == 0)
        layer.add("windows", 1)
        scales = [next((s for s in (of.stored, of.of_rows, of.scale) if s is not None), None) for of in (old, new)]
        if scales[0] is not None:
            before, after = (np.asarray(scale, dtype=np.float64) for scale in scales)
            layer.add("scales_changed", int(((before != after) & ~(np.isnan(before) & np.isnan(after))).sum()))
            layer.add("scales", after.size)

    def _count(self, seen: TrackedWeight, layer: Layer, old_weight: np.ndarray, old: Encoded) -> None:
        weight = seen.parameter.detach()
        new = seen.oracle.encode(weight)
        flipped = new.codes != old.codes
        layer.add("weight_steps", layer.weights)
        layer.add("flips", int(flipped.sum()))
        if self.counts_stalls and seen.parameter.grad is not None:
            updated = (seen.parameter.grad.detach().to_dense() != 0).numpy()
            layer.add("updates", int(updated.sum()))
            layer.add("stalled", int((updated & ~flipped).sum()))
        if old.stored is not None and new.stored is not None:
            layer.add("scale_steps", new.stored.size)
            layer.add("scale_changes", int((old.stored != new.stored).sum()))
        if self.is_due("oscillation"):
            direction = np.sign(new.codes - old.codes)
            oscillates = (direction * layer.direction) < 0
            layer.add("oscillations", int(oscillates.sum()))
            layer.add("flips_seen_by_oscillation", int(flipped.sum()))
            layer.direction = np.where(direction != 0, direction, layer.direction)
            if self.ema:
                layer.frequency = self.ema[0] * oscillates + (1 - self.ema[0]) * layer.frequency
        if self.is_due("touched"):
            layer.touched = flipped if layer.touched is None else layer.touched | flipped
        if self.is_due("coverage"):
            layer.ever |= flipped
        if self.is_due("scale") and seen.oracle.has_scale:
            under = seen.oracle.under(weight, old.scale)
            layer.add("weight_driven", int((flipped & (under != old.codes)).sum()))
            layer.add("flips_seen_by_scale", int(flipped.sum()))
        if self.is_due("travel") and seen.oracle.travels:
            self._travel(seen.oracle, layer, old_weight, weight.double().numpy(), old, new)

    def _travel(
        self, oracle: Oracle, layer: Layer, old_weight: np.ndarray, weight: np.ndarray, old: Encoded, new: Encoded
    ) -> None:
        moved = np.abs(weight - old_weight)
        before, after = oracle.values(old.codes, old.scale), oracle.values(new.codes, new.scale)
        quantized = np.abs(after - before)
        is_finite = np.isfinite(moved) & np.isfinite(quantized)
        layer.add("moved", np.where(is_finite, moved, 0.0).sum())
        layer.add("quantized_moved", np.where(is_finite, quantized, 0.0).sum())
        layer.add("flips_seen_by_travel", int((is_finite & (new.codes != old.codes)).sum()))
        smallest, largest = oracle.outermost
        codes = old.codes.clip(smallest, largest)
        here = oracle.values(codes, old.scale)
        below = here - oracle.values((codes - 1).clip(smallest), old.scale)
        above = oracle.values((codes + 1).clip(None, largest), old.scale) - here
        cell = np.where(codes == smallest, above, np.where(codes == largest, below, (below + above) / 2))
        share = np.where(is_finite, moved, 0.0) / cell
        layer.add("expected_flips", np.nan_to_num(share.clip(max=1), nan=0.0).sum())
        layer.traveled += np.where(is_finite, moved, 0.0)
        layer.quantized_traveled += np.where(is_finite, quantized, 0.0)
        layer.slack += 1e-6 * float(np.where(is_finite, np.abs(before) + np.abs(after), 0.0).sum())

    # ------------------------------------------------------------------ comparison with the library

    def totals(self, name: str) -> dict[str, int]:
        return {of: int(layer.total.get(name, 0)) for of, layer in self.layers.items()}

    def check_totals(self, tracker: Any) -> None:
        assert_equal("steps", tracker.step_count, self.calls - self.skipped)
        for what, found, expected in (
            ("flips", tracker.get_flip_counts(), "flips"),
            ("updates", tracker.get_update_counts(), "updates"),
            ("stalled", tracker.get_stall_counts(), "stalled"),
        ):
            assert_equal(what, found, self.totals(expected))

    def restart(self) -> None:
        """Follow a tracker that has loaded a state dict: skipped steps are forgotten, and all gauges are due again."""
        self.calls, self.skipped = self.calls - self.skipped, 0
        self.gauged, self.has_new_counts, self.current, self.are_held = {}, False, [], False
        self.is_in_step = self.is_mark_pending = self.has_begun = False

    def check_record(self, record: Any, signature: list[tuple[object, ...]], *, is_last: bool = False) -> None:
        """Compare a record, and start the next window unless the record is the last one of a replaced tracker."""
        windows = {
            name: {of: number - layer.last.get(of, 0) for of, number in layer.total.items()}
            for name, layer in self.layers.items()
        }
        are_there = self.are_held or signature == self.signature
        due = self._gauges_due(is_last)
        news = ("weight_steps", "windows", "touched_windows")
        is_expected = any(window.get(of) for window in windows.values() for of in news)
        if record is None:
            assert_equal("a record", None, "one" if is_expected else None)
        else:
            assert_equal("a record", "one", "one" if is_expected else None)
            assert_equal("step of the record", record.step, self.calls - self.skipped)
            assert_equal("layers", sorted(layer.name for layer in record.layers), sorted(self.layers))
            for found in record.layers:
                layer = self.layers[found.name]
                assert_equal(f"{found.name}: weights", found.weights, layer.weights)
                for which, of in (("window", windows[found.name]), ("total", layer.total)):
                    self._check_counts(f"{found.name}: {which}", getattr(found, which), of, layer.slack)
            for of in COUNTS[:4]:
                expected = sum(int(layer.total.get(of, 0)) for layer in self.layers.values())
                assert_equal(f"model: {of}", getattr(record.model.total, of), expected)
            if are_there:
                by_name = {found.name: found for found in record.layers}
                for seen in self.current:
                    self._check_gauges(seen, by_name[seen.name], self.layers[seen.name], due)
        for seen in self.current if are_there and "travel" in due and not is_last else []:
            layer = self.layers[seen.name]
            layer.traveled = np.zeros_like(layer.traveled)
            layer.quantized_traveled = np.zeros_like(layer.traveled)
        if not is_last:
            for layer in self.layers.values():
                layer.last = dict(layer.total)

    def _gauges_due(self, is_last: bool) -> set[str]:
        if not (self.has_new_counts and self.current):
            self.has_new_counts = self.has_new_counts and is_last
            return set()
        due = {group for group, every in self.groups.items() if self.calls - self.gauged.get(group, -every) >= every}
        if not is_last:
            self.has_new_counts = False
            self.gauged.update(dict.fromkeys(due, self.calls))
        return due

    def _check_counts(self, where: str, found: Any, expected: Mapping[str, float], slack: float) -> None:
        for of in COUNTS:
            assert_equal(f"{where}: {of}", getattr(found, of), int(expected.get(of, 0)))
        pairs = {
            "oscillation_ratio": ("oscillations", "flips_seen_by_oscillation", 0.0, 0.0),
            "weight_driven_fraction": ("weight_driven", "flips_seen_by_scale", 0.0, 0.0),
            "travel_ratio": ("quantized_moved", "moved", slack, 1e-9 * expected.get("moved", 0)),
            "changed_fraction": ("changed", "changed_weights", 0.0, 0.0),
            "empty_layers": ("empty", "windows", 0.0, 0.0),
            "scale_changed_fraction": ("scales_changed", "scales", 0.0, 0.0),
            "touched_fraction": ("touched", "touched_weights", 0.0, 0.0),
            "untouched_layers": ("untouched", "touched_windows", 0.0, 0.0),
            "flip_excess": ("flips_seen_by_travel", "expected_flips", 0.0, 1e-4 * expected.get("expected_flips", 0)),
        }
        for ratio, quotient in found.ratios.items():
            if ratio == "delta_index_ratio":
                continue
            numerator, denominator, *tolerances = pairs[ratio]
            for part, of, tolerance in zip(quotient, (numerator, denominator), tolerances, strict=True):
                assert_close(f"{where}: {ratio}, {of}", part, expected.get(of, 0), tolerance)

    def _check_gauges(self, seen: TrackedWeight, found: Any, layer: Layer, due: set[str]) -> None:
        weight = seen.parameter.detach()
        codes, values = seen.oracle.encode(weight).codes, weight.double().numpy()
        size = layer.weights
        assert_equal(f"{seen.name}: nonfinite", found.nonfinite, int((~np.isfinite(values)).sum()))
        expected: dict[str, tuple[float, float]] = {}
        if "coverage" in due:
            expected["ever_flipped"] = int(layer.ever.sum()), size
            expected["net_flipped"] = int((codes != layer.first).sum()), size
        if "range" in due and seen.oracle.outermost is not None and not isinstance(seen.oracle, Binary):
            is_something = values != 0
            smallest, largest = seen.oracle.outermost
            expected["zero_fraction"] = int((codes == 0).sum()), size
            expected["saturated_fraction"] = int(((codes == smallest) | (codes == largest)).sum()), size
            expected["underflow_fraction"] = int(((codes == 0) & is_something).sum()), int(is_something.sum())
        for name, pair in expected.items():
            if pair[1]:
                assert_equal(f"{seen.name}: {name}", tuple(found.gauges.get(name, ())), pair)
        if "oscillation" in due and self.ema:
            threshold = self.ema[1]
            bounds = [int((layer.frequency > threshold + way).sum()) for way in (1e-5, -1e-5)]
            count = found.gauges["oscillating_fraction"].numerator
            assert_between(f"{seen.name}: oscillating weights", count, *bounds)
        if "travel" in due and seen.oracle.travels:
            moved = layer.traveled > 0
            gauge = found.gauges.get("travel_high_fraction", (0, 0))
            assert_equal(f"{seen.name}: weights that moved", gauge[1], int(moved.sum()))
            slack = 1e-4 * np.abs(values).max() if np.isfinite(values).all() else np.inf
            high = [
                int((moved & (layer.quantized_traveled + way > 16 * layer.traveled)).sum()) for way in (-slack, slack)
            ]
            assert_between(f"{seen.name}: weights that travel far", gauge[0], *high)
            bins = sum(sum(h.counts) for name, h in found.histograms.items() if name == "log2_travel_ratio")
            assert_equal(f"{seen.name}: log2_travel_ratio", bins, int(moved.sum()))
        if "rank" in due and weight.ndim >= 2:
            matrix = _float32(weight).astype(np.float64).reshape(weight.shape[0], -1)
            if np.isfinite(matrix).all() and matrix.any():
                singular = np.linalg.svd(matrix, compute_uv=False)
                shares = singular / singular.sum()
                shares = shares[shares > 0]
                assert_close(
                    f"{seen.name}: stable_rank",
                    found.gauges["stable_rank"][0],
                    (singular**2).sum() / singular[0] ** 2,
                    1e-3,
                )
                effective = np.exp(-(shares * np.log(shares)).sum())
                assert_close(f"{seen.name}: effective_rank", found.gauges["effective_rank"][0], effective, 2e-3)


class Difference(AssertionError):
    """What was found differs from what was expected."""


def assert_equal(what: str, found: Any, expected: Any) -> None:
    if isinstance(found, dict) and isinstance(expected, dict) and found != expected:
        names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
        found, expected = ({name: of.get(name) for name in names} for of in (found, expected))
    if found != expected:
        raise Difference(f"{what}: found {found}, expected {expected}")


def assert_close(what: str, found: float, expected: float, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance:
        raise Difference(f"{what}: found {found}, expected {expected} within {tolerance:.3g}")


def assert_between(what: str, found: float, low: float, high: float) -> None:
    if not low <= found <= high:
        raise Difference(f"{what}: found {found}, expected {low} to {high}")
