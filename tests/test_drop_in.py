"""Everything around an optimizer works as before: schedulers, AMP, hooks, averaging, compilation, checkpoints."""

from __future__ import annotations

import ast
import copy
import gc
import itertools
import json
import os
import pickle
import re
import warnings
import weakref
from collections import OrderedDict, defaultdict

import pytest
import torch
from conftest import FORMS, BruteForce, assert_same, backward, by_hooks, case, digits_model, same_as_bare, watched
from processes import run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from weightflip import FlipTrackingHandle, FlipTrackingOptimizer, track_flips

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)

# ---------------------------------------------------------------------- schedulers


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, 3, mode="triangular2"),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_tested():
    assert {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"} == set(SCHEDULERS)


@each_form
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(scheduler, form, digits):
    def train(model, optimizer, digits):
        schedule = scheduler(optimizer)
        trace = []
        for step in range(8):
            loss = backward(model, digits, step)
            optimizer.step()
            if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
                schedule.step(loss.item())
            else:
                schedule.step()
            trace.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0].get("betas")))
            if step == 4:
                # Resume: the loaded param groups are new objects, which the scheduler has to find.
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        # OneCycleLR and CyclicLR also cycle momentum.
        assert len(set(trace)) > 2 or isinstance(schedule, (lr_scheduler.ConstantLR, lr_scheduler.ReduceLROnPlateau))
        return trace

    same_as_bare(form, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), train, digits)


@each_form
def test_one_cycle_steers_adams_betas(form, digits):
    def train(model, optimizer, digits):
        schedule = lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=8)
        trace = []
        for step in range(6):
            backward(model, digits, step)
            optimizer.step()
            schedule.step()
            trace.append(optimizer.param_groups[0]["betas"])
        assert len(set(trace)) > 3
        return trace

    same_as_bare(form, lambda p: torch.optim.AdamW(p, 0.01), train, digits)


# ---------------------------------------------------------------------- AMP


@each_form
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_grad_scaler_skips_steps(fused, form, digits):
    def train(model, optimizer, digits):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        images, labels = digits
        trace = []
        for step in range(8):
            optimizer.zero_grad()
            at = slice(step * 64, (step + 1) * 64)
            loss = nn.functional.cross_entropy(model(images[at]), labels[at])
            scaler.scale(loss).backward()
            if step in (2, 5):
                model[0].weight.grad[0, 0] = float("inf")
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            scaler.step(optimizer)
            scaler.update()
            trace.append((loss.detach(), scaler.get_scale()))
        scales = [scale for _, scale in trace]
        assert sum(after < before for before, after in itertools.pairwise(scales)) == 2
        return trace

    same_as_bare(form, lambda p: torch.optim.AdamW(p, 0.01, fused=fused), train, digits)


@each_form
def test_skipped_steps_are_not_counted_as_steps(form, digits):
    model = digits_model()
    inner = torch.optim.AdamW(model.parameters(), fused=True)
    brute = watched(inner, model)
    optimizer, tracker = form(inner, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(digits[0][:8]).square().mean()).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = float("nan")
        scaler.step(optimizer)
        scaler.update()
    assert tracker.step_count == 2
    brute.check(tracker)


# ---------------------------------------------------------------------- hooks, averaging, steps that initialize state


@each_form
def test_global_hooks_run_once_for_the_inner_optimizer(form, digits):
    model = digits_model()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer, _ = form(inner, model)
    other = torch.optim.SGD(digits_model().parameters(), 0.1)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: seen.append(("pre", optimizer, args[0]))),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: seen.append(("post", optimizer, args[0]))),
    ]
    try:
        backward(model, digits, 0)
        optimizer.step()
        other.step()
    finally:
        for handle in handles:
            handle.remove()
    assert [(name, id(o)) for name, o, _ in seen] == [(name, id(o)) for o in (inner, other) for name in ("pre", "post")]
    assert all(first is optimizer for _, optimizer, first in seen)


@each_form
def test_swa_and_ema(form, digits):
    def train(model, optimizer, digits):
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        schedule = swa_utils.SWALR(optimizer, 0.01, anneal_epochs=4)
        for step in range(8):
            backward(model, digits, step)
            optimizer.step()
            averaged.update_parameters(model)
            schedule.step()
            if step == 4:
                # The average temporarily replaces the weights: these writes are not flips.
                kept = copy.deepcopy(model.state_dict())
                model.load_state_dict(averaged.module.state_dict())
                backward(model, digits, step)
                optimizer.step()
                model.load_state_dict(kept)
        return [p.detach().clone() for p in averaged.parameters()]

    same_as_bare(form, lambda p: torch.optim.AdamW(p, 0.01), train, digits)


