"""Ctrl-C at any line: a step is counted completely or not at all, and later numbers are right."""

from __future__ import annotations

import pytest
import torch
from conftest import BruteForce
from torch import nn
from tracing import SOURCE, Traced

from weightflip import FlipTrackingOptimizer, track_flips


class InterruptAt(Traced):
    """Raises KeyboardInterrupt before the n-th executed line of the library, counted from 0; None only counts lines."""

    def __init__(self, place: int | None) -> None:
        self.place, self.lines, self.where = place, 0, None

    def _trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self.lines += 1
            if self.where is None and self.lines - 1 == self.place:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace


def make(form: str, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 4, bias=False))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    records = []
    options = {"log_every": 2, "sinks": [records.append], **options}
    if form == "wrapper":
        optimizer = FlipTrackingOptimizer(inner, model, **options)
        return model, optimizer, optimizer.tracker, records
    return model, inner, track_flips(inner, model, **options).tracker, records


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(form: str, interrupt: InterruptAt, **options):
    """Train five steps, the first three of which may be interrupted; return what each did, and what was counted."""
    model, optimizer, tracker, _ = make(form, **options)
    brute = BruteForce(model)
    counted = dict.fromkeys(brute.flips, (0, 0, 0))
    tracked_steps = 0

    def totals():
        flips, updates, stalled = tracker.get_flip_counts(), tracker.get_update_counts(), tracker.get_stall_counts()
        return {name: (flips.get(name, 0), updates.get(name, 0), stalled.get(name, 0)) for name in brute.flips}

    for step in range(5):
        set_gradients(model, step)
        brute.flips, brute.updates, brute.stalled = (dict.fromkeys(brute.parameters, 0) for _ in range(3))
        brute.before()
        steps, is_tracked = tracker.step_count, tracker.is_tracking
        try:
            if step < 3:
                with interrupt:
                    optimizer.step()
            else:
                optimizer.step()
        except KeyboardInterrupt:
            is_interrupted = True
        else:
            is_interrupted = False
        brute.after()
        seen = {
            name: (brute.flips[name], brute.updates[name], brute.stalled[name]) if is_tracked else (0, 0, 0)
            for name in brute.flips
        }
        whole = {name: tuple(a + b for a, b in zip(counted[name], seen[name], strict=True)) for name in seen}
        now = totals()
        if is_interrupted:
            assert now in (counted, whole), (step, interrupt.where)
        else:
            assert now == whole, (step, interrupt.where)
        if is_interrupted and not is_tracked:
            assert tracker.step_count in (steps, steps + 1)
        else:
            assert tracker.step_count == steps + (now == whole), (step, interrupt.where)
        tracked_steps += is_tracked and tracker.step_count > steps
        assert str(tracker)
        counted = now
    record = tracker.record(may_be_empty=True)
    weights = sum(parameter.numel() for parameter in brute.parameters.values())
    assert sum(layer.total.weight_steps for layer in record.layers) == tracked_steps * weights
    assert all(0 <= layer.window.weight_steps <= layer.total.weight_steps for layer in record.layers)
    return {layer.name: layer.total for layer in record.layers}


OPTIONS = {
    "default": {},
    "groups": {"metrics": ("flips", "stalls", "oscillation", "scale"), "backend": "eager"},
    "sparsely": {"track_every": 2, "low_memory": True},
}


def interrupt_each(form: str, options: str, first: int, stride: int) -> None:
    # A first run, because it also imports and compiles.
    train(form, InterruptAt(None), **OPTIONS[options])
    counter = InterruptAt(None)
    train(form, counter, **OPTIONS[options])
    assert counter.lines > 500
    for place in range(first, counter.lines, stride):
        interrupt = InterruptAt(place)
        train(form, interrupt, **OPTIONS[options])
        assert interrupt.where is not None


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", ["wrapper", "hooks"])
def test_a_step_is_counted_completely_or_not_at_all(form, options):
    interrupt_each(form, options, first=(form == "hooks") + 2 * list(OPTIONS).index(options), stride=29)


@pytest.mark.conformance
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", ["wrapper", "hooks"])
def test_at_every_line(form, options):
    interrupt_each(form, options, first=0, stride=1)
