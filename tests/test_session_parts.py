"""The parts of a session, each on its own: training steps, faults, the tracked weights, the last record."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from weightflip.counting.tracker import WeightFlipTracker
from weightflip.session.guard import Guard
from weightflip.session.last_record import LastRecord
from weightflip.session.log import Log, Source
from weightflip.session.options import Options
from weightflip.session.steps import is_state_initialization, is_training_step, parameters_of
from weightflip.session.weights import Weights
from weightflip.sinks import SinkGroup, make_sinks


class Owner:
    """Owns a source, as an optimizer does."""


def parts(model, **options):
    tracker, log = WeightFlipTracker(), Log(SinkGroup(make_sinks(options.get("sinks", []))), has_sinks=True)
    source = Source(tracker, owner := Owner())
    weights = Weights(tracker, log, source, model, Options(quantizer="e3m4", **options), {})
    return owner, tracker, log, source, weights


@pytest.mark.parametrize(
    ("rate", "gradient", "has_state", "expected"),
    [
        (0.0, 0.0, False, False),
        (0.0, 1.0, False, True),
        (0.0, 0.0, True, None),
        (0.1, 0.0, False, None),
    ],
)
def test_a_first_step_without_learning_rate_and_gradients_is_not_a_training_step(rate, gradient, has_state, expected):
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=0.9)
    if has_state:
        weight.grad = torch.ones(2, 2)
        optimizer.step()
    weight.grad = torch.full((2, 2), gradient)
    found = is_training_step(optimizer, is_sharded=False)
    assert (None if found is None else bool(found)) == expected
    assert not is_state_initialization(optimizer)


def test_a_fault_ends_tracking_once_and_frees_memory():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, tracker, log, source, weights = parts(model)
    weights.select(optimizer, strict=True)
    weights.hold(optimizer)
    guard, calls = Guard(tracker, weights, log, source), []
    guard.run(lambda: guard.attempt(lambda: 1 / 0))
    guard.run(calls.append, "after it")
    assert calls == []
    assert not any(weight.is_held for weight in weights.tracked)
    assert log.pending_warnings == [
        "weightflip: tracking has stopped, training continues: ZeroDivisionError: division by zero"
    ]


def test_weights_are_selected_again_when_parameters_change():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    _, _, log, source, weights = parts(model)
    weights.select(optimizer, strict=True)
    assert log.sources == []
    log.add_source(source)
    assert [weight.name for weight in weights.tracked] == list(source.info.tracked) == ["0.weight"]
    assert log.sources == [source]
    optimizer.add_param_group({"params": model[1].parameters()})
    weights.select(optimizer, strict=False)
    assert source.info.tracked == {"0.weight": ("2x4", "float32", "e3m4"), "1.weight": ("3x2", "float32", "e3m4")}
    tracked = weights.tracked
    weights.select(optimizer, strict=False)
    assert weights.tracked is tracked
    weights.needs_reselection = True
    weights.select(optimizer, strict=False)
    assert weights.tracked is not tracked


def test_parameters_are_held_only_during_a_step():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    *_, weights = parts(model)
    weights.select(optimizer, strict=True)
    (weight,) = weights.tracked
    assert not weight.is_held
    with weights.holding():
        assert weight.parameter is model.weight is parameters_of(optimizer)[0]
    assert not weight.is_held


def test_a_copy_remembers_what_the_model_determined():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    *_, weights = parts(model)
    weights.select(optimizer, strict=True)
    twin = copy.deepcopy(weights)
    assert twin.tracked == []
    twin.select(optimizer, strict=False)
    assert [weight.name for weight in twin.tracked] == ["weight"]


def test_the_last_record_is_written_when_the_owner_is_deleted():
    model, records = nn.Linear(4, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    owner, tracker, log, source, weights = parts(model, sinks=[records.append])
    weights.select(optimizer, strict=True)
    log.add_source(source)
    with weights.holding():
        tracker.before_step(weights.tracked)
        tracker.after_step()
    ending = LastRecord(log, source)
    ending.register(owner)
    assert records == []
    del owner
    assert [(record.step, [layer.name for layer in record.layers]) for record in records] == [(1, ["weight"])]