@each_form
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float lr", "tensor lr"])
def test_a_step_by_which_distributed_checkpoint_initializes_state_does_not_count(lr, make, form, digits):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def train(model, optimizer, digits):
        trace = []
        for step in range(4):
            if step in (0, 2):
                # Without gradients, as at the start of a resumed run: torch creates them and makes a step.
                optimizer.zero_grad()
                saved = get_optimizer_state_dict(model, optimizer)
                set_optimizer_state_dict(model, optimizer, saved)
                trace.append(saved["state"])
            backward(model, digits, step)
            optimizer.step()
        return trace

    # Brute force counts no flips and no updates in a step without gradients.
    same_as_bare(form, lambda p: make(p, lr=copy.deepcopy(lr)), train, digits)

    model = digits_model()
    optimizer, tracker = form(make(model.parameters(), lr=copy.deepcopy(lr)), model)
    train(model, optimizer, digits)
    assert tracker.step_count == 4


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Initialize state as torchtitan's ``init_optim_state`` does before saving or loading."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


@each_form
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float lr", "tensor lr"])
def test_a_step_that_initializes_state_is_recognized_by_its_gradients(lr, form, digits):
    def train(model, optimizer, digits):
        make_state(optimizer)
        for step in range(4):
            backward(model, digits, step)
            optimizer.step()
        return []

    same_as_bare(form, lambda p: torch.optim.AdamW(p, lr=copy.deepcopy(lr)), train, digits)
    model = digits_model()
    optimizer, tracker = form(torch.optim.AdamW(model.parameters(), lr=copy.deepcopy(lr)), model)
    train(model, optimizer, digits)
    assert tracker.step_count == 4
    # Later steps with zero gradients do count, as do steps whose gradients a closure computes.
    optimizer.param_groups[0]["lr"] = 0.0
    backward(model, digits, 0)
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    assert tracker.step_count == 5


