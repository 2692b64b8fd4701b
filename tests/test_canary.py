"""Writes through ``.data`` are detected by sampling, and reported once."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import FORMS, BruteForce, backward, digits_model
from torch import nn

from weightflip.counting.canary import Canary
from weightflip.counting.layer import TrackedWeight
from weightflip.quantizers import resolve


def run(form, digits, steps, writes, **options):
    """Train, writing through ``.data`` before some steps; returns the warnings, brute-force counts and the tracker."""
    model = digits_model()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer, tracker = form(inner, model)
    for name, value in options.items():
        setattr(tracker, name, value)
    brute = BruteForce(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            if step in writes:
                for parameter in model.parameters():
                    parameter.data.lerp_(torch.ones_like(parameter), 0.01)
            backward(model, digits, step)
            brute.before()
            optimizer.step()
            brute.after()
    return [str(warning.message) for warning in caught], brute, tracker


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_writes_in_the_first_steps_are_detected_and_counts_are_right(form, digits):
    messages, brute, tracker = run(form, digits, 16, range(1, 16))
    assert len(messages) == 1
    assert "'2.weight' was written between two steps" in messages[0]
    assert "fresh_snapshots=True" in messages[0]
    brute.check(tracker)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("every", [10, 64, 100])
def test_a_moving_average_that_is_rarely_written_back_is_detected(form, every, digits):
    messages, brute, tracker = run(form, digits, every + 1, [every])
    assert len(messages) == 1
    brute.check(tracker)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_undetected_writes_count_as_flips_as_documented(form, digits):
    messages, brute, tracker = run(form, digits, 26, [25])
    assert messages == []
    assert sum(tracker.get_flip_counts().values()) != sum(brute.flips.values())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("options", [{"fresh_snapshots": True}, {"low_memory": True}], ids=str)
def test_with_fresh_snapshots_there_is_no_warning(form, options, digits):
    messages, brute, tracker = run(form, digits, 12, range(1, 12), **options)
    assert messages == []
    brute.check(tracker)


def test_writes_that_change_versions_are_not_reported(digits):
    model = digits_model()
    optimizer, tracker = FORMS["wrapper"](torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    brute = BruteForce(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(16):
            backward(model, digits, step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.99)
            brute.before()
            optimizer.step()
            brute.after()
    brute.check(tracker)


def test_samples_are_frequent_at_first_then_every_thousand_steps():
    due = [steps for steps in range(5001) if Canary.is_due(steps)]
    assert [
        *range(17),
        20,
        32,
        50,
        64,
        100,
        128,
        200,
        256,
        500,
        512,
        1000,
        1024,
        2000,
        2048,
        3000,
        4000,
        4096,
        5000,
    ] == due


def weights(*shapes: tuple[int, ...]) -> list[TrackedWeight]:
    return [TrackedWeight(f"w{i}", nn.Parameter(torch.ones(shape)), resolve("e3m4")) for i, shape in enumerate(shapes)]


def test_each_sample_is_from_the_next_weight():
    tracked = weights((4, 4), (3, 3), (2, 2))
    canary, found = Canary(), []
    for steps in range(1, 7):
        canary.remember(steps, tracked)
        for weight in tracked:
            weight.parameter.data.add_(1)
        found.append(canary.find(tracked, lambda weight: True))
    assert found == ["w1", "w2", "w0", "w1", "w2", "w0"]


@pytest.mark.parametrize("shape", [(1,), (5000,), (1, 100_000), (300, 700), (40, 30, 20), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_a_sample_is_small_and_covers_the_weight(shape, dtype):
    weight = TrackedWeight("w", nn.Parameter(torch.ones(shape).to(dtype), requires_grad=False), resolve("native"))
    canary = Canary()
    canary.remember(1, [weight])
    elements = canary.nbytes // dtype.itemsize
    assert 0 < elements <= 4096
    assert elements >= min(weight.parameter.numel(), 60)
    assert canary.find([weight], lambda weight: True) is None
    canary.remember(1, [weight])
    weight.parameter.data.fill_(2)
    assert canary.find([weight], lambda weight: True) == "w"


def test_an_unchanged_nan_is_not_a_write():
    (weight,) = weights((4, 4))
    weight.parameter.data.fill_(torch.nan)
    canary = Canary()
    canary.remember(1, [weight])
    assert canary.find([weight], lambda weight: True) is None


def test_results_on_a_device_are_read_at_the_logging_point():
    canary = Canary()
    canary.pending = [("a", torch.tensor(0)), ("b", torch.tensor(1))]
    assert canary.receive([0, 1]) == "b"
    assert canary.pending == []
