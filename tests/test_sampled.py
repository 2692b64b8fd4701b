"""Travel on the CPU, where a kernel compares the samples of many layers in one call: against brute force."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import INF, NAN
from test_observed import is_same
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer, WeightFlipTracker
from weightflip.counting import batch, sample_proof
from weightflip.counting.layer import TrackedWeight
from weightflip.kernels import cpu
from weightflip.metrics.travel import Travel
from weightflip.quantizers import resolve

QUANTIZERS = (
    "float8_e4m3", "float8_e4m3:row", "float8_e4m3:128x128", "float8_e5m2:pow2", "e3m4:none", "e2m9", "int8",
    "int4:g32", "mxfp8_e4m3", "mxfp4", "nvfp4", "bfloat16", "float16", "ternary", "e6m3",
)  # fmt: skip
# Formats that the kernel that counts does not take.
ALONE = ("float8_e4m3:128x128", "ternary", "e6m3")


def parameters(dtype: torch.dtype, group: int | None) -> dict[str, nn.Parameter]:
    """Weights of all kinds of shapes: whole, odd, tiny, empty, sampled, not contiguous, and with NaN and infinities."""
    generator = torch.Generator().manual_seed(0)
    columns = group or 37
    shapes = {"odd": (13, columns), "row": (1, columns), "two": (3, 2 * columns), "large": (17000 // columns, columns)}
    shapes |= {"empty": (0, columns), "infinite": (9, columns), "later": (16, columns), "strided": (columns, columns)}
    if group is None:
        shapes |= {"one": (1, 1), "whole chunks": (8, 256)}
    found = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    found["infinite"][0, 3], found["infinite"][4, 1], found["infinite"][5, 2] = NAN, INF, -INF
    found["strided"] = found["strided"].t()
    return {name: nn.Parameter(weight.to(dtype)) for name, weight in found.items()}


def of(weight: Tensor, quantizer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights, codes, values, and cell widths, all float64 but the codes."""
    codes = quantizer.encode(weight)
    ordinals, scale = quantizer.grouped(codes.ordinals), codes.scale
    smallest, largest = quantizer.ordinal_range(weight)

    def values(of_codes: Tensor) -> np.ndarray:
        return quantizer.values(of_codes.to(ordinals.dtype), scale).double().numpy().ravel()

    inside = ordinals.long().clamp(smallest, largest)
    here = values(inside)
    with np.errstate(invalid="ignore"):
        below = here - values((inside - 1).clamp(min=smallest))
        above = values((inside + 1).clamp(max=largest)) - here
    flat = inside.numpy().ravel()
    cells = np.where(flat == smallest, above, np.where(flat == largest, below, (below + above) / 2))
    return weight.double().numpy().ravel(), ordinals.numpy().ravel(), values(ordinals), cells


class Expected:
    """What travel should have counted of one layer."""

    def __init__(self, numel: int) -> None:
        self.sums = np.zeros(4)
        self.moved, self.quantized = np.zeros(numel), np.zeros(numel)

    def add(self, old, new, at: np.ndarray, share: float) -> None:
        (weights, codes, values, cells), (new_weights, new_codes, new_values, _) = old, new
        with np.errstate(invalid="ignore", divide="ignore"):
            moved, quantized = np.abs(new_weights - weights)[at], np.abs(new_values - values)[at]
            is_finite = np.isfinite(moved) & np.isfinite(quantized)
            moved, quantized = np.where(is_finite, moved, 0.0), np.where(is_finite, quantized, 0.0)
            shares = np.nan_to_num(np.minimum(moved / cells[at], 1), nan=0.0)
        flips = (codes != new_codes)[at] & is_finite
        self.sums += [share * math.fsum(found) for found in (quantized, moved, flips, shares)]
        self.moved += moved
        self.quantized += quantized


