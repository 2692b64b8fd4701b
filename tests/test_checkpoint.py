"""Saved here, loaded in another process: counts and TensorBoard steps equal those of an uninterrupted run."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import assert_same, backward, digits_model
from processes import run_python
from test_sinks import scalars

from weightflip import FlipTrackingOptimizer, WeightFlipTracker

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
    # The first run continued after the checkpoint before it died; those records must not show.
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


def test_loading_does_not_change_the_callers_state(digits):
    model = digits_model()
    optimizer = tracked(model, sinks=[])
    run(model, optimizer, digits, 0, 3)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert "flip_tracking" in state


def damaged_states():
    """Ways in which a tracker's state may be damaged, with the expected messages."""
    huge = 10**400
    cells = {
        "text": "5",
        "a float": 5.0,
        "NaN": math.nan,
        "a boolean": True,
        "negative": -5,
        "above int64": 2**63,
        "of 400 digits": huge,
        "none": None,
        "a list": [1],
        "a tensor": torch.ones(3),
    }
    for what, value in cells.items():
        yield f"steps {what}", lambda s, v=value: s.update(steps=v), "'steps'"
        yield f"weights {what}", lambda s, v=value: s["layers"][0].__setitem__(1, v), "the weights of layer '0.weight'"
        yield f"total {what}", lambda s, v=value: s["layers"][0][3].__setitem__(0, v), "flips in the totals of layer"
        yield f"base {what}", lambda s, v=value: s["layers"][1][4].__setitem__(4, v), "non-finite weights in the totals"
        yield f"total is {what}", lambda s, v=value: s["layers"][0].__setitem__(3, v), "a list of 7 entries"
        yield f"layers are {what}", lambda s, v=value: s.update(layers=v if v != [1] else 5), "a list as 'layers'"
        yield f"ratios are {what}", lambda s, v=value: s.update(ratios=v if v != [1] else 5), "a list as 'ratios'"
        yield f"remembered is {what}", lambda s, v=value: s.update(weights=v), "a dictionary as 'weights'"
        yield f"version {what}", lambda s, v=value: s.update(version=v), "of version 1, got version"
    for what in ("text", "a boolean", "of 400 digits", "none", "a list"):
        value = cells[what]
        yield f"ratio {what}", lambda s, v=value: s["ratios"][0].__setitem__(3, v), "numbers that float64 can hold"
    yield "steps without room", lambda s: s.update(steps=2**53 + 1), "at most 2**53 steps"
    yield "total too short", lambda s: s["layers"][0][3].pop(), "a list of 7 entries as the totals of layer"
    yield "total too long", lambda s: s["layers"][0][3].append(0), "a list of 7 entries as the totals of layer"
    yield "base too short", lambda s: s["layers"][0][4].pop(), "at the last record of layer '0.weight', got 6"
    yield "layer too short", lambda s: s["layers"][0].pop(), "a list of 5 entries as a layer, got 4"
    yield "ratio too short", lambda s: s["ratios"][0].pop(), "a list of 6 entries as a ratio, got 5"
    yield "layer twice", lambda s: s["layers"].append(s["layers"][0]), "each layer once"
    yield "ratio twice", lambda s: s["ratios"].append(s["ratios"][0]), "each ratio of a layer once"
    yield "name a number", lambda s: s["layers"][0].__setitem__(0, 5), "names of a layer and its quantizer"
    yield "ratio of no layer", lambda s: s["ratios"][0].__setitem__(0, "x"), "to belong to a layer in 'layers', got 'x'"
    yield "tensors of no layer", lambda s: s["weights"].update(x={}), "to belong to a layer in 'layers', got 'x'"
    yield "no tensor", lambda s: s["weights"]["0.weight"]["oscillation"].update(x=5), "tensors by name"
    yield "more flips than weights", lambda s: s["layers"][0][3].__setitem__(0, 2**62), "flips between 0 and"
    yield "more stalled than updates", lambda s: s["layers"][0][3].__setitem__(2, 2**62), "stalled between 0 and"
    yield "fewer than at the record", lambda s: s["layers"][0][3].__setitem__(0, 0), "since then of layer '0.weight'"
    for key in ("version", "steps", "layers"):
        yield f"no {key}", lambda s, k=key: s.pop(k), f"a dictionary without ['{key}']"


