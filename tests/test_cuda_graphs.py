"""A step captured in a CUDA graph is not tracked: host code does not run again when the graph is replayed."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import FORMS, BruteForce, backward, digits_model

from weightflip import FlipTrackingOptimizer


@pytest.mark.skipif(torch.cuda.is_available(), reason="where other tests have loaded the driver, asking is right")
def test_steps_on_the_cpu_do_not_check_for_a_capture(monkeypatch, digits):
    def ask() -> bool:
        raise AssertionError("asked a driver that nobody has loaded")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", ask)
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    backward(model, digits, 0)
    optimizer.step()
    assert sum(optimizer.tracker.get_flip_counts().values()) > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_torch_reports_as_captured_is_not_tracked(monkeypatch, digits, form):
    """The reaction to torch's answer. That torch gives it during a capture is only tested in test_accelerator.py."""
    model = digits_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer, tracker = FORMS[form](inner, model)
    backward(model, digits, 0)
    optimizer.step()
    counted = tracker.get_flip_counts()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for name in ("before_step", "after_step", "record"):
        monkeypatch.setattr(tracker, name, lambda *_, name=name: pytest.fail(name))
    backward(model, digits, 1)
    with pytest.warns(UserWarning, match=r"captured in a CUDA graph.* keep optimizer.step\(\) outside"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert (tracker.get_flip_counts(), tracker.step_count) == (counted, 1)
    monkeypatch.undo()

    brute = BruteForce(model)
    for step in (2, 3):
        # As a replay writes: without changing a version counter. This is not a flip of the next step.
        model[0].weight.data.mul_(-1)
        backward(model, digits, step)
        brute.before()
        optimizer.step()
        brute.after()
    assert tracker.get_flip_counts() == {name: counted[name] + brute.flips[name] for name in counted}