def steps_of(dtype: torch.dtype, name: str, steps: int, *, every: int = 1, reload_at: int | None = None, **options):
    """Train, compare with brute force, and return the numbers and the layers that a kernel compares."""
    quantizer = resolve(name)
    weights = parameters(dtype, quantizer.group if quantizer.tile is None else 128)
    generator = torch.Generator().manual_seed(1)
    options = {"metrics": {"flips": 1, "stalls": 1, "travel": every}, **options}
    tracker, expected, together = WeightFlipTracker(**options), {}, set()
    tracked = {name: TrackedWeight(name, weight, quantizer) for name, weight in weights.items()}
    for step in range(steps):
        if step == reload_at:
            state = tracker.state_dict()
            tracker = WeightFlipTracker(**options)
            tracker.load_state_dict(state)
        current = [weight for name, weight in tracked.items() if name != "later" or step not in (0, 1, 4)]
        if step in (3, 6):
            # Written outside of the step.
            with torch.no_grad():
                weights["odd"].add_(0.01)
        is_due = tracker.is_tracking and (step // options.get("track_every", 1)) % every == 0
        tracker.before_step(current)
        old = {weight.name: of(weight.parameter.detach(), quantizer) for weight in current if weight.parameter.numel()}
        for weight in current:
            factor = 1 + torch.randn(weight.parameter.shape, generator=generator) / 10
            # Some move, some do not; at step 5, none does.
            factor = factor.where((factor > 0.97) & (torch.tensor(step) != 5), 1.0)
            weight.parameter.data.mul_(factor.to(dtype))
            weight.parameter.grad = torch.ones_like(weight.parameter)
        if step == 2:
            weights["two"].grad = weights["two"].grad.to_sparse()
        tracker.after_step()
        for weight in current if is_due else ():
            if weight.parameter.numel():
                sample = tracker.layers[weight.name].metrics["travel"].sample
                at = np.arange(weight.parameter.numel()) if sample.at is None else sample.at.numpy()
                new = of(weight.parameter.detach(), quantizer)
                expected.setdefault(weight.name, Expected(len(at))).add(old[weight.name], new, at, sample.share)
        together |= {layer.name for layer in followed(tracker)}
    compare(tracker, expected)
    return tracker, together


def followed(tracker):
    return [layer for samples in tracker._runner._samples.values() for layer in samples.layers]


def compare(tracker, expected: dict[str, Expected]) -> None:
    for name, of_layer in expected.items():
        found = tracker.layers[name].metric_tensors()["travel"]
        assert np.array_equal(found["traveled"].numpy(), of_layer.moved), name
        assert np.array_equal(found["quantized_traveled"].numpy(), of_layer.quantized), name
    record = {layer.name: layer for layer in tracker.record(may_be_empty=True).layers}
    for name, of_layer in expected.items():
        ratios = record[name].total.ratios
        pairs = [*ratios["travel_ratio"], *ratios["flip_excess"]]
        assert pairs == pytest.approx(list(of_layer.sums), rel=1e-12, abs=0), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_format_equals_brute_force(dtype):
    for name in QUANTIZERS:
        _, together = steps_of(dtype, name, 8)
        assert bool(together) == (name not in ALONE), name
        if together:
            assert together >= {"odd", "row", "large", "infinite", "later"}, name
            assert not together & {"empty", "strided"}, name


@pytest.mark.parametrize(
    "options",
    [
        {"every": 3},
        {"track_every": 2},
        {"reload_at": 4},
        {"reload_at": 4, "every": 2},
        {"fresh_snapshots": True},
        {"low_memory": True},
        {"metrics": ("flips", "oscillation", "travel", "scale")},
        {"backend": "eager"},
    ],
    ids=str,
)
def test_options_keep_their_meaning(options):
    for name in ("float8_e4m3", "mxfp4"):
        steps_of(torch.float32, name, 9, **options)


def test_weights_that_are_counted_in_pieces(monkeypatch):
    """Their scales are kept in several places."""
    monkeypatch.setattr(batch, "_ELEMENTS_PER_RUN", 1 << 12)
    for name in ("float8_e4m3:row", "mxfp4", "nvfp4", "bfloat16"):
        steps_of(torch.float32, name, 6)


def test_any_number_of_threads_gives_the_same_sums():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tracker, _ = steps_of(torch.float32, "float8_e4m3:row", 6)
            found.append(tracker.state_dict())
    finally:
        torch.set_num_threads(before)
    assert found[0]["ratios"]
    assert is_same(found[0], found[1])
    assert is_same(found[0], found[2])


def trained(backend: str, step: Callable[[torch.optim.Optimizer, int], None]) -> tuple[Any, list[str]]:
    """Numbers and warnings of a training whose steps are those of a function."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 64), nn.Linear(64, 8))
    for weight in model.parameters():
        weight.data.normal_(generator=generator)

    class Stepped(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            step(self, number)

    metrics = ("flips", "travel")
    optimizer = Stepped(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = FlipTrackingOptimizer(
            optimizer, model, quantizer="float8_e4m3", metrics=metrics, sinks=[], backend=backend
        )
        for number in range(6):
            if convert := CONVERSIONS.get((step, number)):
                model.to(convert)
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            optimizer.step()
        state = optimizer.tracker.state_dict()
    return state, [str(warning.message) for warning in caught]


def replacing(optimizer: torch.optim.Optimizer, number: int) -> None:
    """In each step, one of the weights gets other memory."""
    for weight in optimizer.param_groups[0]["params"]:
        if weight.shape == (16, 32):
            weight.data = weight.data - 0.01 * weight.grad
        else:
            weight.data.sub_(0.01 * weight.grad)


def to_bfloat16(optimizer: torch.optim.Optimizer, number: int) -> None:
    for weight in optimizer.param_groups[0]["params"]:
        weight.sub_(0.01 * weight.grad)


def to_float32(optimizer: torch.optim.Optimizer, number: int) -> None:
    to_bfloat16(optimizer, number)


CONVERSIONS = {
    (to_bfloat16, 3): torch.bfloat16,
    (to_float32, 0): torch.bfloat16,
    (to_float32, 3): torch.float32,
}


@pytest.mark.parametrize("step", [replacing, to_bfloat16, to_float32], ids=lambda step: step.__name__)
def test_weights_that_are_replaced_or_converted(step):
    """Their codes have the same shape and dtype as before, so that groups are not opened again."""
    (found, texts), (expected, expected_texts) = trained("auto", step), trained("eager", step)
    assert found["ratios"]
    assert is_same(found, expected)
    assert texts == expected_texts == []


# ------------------------------------------------------------------ when samples are taken


class Watched(cpu.Samples):
    """Counts calls."""

    taken = moved = 0

    def take(self):
        type(self).taken += 1
        super().take()

    def move(self, *arguments):
        type(self).moved += 1
        super().move(*arguments)


def layers(number: int = 3) -> list[TrackedWeight]:
    generator = torch.Generator().manual_seed(3)
    weights = [nn.Parameter(torch.randn(8, 32, generator=generator)) for _ in range(number)]
    return [TrackedWeight(f"w{i}", weight, resolve("float8_e4m3")) for i, weight in enumerate(weights)]


def step(tracker: WeightFlipTracker, tracked: list[TrackedWeight]) -> None:
    tracker.before_step(tracked)
    for weight in tracked:
        weight.parameter.data.mul_(1.01)
    tracker.after_step()


def test_the_sample_after_a_step_is_that_before_the_next_one(monkeypatch):
    step(WeightFlipTracker(metrics=("flips", "travel")), layers())
    monkeypatch.setattr(cpu.Run, "samples", Watched)
    tracker, tracked = WeightFlipTracker(metrics=("flips", "travel")), layers()
    step(tracker, tracked)
    Watched.taken = Watched.moved = 0
    for _ in range(5):
        step(tracker, tracked)
    assert (Watched.taken, Watched.moved) == (0, 5)
    with torch.no_grad():
        tracked[1].parameter.add_(1)
    step(tracker, tracked)
    assert (Watched.taken, Watched.moved) == (1, 6)


# ------------------------------------------------------------------ faults


class Fault:
    """Raises in one call of a function in the third step."""

    def __init__(self, at: int) -> None:
        self._at, self.is_armed, self.calls = at, False, 0

    def into(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += self.is_armed
            if self.is_armed and self.calls == self._at:
                raise RuntimeError("no sums today")
            return function(*arguments)

        return call


# Several calls of the kernel: weights and codes of other dtypes, and scales in several places.
KINDS = (
    ("float8_e4m3", torch.float32),
    ("float8_e4m3:row", torch.bfloat16),
    ("mxfp4", torch.float32),
    ("e2m9", torch.float32),
    ("int8", torch.bfloat16),
    ("bfloat16", torch.float32),
)


def with_fault(backend: str, fault: Fault, kinds: Sequence[tuple[Any, torch.dtype]] = 2 * KINDS):
    """Numbers and warnings of a training, and whether a kernel compared samples at its end."""
    generator = torch.Generator().manual_seed(3)
    tracked = [
        TrackedWeight(f"w{at}", nn.Parameter(torch.randn(80, 64, generator=generator).to(dtype)), resolve(quantizer))
        for at, (quantizer, dtype) in enumerate(kinds)
    ]
    tracker = WeightFlipTracker(metrics=("flips", "travel"), backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(5):
            fault.is_armed = number == 2
            if number == 2:
                # Written outside of the step, so that samples are taken in it.
                with torch.no_grad():
                    tracked[0].parameter.add_(0.01)
            tracker.before_step(tracked)
            for weight in tracked:
                change = 1 + torch.randn(80, 64, generator=generator) / 9
                weight.parameter.data.mul_(change.to(weight.parameter.dtype))
            # Its memory is replaced in each step, so that it is not counted with the others.
            tracked[1].parameter.data = tracked[1].parameter.data.clone()
            tracker.after_step()
    return tracker.state_dict(), [str(warning.message) for warning in caught], bool(followed(tracker))


@pytest.mark.parametrize(
    ("where", "name"), [(cpu.Samples, "take"), (cpu.Samples, "move"), (sample_proof, "value_scale")]
)
def test_after_a_fault_samples_are_compared_one_by_one(where, name, monkeypatch):
    """None of them counts a step twice, or leaves one out."""
    monkeypatch.setattr(batch, "_ELEMENTS_PER_RUN", 1 << 12)
    expected, texts, _ = with_fault("eager", Fault(0))
    assert (len(expected["ratios"]), texts) == (4 * len(KINDS), [])
    function, faults = getattr(where, name), 0
    for at in itertools.count(1):
        fault = Fault(at)
        monkeypatch.setattr(where, name, fault.into(function))
        found, texts, is_together = with_fault("auto", fault)
        assert is_same(found, expected), at
        if fault.calls < at:
            assert (texts, is_together) == ([], True)
            break
        faults += 1
        assert not is_together
        (text,) = texts
        assert "the samples of 'travel' are compared one layer at a time from now on" in text
        assert "RuntimeError: no sums today" in text
    assert faults > 2


def test_only_a_layer_that_fails_on_its_own_loses_the_group(monkeypatch):
    fault = Fault(0)

    class Breaks(type(resolve("e3m4"))):
        only_needs_amax = True

        def values(self, ordinals, scale):
            if fault.is_armed:
                raise RuntimeError("no values today")
            return super().values(ordinals, scale)

        def value_rule(self):
            return super().value_rule()

        def value_scale(self, scale):
            if fault.is_armed:
                raise RuntimeError("no values today")
            return super().value_scale(scale)

    kinds = [*KINDS, (Breaks(resolve("e3m4").format, "tensor"), torch.float32)]
    expected, _, _ = with_fault("eager", Fault(0), kinds)
    found, texts, _ = with_fault("auto", fault, kinds)
    assert len(texts) == 2
    assert "'travel' are compared one layer at a time from now on" in texts[0]
    assert (
        "'w6' no longer has numbers of 'travel', everything else continues: RuntimeError: no values today" in texts[1]
    )
    for state in (found, expected):
        state["ratios"] = [row for row in state["ratios"] if row[0] != "w6"]
        state["weights"].pop("w6", None)
    assert found["ratios"]
    assert is_same(found, expected)


class Wrong(cpu.Samples):
    def move(self, indices, old_scales, new_scales, sums):
        super().move(indices, new_scales, new_scales, sums)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(cpu.Run, "samples", Wrong)
    with caplog.at_level(logging.WARNING, "weightflip"):
        _, together = steps_of(torch.float32, "float8_e4m3:row", 5)
    assert not together
    assert "samples of float8_e4m3:row (torch.float32) for 'travel': the kernel is not used" in caplog.text


def test_a_quantizer_with_other_values_does_not_inherit_the_rule():
    class Other(type(resolve("e3m4"))):
        def values(self, ordinals, scale):
            return super().values(ordinals, scale) + 1

    assert resolve("e3m4").value_rule() == "multiplies"
    assert Other(resolve("e3m4").format).value_rule() is None


class Forgets(cpu.Samples):
    """Does not keep the sample for the next step."""

    def move(self, indices, old_scales, new_scales, sums):
        samples = [weight.sample for weight in self._weights]
        kept = [sample.weights.clone() for sample in samples]
        super().move(indices, old_scales, new_scales, sums)
        for sample, weights in zip(samples, kept, strict=True):
            sample.weights.copy_(weights)


def test_the_proof_finds_faults():
    for name in ("float8_e4m3", "int4:g32", "bfloat16"):
        quantizer = resolve(name)
        codes = torch.int16 if name == "bfloat16" else torch.int8
        kind = sample_proof.Kind(quantizer, torch.float32, codes)
        for rows in (3, 70):
            assert sample_proof.find_fault(cpu.Samples, Travel(), kind, rows, is_finite=False) is None
            assert sample_proof.find_fault(Forgets, Travel(), kind, rows, is_finite=True) is not None
            if name != "bfloat16":
                assert sample_proof.find_fault(Wrong, Travel(), kind, rows, is_finite=True) is not None
