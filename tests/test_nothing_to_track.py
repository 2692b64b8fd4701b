"""Optimizers with nothing to track, or nothing yet: a script that runs without weightflip also runs with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import FORMS, BruteForce, backward, digits_model
from torch import nn

from weightflip import FlipTrackingOptimizer, track_flips

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "weightflip"]


@each_form
def test_an_optimizer_of_biases_logs_once_that_nothing_is_tracked(form, digits, caplog):
    model = digits_model()
    optimizer, tracker = form(torch.optim.SGD([model[0].bias, model[2].bias], lr=0.1), model)
    (line,) = lines(caplog)
    assert line.startswith("weightflip: nothing to track among 2 parameters")
    assert "(0.bias, 2.bias: 1-dimensional" in line
    for step in range(12):
        backward(model, digits, step)
        optimizer.step()
    assert len(lines(caplog)) == 1
    assert tracker.step_count == 12
    assert tracker.get_flip_counts() == {}


@each_form
def test_weights_added_to_biases_are_tracked(form, digits):
    model = digits_model()
    optimizer, tracker = form(torch.optim.SGD([model[0].bias], lr=0.1), model)
    brute = BruteForce(model)
    for step in range(6):
        backward(model, digits, step)
        if step == 3:
            optimizer.add_param_group({"params": [model[0].weight, model[2].weight]})
        brute.before()
        optimizer.step()
        if step >= 3:
            brute.after()
    brute.check(tracker)
    assert sum(brute.flips.values()) > 0


@each_form
def test_a_group_without_parameters(form, digits):
    model = digits_model()
    optimizer, tracker = form(torch.optim.SGD([{"params": []}], lr=0.1), model)
    optimizer.step()
    optimizer.add_param_group({"params": list(model.parameters())})
    backward(model, digits, 0)
    optimizer.step()
    assert set(tracker.get_flip_counts()) == {"0.weight", "2.weight"}


@each_form
def test_one_optimizer_per_parameter_stepped_in_backward(form, digits):
    """Each one is tracked on its own, not as part of a common run."""
    model, bare = digits_model(), digits_model()
    found = {name: form(torch.optim.SGD([p], lr=0.1), model) for name, p in model.named_parameters()}
    steps = {id(p): found[name][0].step for name, p in model.named_parameters()}
    steps |= {id(p): torch.optim.SGD([p], lr=0.1).step for p in bare.parameters()}
    for p in [*model.parameters(), *bare.parameters()]:
        p.register_post_accumulate_grad_hook(lambda p: steps[id(p)]())
    for step in range(3):
        backward(model, digits, step)
        backward(bare, digits, step)
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(p, q)
    flips = {name: sum(tracker.get_flip_counts().values()) for name, (_, tracker) in found.items()}
    assert flips["0.weight"] > 0
    assert flips["2.weight"] > 0
    assert flips["0.bias"] == flips["2.bias"] == 0


def materialized(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replace the parameters in the model and the param groups, as Accelerate does for FSDP2."""
    real = digits_model()
    new: Iterator[nn.Parameter] = iter(real.parameters())
    for module in model:
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, next(new))
    for group in optimizer.param_groups:
        group["params"] = list(model.parameters())


@each_form
def test_parameters_on_the_meta_device_are_tracked_once_they_have_data(form, digits, caplog):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer, tracker = form(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert "0.weight, 2.weight: on the meta device" in lines(caplog)[0]
    materialized(model, optimizer)
    brute = BruteForce(model)
    for step in range(4):
        backward(model, digits, step)
        brute.before()
        optimizer.step()
        brute.after()
    brute.check(tracker)
    assert sum(brute.flips.values()) > 0
    assert sum("nothing to track" in line for line in lines(caplog)) == 1


@pytest.mark.parametrize("options", [{"include": "*.weight"}, {"include": "0.weight"}, {"quantizer": {"0*": "e3m4"}}])
def test_named_weights_may_be_on_the_meta_device_at_first(options, digits):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[], **options)
    materialized(model, optimizer)
    backward(model, digits, 0)
    optimizer.step()
    assert "0.weight" in optimizer.tracker.get_flip_counts()


@pytest.mark.parametrize("make", [FlipTrackingOptimizer, track_flips], ids=["wrapper", "hooks"])
@pytest.mark.parametrize(
    "options",
    [{"include": "2.*"}, {"exclude": "0.*"}, {"quantizer": {"0.*": "e3m4"}}, {"quantizer": {"*.weight": "e3m4"}}],
    ids=str,
)
def test_patterns_that_leave_nothing_are_a_mistake(make, options):
    model = digits_model()
    model[2].requires_grad_(False)
    given = [model[0].bias, model[2].weight] if "include" in options else [model[0].bias]
    with pytest.raises(ValueError, match=r"nothing to track among \d parameters|matches none of the"):
        make(torch.optim.SGD(given, lr=0.1), model, sinks=[], **options)


@each_form
def test_frozen_weights_are_tracked_once_they_train(form, digits, caplog):
    model = digits_model().requires_grad_(False)
    optimizer, tracker = form(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert "0.weight, 2.weight: frozen" in lines(caplog)[0]
    optimizer.step()
    model.requires_grad_(True)
    for step in range(2):
        backward(model, digits, step)
        optimizer.step()
    assert tracker.step_count == 3
    assert sum(tracker.get_flip_counts().values()) > 0
