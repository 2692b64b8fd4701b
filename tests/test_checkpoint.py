"""Saved here, loaded in another process: counts and TensorBoard steps are those of a run that never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_same, backward, digits_model
from processes import run_python
from test_sinks import scalars

from weightflip import FlipTrackingOptimizer

TOTAL, SAVED_AT = 33, 14

RESUME = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from conftest import backward, digits_model
from sklearn.datasets import load_digits
from weightflip import FlipTrackingOptimizer
images, labels = load_digits(return_X_y=True)
digits = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
model = digits_model(seed=1)
inner = torch.optim.AdamW(model.parameters(), lr=2e-3)
optimizer = FlipTrackingOptimizer(inner, model, log_dir={log_dir!r}, log_every=4)
checkpoint = torch.load({checkpoint!r}, weights_only=True)
model.load_state_dict(checkpoint["model"])
optimizer.load_state_dict(checkpoint["optimizer"])
for step in range({saved_at}, {total}):
    backward(model, digits, step)
    optimizer.step()
optimizer.close()
t = optimizer.tracker
print(json.dumps([t.get_flip_counts(), t.get_update_counts(), t.get_stall_counts(), t.step_count]))
"""


def tracked(model, **options):
    return FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=2e-3), model, log_every=4, **options)


def run(model, optimizer, digits, start, end):
    for step in range(start, end):
        backward(model, digits, step)
        optimizer.step()


def test_resume_in_a_new_process(digits, tmp_path):
    model = digits_model()
    whole = tracked(model, log_dir=tmp_path / "whole")
    run(model, whole, digits, 0, TOTAL)
    whole.close()

    model = digits_model()
    first = tracked(model, log_dir=tmp_path / "parts")
    run(model, first, digits, 0, SAVED_AT)
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, checkpoint)
    # The first run went on after the checkpoint before it died: those records must not show.
    run(model, first, digits, SAVED_AT, SAVED_AT + 7)
    first.close()

    script = RESUME.format(
        tests=str(Path(__file__).parent),
        log_dir=str(tmp_path / "parts"),
        checkpoint=str(checkpoint),
        saved_at=SAVED_AT,
        total=TOTAL,
    )
    output = run_python("-c", script).stdout
    tracker = whole.tracker
    expected = [tracker.get_flip_counts(), tracker.get_update_counts(), tracker.get_stall_counts(), TOTAL]
    assert json.loads(output) == expected
    assert scalars(tmp_path / "parts") == scalars(tmp_path / "whole")


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_bare_and_wrapped_checkpoints_load_each_other(digits, tmp_path, name):
    def make(model):
        return {
            "SGD": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            "AdamW": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3),
        }[name]()

    def wrap(model):
        return FlipTrackingOptimizer(make(model), model, sinks=[])

    reference_model = digits_model()
    reference = make(reference_model)
    run(reference_model, reference, digits, 0, 12)

    for before, after in ((make, wrap), (wrap, make), (wrap, wrap)):
        model = digits_model()
        optimizer = before(model)
        run(model, optimizer, digits, 0, 5)
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
        model = digits_model(seed=1)
        optimizer = after(model)
        weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        run(model, optimizer, digits, 5, 12)
        assert_same(dict(reference_model.state_dict()), dict(model.state_dict()))
        if after is wrap:
            assert optimizer.tracker.step_count == (12 if before is wrap else 7)


def test_loading_leaves_the_callers_state_alone(digits):
    model = digits_model()
    optimizer = tracked(model, sinks=[])
    run(model, optimizer, digits, 0, 3)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert "flip_tracking" in state
