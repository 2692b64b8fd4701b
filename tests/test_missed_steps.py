"""A run whose steps bypass tracking says so when it is printed, when it is closed, and at exit."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from conftest import FORMS, watched
from torch import nn

from weightflip import FlipTrackingOptimizer, track_flips

STEPS = 6


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as in common implementations: two methods instead of ``step``."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad, alpha=group["rho"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure=None):
        raise NotImplementedError("SAM needs first_step and second_step")


def loss(model):
    return model(torch.linspace(-1, 1, 8).repeat(4, 1)).square().sum()


def train(model, step, steps=STEPS):
    for _ in range(steps):
        model.zero_grad()
        loss(model).backward()
        step()


def sam_steps(model, optimizer):
    for _ in range(STEPS):
        loss(model).backward()
        optimizer.first_step()
        loss(model).backward()
        optimizer.second_step()


def inner_steps(model, optimizer):
    train(model, optimizer.inner.step)


def of_another(model, optimizer):
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1).step)


def sam(model):
    return SAM(model.parameters(), torch.optim.SGD, lr=0.1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


WRAPPER, HOOKS = FlipTrackingOptimizer, track_flips
SILENCES = {
    "inner": (
        WRAPPER,
        sgd,
        inner_steps,
        ["step() of the inner optimizer was called directly", "call step() of the FlipTrack"],
    ),
    "sam": (WRAPPER, sam, sam_steps, ["weights of this SAM were written", "track_flips(optimizer.base_optimizer"]),
    "sam, hooks": (HOOKS, sam, sam_steps, ["weights of this SAM were written", "optimizer.base_optimizer"]),
    "another": (WRAPPER, sgd, of_another, ["weights of this SGD were written", "another optimizer"]),
    "another, hooks": (HOOKS, sgd, of_another, ["weights of this SGD were written", "another optimizer"]),
}


@pytest.mark.parametrize("how", SILENCES)
def test_steps_that_bypass_tracking_are_reported(how):
    form, make, run, words = SILENCES[how]
    model = nn.Linear(8, 4)
    inner = make(model)
    tracked = form(inner, model, quantizer="e3m4", sinks=[])
    assert "no step" not in str(tracked.tracker)
    run(model, tracked if form is WRAPPER else inner)
    text = str(tracked.tracker)
    for word in ["after step 0", "no step() was tracked", *words]:
        assert word in text
    with pytest.warns(UserWarning, match=r"no step\(\) was tracked") as caught:
        tracked.close()
    (message,) = [str(warning.message) for warning in caught]
    assert all(word in message for word in words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracked.close()
        if form is HOOKS:
            tracked.remove()
            assert words[0] in str(tracked.tracker)
            assert not inner._optimizer_step_post_hooks
        del tracked
        gc.collect()


def test_tracking_the_optimizer_inside_sam_works():
    model = nn.Linear(8, 4)
    optimizer = sam(model)
    brute = watched(optimizer.base_optimizer, model)
    handle = track_flips(optimizer.base_optimizer, model, sinks=[])
    sam_steps(model, optimizer)
    brute.check(handle.tracker)
    assert f"after step {STEPS}" in str(handle.tracker)
    assert brute.flips["weight"] > 0


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_tracked_run_reports_nothing(form):
    """Nor does one that never starts: loading a checkpoint or initializing weights is not a step."""
    model = nn.Linear(8, 4)
    inner = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, tracker = form(inner, model)
        nn.init.kaiming_uniform_(model.weight)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        optimizer.load_state_dict(optimizer.state_dict())
        assert "no step" not in str(tracker)
        train(model, optimizer.step)
        train(model, torch.optim.AdamW(model.parameters(), lr=0.1).step)
        assert "no step" not in str(tracker)
        assert len(inner._optimizer_step_post_hooks) == (form is FORMS["hooks"])
        del optimizer, tracker
        gc.collect()


def test_copies_do_not_warn():
    model = nn.Linear(8, 4)
    optimizer = FlipTrackingOptimizer(sgd(model), model, quantizer="e3m4", sinks=[])
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not twin.inner._optimizer_step_post_hooks
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            twin.close()


def test_watching_keeps_nothing_alive():
    model = nn.Linear(8, 4)
    inner = sgd(model)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
    tracker = weakref.ref(optimizer.tracker)
    del optimizer
    assert tracker() is None
    assert not inner._optimizer_step_post_hooks
    # Module.to() fails for tensors that have weak references.
    FlipTrackingOptimizer(inner, model, sinks=[])
    model.to(torch.float64)


@pytest.mark.parametrize("run", [inner_steps, of_another])
def test_a_function_that_ends_without_close_warns(run):
    def main():
        model = nn.Linear(8, 4)
        optimizer = FlipTrackingOptimizer(sgd(model), model, sinks=[])
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        run(model, optimizer)

    with pytest.warns(UserWarning, match=r"no step\(\) was tracked"):
        main()


SCRIPT = """
import torch
from weightflip import FlipTrackingOptimizer

model = torch.nn.Linear(8, 4)
optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
another = torch.optim.AdamW(model.parameters())
for _ in range(6):
    model(torch.ones(8)).sum().backward()
    another.step()
"""


def test_the_end_of_a_script_warns(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120
    )
    assert done.stderr.count("no step() was tracked") == 1