@each_form
def test_a_later_step_with_learning_rate_zero_and_no_state_counts(form, digits):
    model = digits_model()
    optimizer, tracker = form(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for rate in (0.1, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        backward(model, digits, 0)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert tracker.step_count == 2


@each_form
def test_a_warmup_from_zero_with_a_closure_counts(form, digits):
    model = digits_model()
    optimizer, tracker = form(torch.optim.AdamW(model.parameters(), lr=0.0), model)
    optimizer.step(lambda: backward(model, digits, 0))
    assert tracker.step_count == 1
    assert sum(tracker.get_update_counts().values()) > 0


@each_form
def test_distributed_checkpoint_saves_the_tracker_as_its_own_object(form, digits, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start(seed):
        model = digits_model(seed)
        optimizer, tracker = form(torch.optim.AdamW(model.parameters(), 0.01), model)
        return model, optimizer, tracker

    def go_on(model, optimizer, steps):
        for step in steps:
            backward(model, digits, step)
            optimizer.step()

    model, optimizer, tracker = start(seed=0)
    go_on(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "flips": tracker}, checkpoint_id=tmp_path, no_dist=True)
    go_on(model, optimizer, range(3, 6))

    model_2, optimizer_2, tracker_2 = start(seed=1)
    weights, state = get_state_dict(model_2, optimizer_2)
    dcp.load({"model": weights, "optimizer": state, "flips": tracker_2}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(model_2, optimizer_2, model_state_dict=weights, optim_state_dict=state)
    assert tracker_2.step_count == 3
    go_on(model_2, optimizer_2, range(3, 6))
    assert_same(dict(model.state_dict()), dict(model_2.state_dict()))
    assert tracker_2.state_dict() == tracker.state_dict()
    assert sum(tracker.get_flip_counts().values()) > 0


@each_form
def test_a_warmup_from_zero_counts_sparse_gradients(form):
    table = nn.Embedding(9, 4, sparse=True)
    optimizer, tracker = form(torch.optim.SGD(table.parameters(), lr=0.0), table)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert tracker.step_count == 1
    assert tracker.get_update_counts() == {"weight": 8}


@each_form
def test_a_warmup_from_zero_counts_its_steps(form, digits):
    # A learning rate of 0 alone does not make it an initializing step: all these updates are stalled.
    model = digits_model()
    optimizer, tracker = form(torch.optim.SGD(model.parameters(), lr=0.0), model)
    backward(model, digits, 0)
    optimizer.step()
    assert tracker.step_count == 1
    assert tracker.get_stall_counts() == tracker.get_update_counts()
    assert sum(tracker.get_update_counts().values()) > 0


# ---------------------------------------------------------------------- odd, replaced and converted parameters


class Zoo(nn.Module):
    """Parameters of every kind, a few of which the optimizer's step changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(6, 5))
        self.tied = self.matrix
        self.transposed = nn.Parameter(torch.randn(5, 6).t())
        self.strided = nn.Parameter(torch.randn(6, 10)[:, ::2])
        self.nan = nn.Parameter(torch.full((3, 3), float("nan")))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.complex = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
        self.integer = nn.Parameter(torch.zeros(3, 3, dtype=torch.int64), requires_grad=False)
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3, 3))
        self.meta = nn.Parameter(torch.randn(3, 3, device="meta"))
        self.table = nn.Embedding(9, 4, sparse=True)

    def give_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in (self.matrix, self.transposed, self.strided, self.nan, self.scalar, self.empty, self.complex):
            p.grad = torch.empty_like(p).normal_(generator=generator)
        self.table.weight.grad = None
        self.table(torch.randint(0, 9, (3,), generator=generator)).square().sum().backward()


@each_form
def test_nothing_raises_for_odd_parameters(form):
    states = []
    for tracked in (False, True):
        model = Zoo()
        inner = torch.optim.SGD(model.parameters(), 0.1)
        optimizer, tracker = form(inner, model) if tracked else (inner, None)
        for step in range(4):
            model.give_gradients(step)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()
        finite = {name: p.detach().nan_to_num(7.0) for name, p in model.named_parameters() if not p.is_meta}
        states.append(finite)
    assert_same(*states)
    flips = tracker.get_flip_counts()
    assert set(flips) == {"matrix", "transposed", "strided", "nan", "unused", "table.weight"}
    assert all(flips[name] > 0 for name in ("matrix", "transposed", "strided", "table.weight"))
    assert flips["nan"] == flips["unused"] == 0


@each_form
def test_parameters_replaced_in_the_param_groups_are_tracked(form, digits):
    # As Accelerate does with FSDP2: other tensors in the same param group.
    model = digits_model()
    optimizer, tracker = form(torch.optim.SGD(model.parameters(), 0.05), model)
    backward(model, digits, 0)
    optimizer.step()
    before = tracker.get_flip_counts()
    for module in (model[0], model[2]):
        module.weight = nn.Parameter(module.weight.detach() * 1.5 + 0.01)
        module.bias = nn.Parameter(module.bias.detach().clone())
    optimizer.param_groups[0]["params"][:] = list(model.parameters())
    brute = BruteForce(model)
    backward(model, digits, 1)
    brute.before()
    optimizer.step()
    brute.after()
    after = tracker.get_flip_counts()
    assert {name: after[name] - before[name] for name in after} == brute.flips
    assert sum(brute.flips.values()) > 0


def test_frameworks_do_not_unwrap_the_wrapper():
    optimizer, _ = FORMS["wrapper"](torch.optim.SGD(digits_model().parameters(), 0.1), None)
    # Accelerate and Lightning look for this name and unwrap.
    assert not hasattr(optimizer, "optimizer")


@each_form
@pytest.mark.parametrize(
    "convert",
    [lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16).float()],
    ids=["bfloat16", "float64", "float16 and back"],
)
def test_parameters_converted_after_construction(convert, form, digits):
    model = digits_model()
    optimizer, tracker = form(torch.optim.SGD(model.parameters(), 0.05), model)
    backward(model, digits, 0)
    optimizer.step()
    before = tracker.get_flip_counts()
    convert(model)
    images = digits[0].to(next(model.parameters()).dtype)
    # No weight changes in this step, so any count would come from the conversion.
    optimizer.param_groups[0]["lr"] = 0.0
    model(images[:32]).square().mean().backward()
    if next(model.parameters()).dtype is torch.bfloat16:
        # A different format from here on.
        before = dict.fromkeys(before, 0)
        message = "was tracked as float8_e4m3 and is now tracked as native; its counts start from zero"
        with pytest.warns(UserWarning, match=message):
            optimizer.step()
    else:
        optimizer.step()
    assert tracker.get_flip_counts() == before
    assert tracker.step_count == 2
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert sum(tracker.get_flip_counts().values()) > sum(before.values())


# ---------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("what", ["training step", "optimizer.step"])
def test_compiled_training_steps(what, digits):
    images, labels = digits

    def run(form):
        torch.compiler.reset()
        model = digits_model()
        optimizer, tracker = torch.optim.AdamW(model.parameters(), 0.01), None
        if form is not None:
            optimizer, tracker = form(optimizer, model)
        brute = BruteForce(model)

        def grow(images, labels):
            nn.functional.cross_entropy(model(images), labels).backward()

        def step(images, labels):
            grow(images, labels)
            optimizer.step()

        compiled = torch.compile(step if what == "training step" else optimizer.step, backend="aot_eager")
        for i in range(4):
            optimizer.zero_grad()
            batch = images[i * 64 : (i + 1) * 64], labels[i * 64 : (i + 1) * 64]
            brute.before()
            if what == "training step":
                compiled(*batch)
            else:
                grow(*batch)
                compiled()
            brute.take_gradients()
            brute.after()
        return brute, tracker, dict(model.state_dict())

    _, _, bare = run(None)
    for name, form in FORMS.items():
        with case(name):
            brute, tracker, state = run(form)
            assert_same(bare, state)
            brute.check(tracker)
            assert tracker.step_count == 4
            assert sum(brute.flips.values()) > 0


# ---------------------------------------------------------------------- several optimizers, one run


def test_optimizer_in_backward_writes_one_run(digits, tmp_path):
    def train(tracked):
        model = digits_model()
        optimizers, brutes, first = {}, [], None
        for p in model.parameters():
            optimizer = torch.optim.SGD([p], 0.05)
            if tracked:
                brutes.append((optimizer, watched(optimizer, model)))
                sinks = [tmp_path / "run.jsonl"] if first is None else first
                optimizer = FlipTrackingOptimizer(optimizer, model, log_every=2, sinks=sinks)
                first = first or optimizer
            optimizers[p] = optimizer

        def hook(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        images, labels = digits
        for step in range(6):
            at = slice(step * 64, (step + 1) * 64)
            nn.functional.cross_entropy(model(images[at]), labels[at]).backward()
        return model, optimizers, brutes

    bare, _, _ = train(tracked=False)
    model, optimizers, brutes = train(tracked=True)
    assert_same(dict(bare.state_dict()), dict(model.state_dict()))
    names = {p: name for name, p in model.named_parameters()}
    total = 0
    for inner, brute in brutes:
        (p,) = inner.param_groups[0]["params"]
        tracker = optimizers[p].tracker
        expected = {names[p]: brute.flips[names[p]]} if p.ndim == 2 else {}
        assert tracker.get_flip_counts() == expected
        total += sum(expected.values())
    next(iter(optimizers.values())).flush()
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    records = [record["record"] for record in records if "record" in record]
    assert [record["step"] for record in records][:3] == [2, 4, 6]
    assert {layer["name"] for layer in records[-1]["layers"]} == {"0.weight", "2.weight"}
    assert sum(layer["total"]["flips"] for layer in records[-1]["layers"]) == total > 0


@pytest.mark.parametrize("first_form", ["wrapper", "hooks"])
def test_muon_and_adamw_in_one_tensorboard_run(first_form, digits, tmp_path):
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 10))
    muon = torch.optim.Muon([model[0].weight], lr=0.02)
    adamw = torch.optim.AdamW(model[2].parameters(), lr=0.01)
    brutes = [watched(muon, model), watched(adamw, model)]
    if first_form == "wrapper":
        first = muon = FlipTrackingOptimizer(muon, model, log_every=3, log_dir=tmp_path)
    else:
        first = track_flips(muon, model, log_every=3, log_dir=tmp_path)
    adamw = FlipTrackingOptimizer(adamw, model, sinks=first)
    for step in range(6):
        backward(model, digits, step)
        adamw.step()
        muon.step()
    first.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    flips = brutes[0].flips["0.weight"] + brutes[1].flips["2.weight"]
    assert [event.step for event in events.Scalars("flips/cumulative_rate")] == [3, 6]
    assert events.Scalars("flips/cumulative_rate")[-1].value == pytest.approx(flips / (64 * 48 + 480))
    for name, brute in zip(("0.weight", "2.weight"), brutes, strict=True):
        (last,) = events.Scalars(f"cumulative_flip_rate/{name}")[-1:]
        assert last.value == pytest.approx(brute.flips[name] / model.get_parameter(name).numel())


def test_two_optimizers_need_different_names():
    first = FlipTrackingOptimizer(torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1), sinks=[])
    with pytest.raises(
        ValueError, match=r"already tracks a weight named 'group0.param0'.*pass model= to both.*exclude="
    ):
        FlipTrackingOptimizer(torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1), sinks=first)
    with pytest.raises(
        TypeError, match="must be another tracked optimizer itself, not a list with it; pass sinks=first"
    ):
        FlipTrackingOptimizer(torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1), sinks=[first])


def two_of_one_run(records):
    model = digits_model()
    first = track_flips(torch.optim.SGD(model[0].parameters(), 0.05), model, log_every=2, sinks=[records.append])
    inner = torch.optim.SGD(model[2].parameters(), 0.05)
    second = FlipTrackingOptimizer(inner, model, log_every=2, sinks=first)
    return model, first, second


def test_a_run_continues_when_its_first_optimizer_ends(digits):
    records = []
    model, first, second = two_of_one_run(records)
    weight = weakref.ref(model[0].weight)
    brute = BruteForce(model)
    for step in range(6):
        backward(model, digits, step)
        if step == 2:
            first.remove()
        brute.before()
        second.step()
        brute.after()
    # The first one made no further step; the second took over, with its own logging points.
    assert [record.step for record in records] == [2, 4, 6]
    assert records[-1].layers[-1].total.flips == brute.flips["2.weight"] > 0
    del model, brute, second
    gc.collect()
    assert weight() is None


def test_a_new_optimizer_takes_over_the_weights_of_one_that_ended(digits):
    records = []
    model, first, second = two_of_one_run(records)
    backward(model, digits, 0)
    second.step()
    del second
    gc.collect()
    third = FlipTrackingOptimizer(torch.optim.AdamW(model[2].parameters()), model, log_every=1, sinks=first)
    # The step count continues from that of the second, which was 1.
    third.step()
    first.remove()
    assert [layer.name for layer in records[-1].layers].count("2.weight") == 1
    third.step()
    assert third.tracker.step_count == 2
    assert records[-1].model.window.weight_steps == 480


def test_the_step_count_continues_when_all_optimizers_of_a_run_have_ended(digits):
    records = []
    model = digits_model()

    first_optimizer = torch.optim.SGD(model.parameters(), 0.05)
    first = track_flips(first_optimizer, model, log_every=2, sinks=[records.append])
    for step in range(4):
        backward(model, digits, step)
        first_optimizer.step()
    first.remove()
    second_optimizer = torch.optim.SGD(model.parameters(), 0.05)
    second = track_flips(second_optimizer, model, log_every=2, sinks=first)
    for step in range(4):
        backward(model, digits, step)
        second_optimizer.step()
    second.remove()
    assert [record.step for record in records] == [2, 4, 6, 8]


def test_a_copy_of_one_optimizer_of_a_run_writes_on_its_own(digits):
    records = []
    model, _first, second = two_of_one_run(records)
    backward(model, digits, 0)
    twin_model, twin = copy.deepcopy((model, second))
    for _ in range(2):
        backward(twin_model, digits, 1)
        twin.step()
    assert [record.step for record in records] == [2]
    assert not second.tracker.get_flip_counts().get("2.weight")


def test_a_name_that_appears_later_is_not_written_twice(digits):
    model = digits_model()
    first = FlipTrackingOptimizer(torch.optim.SGD([model[0].weight], 0.05), log_every=1, sinks=[])
    second = FlipTrackingOptimizer(torch.optim.SGD([model[2].bias], 0.05), sinks=first)
    first.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))]})
    second.add_param_group({"params": [model[2].weight]})
    backward(model, digits, 0)
    first.step()
    second.step()
    assert set(first.info.tracked) == {"group0.param0", "group1.param0"}
    assert "another optimizer of this run" in second.info.skipped["group1.param0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_that_ends_writes_none_of_its_parents_records(tmp_path):
    code = """
import os, sys, torch
from weightflip import FlipTrackingOptimizer
model = torch.nn.Linear(8, 8)
model(torch.ones(8)).sum().backward()
optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, log_dir=sys.argv[1], log_every=2)
for _ in range(3):
    optimizer.step()
if os.fork() == 0:
    sys.exit()
os.wait()
"""
    run_python("-c", code, str(tmp_path), timeout=120)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("flips/rate")] == [2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_that_continues_training_writes_nothing_and_warns_once(tmp_path):
    """The threads of a SummaryWriter do not exist in a forked process, so flushing there would wait forever."""
    code = """
import os, sys, time, torch, warnings
from torch.utils.tensorboard import SummaryWriter
from weightflip import FlipTrackingOptimizer

class Counting:
    def start(self, info, first_step): pass
    def write(self, record): print("written by", "parent" if os.getpid() == parent else "child", flush=True)
    def alert(self, event): pass
    flush = close = lambda self: None

def make(**options):
    model = torch.nn.Linear(8, 8)
    model(torch.ones(8)).sum().backward()
    return FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, log_every=1, **options)

def go(optimizers):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for optimizer in optimizers:
            optimizer.step(); optimizer.flush(); optimizer.step(); optimizer.close()
            optimizer.step(); optimizer.close()
    print([str(w.message) for w in caught], flush=True)

parent = os.getpid()
started = make(log_dir="a"), make(sinks=[SummaryWriter("b"), "b.jsonl", "b.csv", Counting()])
for optimizer in started:
    optimizer.step()
unstarted = make(sinks=[SummaryWriter("c"), "c.jsonl"])
child = os.fork()
if child == 0:
    go(started)
    go([unstarted])
    sys.exit()
deadline = time.monotonic() + 30
while not os.waitpid(child, os.WNOHANG)[0]:
    if time.monotonic() > deadline:
        os.kill(child, 9)
        sys.exit("the child hangs")
    time.sleep(0.02)
for optimizer in started:
    optimizer.step()
    optimizer.close()
"""
    out = run_python("-c", code, cwd=tmp_path, timeout=120).stdout
    assert "written by child" not in out
    of_started, of_unstarted = (ast.literal_eval(line) for line in out.splitlines() if line.startswith("["))
    assert len(of_started) == 2
    for text in of_started:
        assert re.search(
            "records of a forked process are not written; create .* in the child process, or pass sinks= ", text
        )
    # Nothing is open yet except the user's own writer.
    (text,) = of_unstarted
    assert re.search("TensorBoardSink failed .* SummaryWriter .* another process.*create it in this process", text)
    assert (tmp_path / "c.jsonl").read_text().count('"record"') == 3
    for name in ("a", "b"):
        events = EventAccumulator(str(tmp_path / name)).Reload()
        assert [event.step for event in events.Scalars("flips/rate")] == [1, 2]
    for path in (tmp_path / "b.jsonl", *(tmp_path / "a").glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["record"]["step"] for line in lines if "record" in line] == [1, 2]
    assert {row.split(",")[0] for row in (tmp_path / "b.csv").read_text().splitlines()[1:]} == {"1", "2"}


# ---------------------------------------------------------------------- the hook form itself


def test_the_optimizer_stays_the_same_object(digits):
    model = digits_model()
    optimizer = torch.optim.AdamW(model.parameters())
    kind, attributes = type(optimizer), set(vars(optimizer))
    handle = track_flips(optimizer, model, sinks=[])
    assert isinstance(handle, FlipTrackingHandle)
    assert type(optimizer) is kind
    assert set(vars(optimizer)) == attributes
    assert "0.weight" in handle.info.tracked


def test_remove_stops_counting_and_writes_the_last_record(digits, tmp_path):
    model = digits_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with track_flips(optimizer, model, log_every=100, sinks=[tmp_path / "run.jsonl"]) as handle:
        backward(model, digits, 0)
        optimizer.step()
    counts = handle.tracker.get_flip_counts()
    assert sum(counts.values()) > 0
    optimizer.step()
    assert handle.tracker.get_flip_counts() == counts
    assert "flip_tracking" not in optimizer.state_dict()
    for hooks in ("step_pre", "step_post", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        assert not getattr(optimizer, f"_optimizer_{hooks}_hooks"), hooks
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [record["record"]["step"] for record in records if "record" in record] == [1]


def test_checkpoints_load_across_both_forms(digits, tmp_path):
    expected = None
    for saver in FORMS.values():
        for loader in FORMS.values():
            model = digits_model()
            optimizer, _ = saver(torch.optim.AdamW(model.parameters(), 0.01), model)
            for step in range(3):
                backward(model, digits, step)
                optimizer.step()
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
            weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            model = digits_model(seed=1)
            model.load_state_dict(weights)
            optimizer, tracker = loader(torch.optim.AdamW(model.parameters(), 0.5), model)
            optimizer.load_state_dict(state)
            for step in range(3, 6):
                backward(model, digits, step)
                optimizer.step()
            found = tracker.get_flip_counts(), tracker.get_stall_counts(), tracker.step_count
            expected = expected or found
            assert found == expected
            assert optimizer.param_groups[0]["lr"] == 0.01
            bare = torch.optim.AdamW(model.parameters())
            bare.load_state_dict(state)
            assert_same(bare.state_dict()["state"], state["state"])


def test_removing_frees_memory_and_a_handle_can_be_pickled(digits):
    model = digits_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    handle = track_flips(optimizer, model, sinks=[])
    backward(model, digits, 0)
    optimizer.step()
    counts = handle.tracker.get_flip_counts()
    assert pickle.loads(pickle.dumps(handle)).tracker.get_flip_counts() == counts
    handle.remove()
    assert handle.tracker.memory_usage().codes == handle.tracker.memory_usage().buffers == 0
    weight = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert weight() is None
    assert handle.tracker.get_flip_counts() == counts


def test_tracking_an_optimizer_twice_is_refused():
    model = digits_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    handle = track_flips(optimizer, model, sinks=[])
    for again in (track_flips, FlipTrackingOptimizer):
        with pytest.raises(TypeError, match=r"already tracked.*pass a list to quantizer="):
            again(optimizer, model, quantizer="bfloat16", sinks=[])
    handle.remove()
    track_flips(optimizer, model, sinks=[])


def test_gradients_are_released_when_a_step_raises(digits):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of memory")

    model = digits_model()
    optimizer = FlipTrackingOptimizer(Failing(model.parameters(), 0.1), model, sinks=[])
    backward(model, digits, 0)
    grad = weakref.ref(model[0].weight.grad)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.zero_grad()
    assert grad() is None


def test_copies_of_a_hooked_optimizer_are_not_tracked(digits):
    model = digits_model()
    optimizer, tracker = by_hooks(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model)
    backward(model, digits, 0)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        before = tracker.get_update_counts()
        twin.step()
        assert tracker.get_update_counts() == before


def test_track_flips_refuses_optimizers_without_hooks():
    class Outer(torch.optim.Optimizer):
        """Like Accelerate's: a subclass that does not call the parent's constructor."""

        def __init__(self, inner):
            self.inner_one = inner

        param_groups = property(lambda self: self.inner_one.param_groups)

    outer = Outer(torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1))
    with pytest.raises(
        TypeError, match=r"Outer does not run: step_pre, .*; use FlipTrackingOptimizer\(optimizer, model"
    ):
        track_flips(outer, sinks=[])
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'log_evry'"):
        track_flips(outer.inner_one, log_evry=3)


class Lookahead(torch.optim.Optimizer):
    """Like timm's: does not call torch's constructor, so it has only two kinds of hooks, and its step runs none."""

    def __init__(self, base, k=2, alpha=0.5):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.base, self.k, self.alpha, self.steps = base, k, alpha, 0
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, defaultdict(dict)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.base.step(closure)
        self.steps += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", p.detach().clone())
            if self.steps % self.k == 0:
                p.copy_(slow.lerp_(p, self.alpha))
        return loss

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)


def hooks_of(optimizer):
    return [hook for name, hooks in vars(optimizer).items() if name.endswith("_hooks") for hook in hooks]


def test_an_optimizer_that_lacks_a_kind_of_hook_is_not_changed(digits):
    model = digits_model()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.5))
    with pytest.raises(
        TypeError, match=r"Lookahead does not run: step_pre, step_post, state_dict_post, load_.*; use Flip"
    ):
        track_flips(optimizer, model, sinks=[])
    assert not hooks_of(optimizer)
    assert not hooks_of(optimizer.base)

    # What the message recommends also covers everything the outer optimizer does to the weights.
    brute = BruteForce(model)
    wrapped = FlipTrackingOptimizer(optimizer, model, sinks=[])
    for step in range(6):
        backward(model, digits, step)
        brute.before()
        wrapped.step()
        brute.after()
    brute.check(wrapped.tracker)
    assert sum(brute.flips.values()) > 0


def test_a_step_that_runs_no_hooks_is_detected():
    optimizer = Lookahead(torch.optim.SGD(digits_model().parameters(), 0.5))
    for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        setattr(optimizer, f"_optimizer_{kind}_hooks", OrderedDict())
    with pytest.raises(TypeError, match="Lookahead does not run: step_pre, step_post; use"):
        track_flips(optimizer, sinks=[])


def test_a_fault_while_registering_hooks_leaves_no_hooks(tmp_path):
    class Stubborn(torch.optim.SGD):
        def register_load_state_dict_pre_hook(self, hook, prepend=False):
            raise RuntimeError("no more hooks")

    model = digits_model()
    optimizer = Stubborn(model.parameters(), 0.1)
    other = FlipTrackingOptimizer(
        torch.optim.SGD([nn.Parameter(torch.ones(3, 3))], 0.1), sinks=[tmp_path / "run.jsonl"]
    )
    for _ in range(2):
        # The second call finds its weights untracked, as the first did.
        with pytest.raises(RuntimeError, match="no more hooks"):
            track_flips(optimizer, model, sinks=other)
        assert not hooks_of(optimizer)
    assert set(FlipTrackingOptimizer(optimizer, model, sinks=other).info.tracked) == {"0.weight", "2.weight"}


class SecondOrder(torch.optim.SGD):
    """Overrides ``step`` and calls the parent's, so torch runs the hooks of both."""

    def step(self, closure=None, hessian=None, *, damping):
        super().step(closure)
        return hessian, damping


def test_a_step_with_its_own_signature(digits):
    model = digits_model()
    brute = BruteForce(model)
    inner = SecondOrder(model.parameters(), 0.05)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
    backward(model, digits, 0)
    for args, kwargs, expected in [
        ((None, "curvature"), {"damping": 0.5}, ("curvature", 0.5)),
        ((), {"damping": 0.25}, (None, 0.25)),
        ((), {"hessian": "again", "damping": 0.25}, ("again", 0.25)),
    ]:
        brute.before()
        assert optimizer.step(*args, **kwargs) == expected
        brute.after()
    brute.check(optimizer.tracker)


def test_hooks_that_torch_runs_twice_count_once(digits):
    model = digits_model()
    brute = BruteForce(model)
    optimizer = SecondOrder(model.parameters(), 0.05)
    tracker = track_flips(optimizer, model, sinks=[]).tracker
    for step in range(3):
        backward(model, digits, step)
        brute.before()
        optimizer.step(damping=0.5)
        brute.after()
    brute.check(tracker)
    assert tracker.step_count == 3


@each_form
def test_a_step_that_raises_leaves_tracking_usable(form, digits):
    class Unsteady(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["lr"] > 1:
                self.param_groups[0]["params"][0].data.add_(1.0)
                raise RuntimeError("out of memory")
            return super().step(closure)

    model = digits_model()
    inner = Unsteady(model.parameters(), 0.05)
    optimizer, tracker = form(inner, model)
    brute = BruteForce(model)
    for step in range(5):
        backward(model, digits, step)
        optimizer.param_groups[0]["lr"] = 2.0 if step == 2 else 0.05
        brute.before()
        if step == 2:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
        else:
            optimizer.step()
            brute.after()
    brute.check(tracker)
    assert tracker.step_count == 4


@each_form
@pytest.mark.parametrize("by_name", [False, True], ids=["step(closure)", "step(closure=closure)"])
def test_old_gradients_do_not_count_if_a_closure_computes_new_ones(by_name, form, digits):
    """As in Lightning: each step's closure first removes the old gradients, and a batch may not use every layer."""
    model = digits_model()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    brute = watched(inner, model)
    optimizer, tracker = form(inner, model)
    old = []

    def use_both():
        return backward(model, digits, 0)

    def use_the_last():
        optimizer.zero_grad()
        assert all(gradient() is None for gradient in old)  # they need no memory beside the new ones
        loss = model[2](torch.ones(1, 48)).sum()
        loss.backward()
        return loss

    for closure in (use_both, use_the_last):
        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        old = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    brute.check(tracker)