def test_damaged_counts_are_refused_and_an_optimizer_starts_from_zero(digits):
    records = []
    options = {"metrics": ("flips", "stalls", "oscillation"), "sinks": [records.append], "quantizer": "int8"}
    model = digits_model()
    optimizer = tracked(model, **options)
    run(model, optimizer, digits, 0, 6)
    state = optimizer.state_dict()
    assert state["flip_tracking"]["tracker"]["layers"][0][4][0] > 0, "no flips before the last record"

    fresh = digits_model()
    reference = tracked(fresh, **options)
    bare = {key: value for key, value in state.items() if key != "flip_tracking"}
    reference.load_state_dict(copy.deepcopy(bare))
    run(fresh, reference, digits, 6, 9)
    counts = reference.tracker.get_flip_counts()

    for what, damage, message in damaged_states():
        bad = copy.deepcopy(state["flip_tracking"]["tracker"])
        damage(bad)
        tracker = WeightFlipTracker(metrics=options["metrics"])
        tracker.load_state_dict(state["flip_tracking"]["tracker"])
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            tracker.load_state_dict(bad)
        assert str(raised.value).startswith("expected "), what
        assert ", got " in str(raised.value), what
        assert len(str(raised.value)) < 300, what
        # The existing state is unchanged.
        assert_same(tracker.state_dict()["layers"], state["flip_tracking"]["tracker"]["layers"])

    for bad in (5, None, [], "text", {}, {"tracker": 5, "calls": 3}, {"tracker": state["flip_tracking"]["tracker"]}):
        check_starts_from_zero(digits, {**state, "flip_tracking": bad}, options, counts, "expected ")
    for calls in (-5, 10**400, True, "5", 2.0, math.nan):
        bad = {"tracker": state["flip_tracking"]["tracker"], "calls": calls}
        check_starts_from_zero(digits, {**state, "flip_tracking": bad}, options, counts, "calls")
    for _, damage, message in list(damaged_states())[::7]:
        bad = copy.deepcopy(state["flip_tracking"])
        damage(bad["tracker"])
        check_starts_from_zero(digits, {**state, "flip_tracking": bad}, options, counts, message)


def check_starts_from_zero(digits, state, options, counts, message):
    """Expect one warning, unchanged training, and counts from zero, even if there were some before."""
    model = digits_model()
    optimizer = tracked(model, **options)
    run(model, optimizer, digits, 0, 2)
    model.load_state_dict(digits_model().state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Torch takes the tensors as they are.
        optimizer.load_state_dict(copy.deepcopy(state))
        run(model, optimizer, digits, 6, 9)
    (warning,) = caught
    assert "start from zero" in str(warning.message)
    assert message in str(warning.message)
    assert optimizer.tracker.step_count == 3
    assert optimizer.tracker.get_flip_counts() == counts


def test_other_objects_are_refused():
    expected = "expected the dictionary that WeightFlipTracker.state_dict() returns, got 5"
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
        WeightFlipTracker().load_state_dict(5)


def test_a_state_without_metric_groups_and_a_json_of_it_load(digits):
    model = digits_model()
    optimizer = tracked(model, sinks=[])
    run(model, optimizer, digits, 0, 6)
    state = optimizer.tracker.state_dict()
    for given in (state, json.loads(json.dumps(state)), {k: state[k] for k in ("version", "steps", "layers")}):
        tracker = WeightFlipTracker()
        tracker.load_state_dict(given)
        assert tracker.get_flip_counts() == optimizer.tracker.get_flip_counts()
